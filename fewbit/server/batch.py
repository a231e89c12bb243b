"""Batches as OpenAI's files have them, a request a line; answered by the server's own routes, without a socket."""

import asyncio
import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fewbit.engine.loop import Loop
from fewbit.errors import RequestError
from fewbit.files.text import load_json
from fewbit.server.app import build
from fewbit.server.config import ServerConfig

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
BUSY = 429


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a file."""

    custom_id: str
    url: str
    body: dict[str, Any]


def read(text: str, where: str) -> list[Line]:
    """Every line, checked before anything runs; ids are unique, since answers are told apart by them."""
    found: dict[str, Line] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        if not raw.strip():
            continue
        line = _line(load_json(raw.encode(), f"{where}, line {number}"), f"{where}, line {number}")
        if line.custom_id in found:
            raise RequestError(f"{where}, line {number}: custom_id {line.custom_id!r} was there before")
        found[line.custom_id] = line
    return list(found.values())


def _line(held: Any, where: str) -> Line:
    if not isinstance(held, dict) or not isinstance(held.get("body"), dict) or not held.get("custom_id"):
        raise RequestError(f"{where}: want an object with custom_id, url and body")
    if held.get("url") not in URLS or held.get("method", "POST") != "POST":
        asked = f"{held.get('method', 'POST')} {held.get('url')}"
        raise RequestError(f"{where}: {asked}: a batch can POST to {', '.join(URLS)}")
    if held["body"].get("stream"):
        raise RequestError(f"{where}: a batch has no streams: leave out stream")
    return Line(str(held["custom_id"]), held["url"], held["body"])


def run(make: Callable[[], Any], config: ServerConfig, lines: Sequence[Line], tell: Callable[[int], None]) -> Iterator[
    dict[str, Any]
]:  # fmt: skip
    """Answers in the order of the lines. tell: how many are done."""
    loop = Loop(make)
    loop.start()
    try:
        yield from asyncio.run(_all(build(loop, config), lines, min(256, loop.room), tell))
    finally:
        loop.stop()


async def _all(app: Any, lines: Sequence[Line], most: int, tell: Callable[[int], None]) -> list[dict[str, Any]]:
    places, done = asyncio.Semaphore(most), 0

    async def one(line: Line) -> dict[str, Any]:
        nonlocal done
        async with places:
            status, body = await post(app, line.url, line.body)
            while status == BUSY:
                await asyncio.sleep(0.1)
                status, body = await post(app, line.url, line.body)
        done += 1
        tell(done)
        answer = {"status_code": status, "request_id": f"req-{uuid.uuid4().hex[:16]}", "body": body}
        return {"id": f"batch-{uuid.uuid4().hex[:16]}", "custom_id": line.custom_id, "response": answer,
                "error": None if status == 200 else body.get("error")}  # fmt: skip

    async with app.router.lifespan_context(app):
        return list(await asyncio.gather(*(one(line) for line in lines)))


async def post(app: Any, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """One request through the application."""
    data, status, parts, asked = json.dumps(body).encode(), 0, [], False
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode()),
               (b"host", b"localhost")]  # fmt: skip
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
             "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
             "client": ("127.0.0.1", 0), "server": ("localhost", 80), "state": {}}  # fmt: skip

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if asked:
            await asyncio.Event().wait()  # nobody leaves
        asked = True
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, json.loads(b"".join(parts))
