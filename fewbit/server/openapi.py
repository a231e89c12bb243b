"""GET /openapi.json: the routes and their bodies, for tools that read such things."""

from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

import fewbit
from fewbit.server import protocol
from fewbit.server.failures import encoded

BODIES: dict[str, Any] = {
    "/v1/completions": protocol.CompletionBody, "/v1/chat/completions": protocol.ChatBody,
    "/v1/responses": protocol.ResponsesBody, "/tokenize": protocol.TokenizeBody,
    "/detokenize": protocol.DetokenizeBody,
}  # fmt: skip
PLAIN = ("/health", "/version", "/metrics", "/info", "/stats", "/v1/models")


@cache
def document() -> dict[str, Any]:
    _, schemas = models_json_schema([(body, "validation") for body in BODIES.values()],
                                    ref_template="#/components/schemas/{model}")  # fmt: skip
    paths: dict[str, Any] = {path: {"post": _posted(body.__name__)} for path, body in BODIES.items()}
    paths |= {path: {"get": {"responses": _ANSWERS}} for path in PLAIN}
    return {"openapi": "3.1.0", "info": {"title": "fewbit", "version": fewbit.__version__}, "paths": paths,
            "components": {"schemas": schemas["$defs"]}}  # fmt: skip


_ANSWERS = {"200": {"description": "what was asked for"}, "default": {"description": 'an error: {"error": {...}}'}}


def _posted(name: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            "responses": _ANSWERS}  # fmt: skip


async def openapi(http: HttpRequest) -> Response:
    return Response(encoded(document()), media_type="application/json")
