"""What is served and how it stands: models, health, version, metrics, and the figures that the page shows."""

import time
from dataclasses import asdict, is_dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

import fewbit
from fewbit.server.failures import Refusal, answer, encoded
from fewbit.server.state import State

EMBEDDINGS = "this server generates text: no model that makes embeddings is served"


def _json(value: Any) -> Response:
    return Response(encoded(value), media_type="application/json")


async def models(http: HttpRequest) -> Response:
    state: State = http.app.state.fewbit
    return _json({"object": "list", "data": [_model(state, name) for name in state.names]})


async def model(http: HttpRequest) -> Response:
    state: State = http.app.state.fewbit
    return _json(_model(state, state.known(http.path_params["name"])))


def _model(state: State, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(state.started), "owned_by": "fewbit", "root": state.names[0],
            "parent": None, "max_model_len": state.max_len, "permission": []}  # fmt: skip


async def health(http: HttpRequest) -> Response:
    state: State = http.app.state.fewbit
    try:
        state.open()
    except Refusal as refusal:
        return answer(refusal.status, str(refusal), code=refusal.code)
    return Response(status_code=200)


async def version(http: HttpRequest) -> Response:
    return _json({"version": fewbit.__version__})


async def metrics(http: HttpRequest) -> Response:
    state: State = http.app.state.fewbit
    return Response(state.metrics.text(state.loop.stats), media_type="text/plain; version=0.0.4; charset=utf-8")


async def info(http: HttpRequest) -> Response:
    state: State = http.app.state.fewbit
    limits = state.loop.engine.limits
    engine = {"max_model_len": state.max_len, "max_num_seqs": limits.most_running, "vocab": state.vocab,
              "chat_template": bool(state.text.template)}  # fmt: skip
    return _json({"version": fewbit.__version__, "models": list(state.names), "engine": engine, "model": state.facts})


async def stats(http: HttpRequest) -> Response:
    """The engine's counters now; two readings give the tokens per second."""
    state: State = http.app.state.fewbit
    counted = state.loop.stats
    found = asdict(counted) if is_dataclass(counted) and not isinstance(counted, type) else {}
    return _json({"time": time.time(), "places": state.loop.room, "taken": state.loop.rows, **found})


async def embeddings(http: HttpRequest) -> Response:
    raise Refusal(501, EMBEDDINGS, code="not_supported")
