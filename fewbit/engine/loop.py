"""The engine on a thread of its own, for readers on an asyncio loop.

Commands wait in a queue and are taken between two steps; what a step gives goes to the event loop in one call. A
reader that falls behind loses its request, never the engine's memory. When the engine raises, every reader is told
and `dead` says why.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from fewbit.engine.request import Delta, Request
from fewbit.errors import CapacityError, FewbitError


class Feed:
    """What the engine gives to one group of requests, for one reader. Touched on the reader's event loop only."""

    def __init__(self, home: "Loop", requests: Sequence[Request]):
        self.requests = requests
        self.rows = sum(request.params.n for request in requests)
        self.error: Exception | None = None
        self.closed = False
        self.event_loop = asyncio.get_running_loop()
        self._home, self._open, self._taken = home, self.rows, False
        self._held: deque[Delta] = deque()
        self._wake = asyncio.Event()

    async def accepted(self) -> None:
        """Return once the engine has taken every request; raise what it refused one with."""
        while not (self._taken or self.error or self.closed):
            await self._wait()
        if self.error:
            raise self.error

    async def next(self) -> list[Delta]:
        """Everything there is, at least one; nothing once all have finished."""
        while not self._held:
            if self.error:
                raise self.error
            if self._open == 0 or self.closed:
                return []
            await self._wait()
        deltas = list(self._held)
        self._held.clear()
        return deltas

    async def _wait(self) -> None:
        self._wake.clear()
        await self._wake.wait()

    def close(self) -> None:
        """Give up what still runs; the engine frees it before its next step."""
        if not self.closed:
            self.closed = True
            self._home._left(self, abort=self._open > 0)
            self._wake.set()

    def take(self, item: "Sequence[Delta] | Exception | None") -> None:
        """Deltas, an error that ends all, or None: the requests are accepted."""
        if self.closed:
            return
        if item is None:
            self._taken = True
        elif isinstance(item, Exception):
            self._fail(item)
        else:
            self._held.extend(item)
            self._open -= sum(delta.finish is not None for delta in item)
            if len(self._held) > self._home.buffer * self.rows and self._open:
                self._held.clear()
                self._fail(CapacityError(f"the reader fell {self._home.buffer} tokens behind: the request was ended"))
        self._wake.set()

    def _fail(self, error: Exception) -> None:
        self.error = error
        self.close()


Command = tuple[str, Feed]
Posts = list[tuple[Feed, "list[Delta] | Exception | None"]]


class Loop:
    """make: builds the engine, on the thread that will step it. buffer: deltas a continuation's reader may lag."""

    def __init__(self, make: Callable[[], Any], buffer: int = 1024):
        self.buffer = buffer
        self.engine: Any = None
        self.dead: BaseException | None = None
        self.on_death: Callable[[], None] = lambda: None
        self.stats: Any = None
        self.rows = 0  # continuations that run or wait
        self.room = 0  # how many may
        self._make = make
        self._commands: deque[Command] = deque()
        self._wake, self._ready = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._stopping = False
        self._live: dict[str, tuple[Feed, int]] = {}  # with the continuations still to finish; the engine's thread only
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def start(self) -> None:
        """Return when the engine stands; raise what kept it from standing."""
        self._thread.start()
        self._ready.wait()
        if self.dead:
            raise self.dead

    async def submit(self, requests: Sequence[Request]) -> Feed:
        """Queue requests that are read together. CapacityError: no room now."""
        for request in requests:
            if request.params.structured_outputs is not None:  # up to half a second, for which nobody else shall wait
                await asyncio.to_thread(self.engine.prepare, request.params)
        feed = Feed(self, requests)
        self._enter(feed)
        self._commands.append(("add", feed))
        self._wake.set()
        try:
            if self.dead:  # it died before it could see the command
                self._enter(feed)
            await feed.accepted()
        except BaseException:
            feed.close()
            raise
        return feed

    def _enter(self, feed: Feed) -> None:
        if self.dead:
            raise FewbitError(f"the engine has stopped: {self.dead}")
        with self._lock:
            if self.rows + feed.rows > self.room:
                raise CapacityError(f"{self.rows} of {self.room} places are taken, and this needs {feed.rows} more: "
                                    "try again later")  # fmt: skip
            self.rows += feed.rows

    def _left(self, feed: Feed, abort: bool) -> None:
        with self._lock:
            self.rows -= feed.rows
        if abort:
            self._commands.append(("abort", feed))
            self._wake.set()

    def stop(self, seconds: float = 30.0) -> bool:
        """End the thread and free the engine; whether it ended in time."""
        self._stopping = True
        self._wake.set()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _main(self) -> None:
        """The engine's thread; so is all that it calls."""
        try:
            self.engine = self._make()
            self.room = self.engine.limits.most_running + self.engine.config.max_queue
            self.stats = self.engine.stats()
            self._ready.set()
            while not self._stopping:
                self._turn()
            self._tell_all(FewbitError("the engine was stopped"))
        except BaseException as error:  # whatever it was, those who wait must hear of it
            self.dead = error
            self._tell_all(FewbitError(f"the engine has stopped: {error}"))
            self.on_death()
        finally:
            self._ready.set()
            if self.engine is not None:
                with contextlib.suppress(Exception):  # a broken engine may not be able to
                    self.engine.shutdown()

    def _turn(self) -> None:
        self._wake.clear()
        posts: Posts = []
        while self._commands:
            self._obey(*self._commands.popleft(), posts)
        self._post(posts)
        busy = self.engine.has_work()
        if busy:
            self._post(self._step())
        self.stats = self.engine.stats()
        if not busy:
            self._wake.wait(1.0)

    def _obey(self, verb: str, feed: Feed, posts: Posts) -> None:
        if verb == "abort" or feed.closed:
            self._abort(feed)
            return
        try:
            for request in feed.requests:
                self._live[request.id] = (feed, request.params.n)
                self.engine.add(request)
        except Exception as error:  # a request can only hurt itself
            self._abort(feed)
            posts.append((feed, error))
        else:
            posts.append((feed, None))

    def _abort(self, feed: Feed) -> None:
        for request in feed.requests:
            if self._live.pop(request.id, None):
                self.engine.abort(request.id)

    def _step(self) -> Posts:
        groups: dict[Feed, list[Delta]] = {}
        for delta in self.engine.step():
            if delta.request_id not in self._live:
                continue
            feed, left = self._live[delta.request_id]
            groups.setdefault(feed, []).append(delta)
            if delta.finish is not None:
                left -= 1
                self._live[delta.request_id] = (feed, left)
                if left == 0:
                    del self._live[delta.request_id]
        return list(groups.items())

    def _post(self, posts: Posts) -> None:
        """One call for each event loop that has something coming."""
        loops: dict[asyncio.AbstractEventLoop, Posts] = {}
        for feed, item in posts:
            loops.setdefault(feed.event_loop, []).append((feed, item))
        for loop, theirs in loops.items():
            try:
                loop.call_soon_threadsafe(_hand, theirs)
            except RuntimeError:  # that loop is closed: nobody reads
                for feed, _ in theirs:
                    self._abort(feed)

    def _tell_all(self, error: Exception) -> None:
        """End every feed there is, accepted or not."""
        waiting = {feed for feed, _ in self._live.values()} | {feed for verb, feed in self._commands if verb == "add"}
        self._live.clear()
        self._post([(feed, error) for feed in waiting])


def _hand(posts: Posts) -> None:
    for feed, item in posts:
        feed.take(item)
