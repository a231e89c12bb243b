"""A request's body: read within bounds of size, time and memory, and parsed within bounds of depth."""

import asyncio
import json
import re
from typing import Any

from starlette.requests import Request

from fewbit.server.config import ServerConfig
from fewbit.server.failures import Refusal

MEDIA = ("application/json",)
SMALL, MANY = 256, 2000  # a body that comes in so many pieces must have pieces of at least so many bytes
WIDEST = 4096  # fields of one object
BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


class Bodies:
    """How many bytes of bodies are held now, over all requests."""

    def __init__(self, config: ServerConfig):
        self.config, self.held = config, 0

    async def read(self, request: Request) -> Any:
        """The JSON of a body; Refusal where it is none, or too much."""
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind not in MEDIA:
            raise Refusal(415, f"content-type {kind!r}: want application/json")
        declared = request.headers.get("content-length", "0")
        if len(declared) > 18 or not declared.isdigit() or int(declared) > self.config.max_body:
            raise self._too_long()
        data = bytearray()
        try:
            async with asyncio.timeout(self.config.body_seconds):
                await self._collect(request, data)
            return parse(data, self.config.max_depth)
        except TimeoutError:
            raise Refusal(408, f"the body did not come within {self.config.body_seconds:g} s") from None
        finally:
            self.held -= len(data)

    async def _collect(self, request: Request, data: bytearray) -> None:
        count = 0
        async for piece in request.stream():
            data += piece
            count += 1
            self.held += len(piece)
            if len(data) > self.config.max_body:
                raise self._too_long()
            if self.held > self.config.max_bodies:
                raise Refusal(503, "too many bodies are being read: try again later")
            if count > MANY and len(data) < count * SMALL:
                raise Refusal(400, f"the body comes in too many small pieces: {count} for {len(data)} bytes")

    def _too_long(self) -> Refusal:
        return Refusal(413, f"the body is over {self.config.max_body} bytes", code="body_too_large")


def parse(data: bytes | bytearray, depth: int) -> Any:
    """JSON as the standard has it: no NaN, no bottomless nesting, no half characters."""
    if deepest(data, depth) > depth:
        raise Refusal(400, f"the JSON is nested deeper than {depth}")
    try:
        value = json.loads(data, parse_constant=_constant, object_pairs_hook=_object)
        if b"\\u" in data:  # an escape can name half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {_short(error)}") from None
    return value


def deepest(data: bytes | bytearray, enough: int) -> int:
    """How deep brackets nest; anything up to `enough` where that is plain without looking."""
    if data.count(b"[") + data.count(b"{") <= enough:
        return 0
    depth = most = 0
    for found in BRACKETS.finditer(data):
        mark = found.group()
        if mark in b"[{":
            depth += 1
            most = max(most, depth)
            if most > enough:
                break
        elif mark in b"]}":
            depth -= 1
    return most


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > WIDEST:
        raise ValueError(f"an object has {len(pairs)} fields; at most {WIDEST} are taken")
    return dict(pairs)


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:200] or type(error).__name__
