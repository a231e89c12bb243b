"""The routes, and what stands around them: ids, keys, other sites' pages, errors in one shape."""

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from fewbit.engine.loop import Loop
from fewbit.server import facts, pages
from fewbit.server.auth import Identified, Keyed, Local
from fewbit.server.body import Bodies
from fewbit.server.chat import chat
from fewbit.server.completions import completions
from fewbit.server.config import ServerConfig
from fewbit.server.failures import answer, of
from fewbit.server.metrics import Metrics
from fewbit.server.openapi import openapi
from fewbit.server.responses import responses
from fewbit.server.state import State
from fewbit.server.text import Text
from fewbit.server.tokens import detokenize, tokenize

LOG = logging.getLogger("fewbit.server")
Handler = Callable[[HttpRequest], Awaitable[Any]]

POSTED = {
    "/v1/completions": completions, "/v1/chat/completions": chat, "/v1/responses": responses, "/tokenize": tokenize,
    "/detokenize": detokenize, "/v1/embeddings": facts.embeddings,
}  # fmt: skip
READ = {
    "/": pages.page, "/page.css": pages.page, "/page.js": pages.page, "/health": facts.health, "/ping": facts.health,
    "/version": facts.version, "/metrics": facts.metrics, "/info": facts.info, "/stats": facts.stats,
    "/v1/models": facts.models, "/v1/models/{name:path}": facts.model, "/openapi.json": openapi,
}  # fmt: skip


def build(loop: Loop, config: ServerConfig, facts_: dict[str, Any] | None = None) -> Starlette:
    """The application over a loop that has started. facts_: what inspect says of the checkpoint; the engine knows."""
    engine = loop.engine
    known = {**(facts_ or {}), **engine.facts()}
    names = tuple(engine.config.served_names)
    state = State(config, loop, Text(engine.tokenizer, config.chat_template, engine.limits.max_len,
                                     config.template_seconds),
                  names, known, Bodies(config), Metrics(names[0], known))  # fmt: skip
    routes = [Route(path, answered(handler), methods=["POST"]) for path, handler in POSTED.items()]
    routes += [Route(path, answered(handler), methods=["GET"]) for path, handler in READ.items()]
    app = Starlette(routes=routes, middleware=around(config, state), lifespan=lifespan,
                    exception_handlers={HTTPException: unrouted})  # fmt: skip
    app.router.redirect_slashes = False
    app.state.fewbit = state
    return app


def around(config: ServerConfig, state: State) -> list[Middleware]:
    found = [Middleware(Identified, count=state.metrics.answers)]
    if config.allowed_origins:
        found.append(Middleware(CORSMiddleware, allow_origins=config.allowed_origins,
                                allow_methods=config.allowed_methods, allow_headers=config.allowed_headers,
                                allow_credentials=config.allow_credentials,
                                expose_headers=["x-request-id"]))  # fmt: skip
    if config.api_key:
        found.append(Middleware(Keyed, keys=config.api_key))
    elif config.host in ("127.0.0.1", "localhost", "::1"):
        found.append(Middleware(Local))
    return found


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    text: Text = app.state.fewbit.text
    try:
        await text.warm()
    except Exception as error:  # plain completions work without a template
        LOG.warning("chat will not work: %s", error)
    yield
    text.close()


def answered(handler: Handler) -> Handler:
    """The handler, with every error as an answer."""

    async def answering(http: HttpRequest) -> Any:
        try:
            return await handler(http)
        except ClientDisconnect:
            return Response(status_code=400)
        except Exception as error:
            found = of(error)
            if found[0] == 500:
                LOG.exception("%s %s", http.method, http.url.path)
            return answer(*found)

    return answering


async def unrouted(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: f"there is nothing at {http.url.path[:200]}", 405: f"{http.method} is not what this path takes"}
    found = answer(error.status_code, said.get(error.status_code, error.detail))
    found.headers.update(error.headers or {})
    return found
