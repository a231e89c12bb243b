"""Server-sent events, written by hand: one piece for everything that a step gave, and an end to readers that stall."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.types import Receive, Scope, Send

from fewbit.engine.loop import Feed
from fewbit.server import failures

LOG = logging.getLogger("fewbit.server")
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
DONE = b"data: [DONE]\n\n"


@contextlib.asynccontextmanager
async def watched(feed: Feed, receive: Receive) -> AsyncIterator[Feed]:
    """Closes the feed when the client leaves, and in any case at the end."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        feed.close()

    task = asyncio.ensure_future(gone())
    try:
        yield feed
    finally:
        task.cancel()
        feed.close()


class Events:
    """A response of events. pieces: the bytes to send; `seconds`: how long a reader may take nothing."""

    def __init__(self, feed: Feed, pieces: AsyncIterator[bytes], seconds: float,
                 ended: Callable[[], None] = lambda: None):  # fmt: skip
        self.feed, self.pieces, self.seconds, self.ended = feed, pieces, seconds, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with watched(self.feed, receive):
                await self._timed(send({"type": "http.response.start", "status": 200, "headers": HEADERS}))
                async for piece in self.pieces:
                    await self._timed(send({"type": "http.response.body", "body": piece, "more_body": True}))
                await self._timed(send({"type": "http.response.body", "body": b"", "more_body": False}))
        except TimeoutError:
            if abort := scope.get("state", {}).get("abort"):  # a close would wait for the reader; this does not
                abort()
        finally:
            self.feed.close()
            self.ended()

    async def _timed(self, sending: Awaitable[None]) -> None:
        async with asyncio.timeout(self.seconds):
            await sending


async def with_errors(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The pieces; an error after the start becomes the last event."""
    try:
        async for piece in pieces:
            yield piece
    except Exception as error:  # the status is sent already: this is the only place left to say it
        found = failures.of(error)
        if found[0] == 500:
            LOG.exception("while streaming")
        yield event(failures.encoded(failures.body(*found))) + DONE


def event(data: bytes, name: str | None = None) -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return b"%bdata: %b\n\n" % (head, data)
