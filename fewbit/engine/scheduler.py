"""Scheduler: whose tokens the next step computes. Those that run go on first, a token each or a chunk of their prompt.

When pages run out the last in rank gives its own back and is computed again later. A prompt's beginning that the pool
still holds is not computed at all, but for its last token, whose logits are wanted.
"""

from bisect import insort
from dataclasses import dataclass

from fewbit.engine.pages import PagePool
from fewbit.engine.request import PENDING, Stream
from fewbit.errors import CapacityError


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens start to stop of a stream."""

    stream: Stream
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        """Whether a new token follows from it."""
        return self.stop == len(self.stream.tokens)

    @property
    def pending(self) -> bool:
        """Whether its last token is in flight."""
        return self.stream.tokens[self.stop - 1] == PENDING


class Scheduler:
    def __init__(self, pool: PagePool, most_running: int, budget: int, most_waiting: int):
        self.pool, self.most_running, self.budget, self.most_waiting = pool, most_running, budget, most_waiting
        self.waiting: list[Stream] = []
        self.running: list[Stream] = []
        self.preemptions = 0

    def add(self, streams: list[Stream]) -> None:
        """All of a request's continuations, or none."""
        if not self.takes(len(streams)):
            raise CapacityError(f"{len(self.waiting)} requests are waiting already, {self.most_waiting} may: try later")
        for stream in streams:
            insort(self.waiting, stream, key=lambda s: s.rank)

    def takes(self, count: int) -> bool:
        """Whether so many more may wait; a request that is larger than the queue may where nothing does."""
        return len(self.waiting) + count <= max(self.most_waiting, count)

    def next(self) -> list[Work]:
        """The next step, its pages taken. Who needs one token comes before who needs many; who is full waits.

        Long texts come first, so that those who attend to the last of them have little left to wait for.
        """
        works: dict[Stream, Work] = {}
        left = self.budget
        asking = [s for s in self.running if len(s.tokens) > s.computed and not s.full]
        for stream in sorted(asking, key=lambda s: len(s.tokens) - s.computed > 1):
            count = min(len(stream.tokens) - stream.computed, left)
            if not count or not stream.pages:  # or it gave its pages to one before it
                continue
            back = self._room(stream, stream.computed + count, works)
            if back is not None:
                works[stream] = Work(stream, stream.computed, stream.computed + count)
                left += back - count
        while self.waiting and left and len(self.running) < self.most_running:
            work = self._begin(self.waiting[0], left)
            if work is None:
                break
            works[work.stream] = work
            left -= work.stop - work.start
        return sorted(works.values(), key=lambda work: (work.stop - work.start > 1, -work.stop))

    def _begin(self, stream: Stream, budget: int) -> Work | None:
        if stream.full or self._sibling_computes(stream):
            return None
        found: list[int] = []
        digests: list[bytes] = []
        if stream.request.params.prompt_logprobs is None:
            found, digests = self.pool.match(stream.tokens[:-1])
        start = len(found) * self.pool.size
        stop = min(len(stream.tokens), start + budget)
        taken = self.pool.take(self._pages(stop) - len(found))
        if taken is None:
            self.pool.release(found)
            return None
        stream.pages, stream.digests, stream.computed = [*found, *taken], digests, start
        stream.cached = max(stream.cached, start) if not stream.told else stream.cached
        self.waiting.pop(0)
        insort(self.running, stream, key=lambda s: s.rank)
        return Work(stream, start, stop)

    def _sibling_computes(self, stream: Stream) -> bool:
        """A continuation waits until the first of its request has the prompt in the cache."""
        if not self.pool.caching:
            return False
        mine = [s for s in self.running if s.request is stream.request]
        return any(s.computed < s.prompt_length - 1 for s in mine)

    def _room(self, stream: Stream, length: int, works: dict[Stream, Work]) -> int | None:
        """Pages for so many tokens, from the last in rank if need be. -> tokens of this step that it gives back;

        None where the stream itself is the last.
        """
        back = 0
        while True:
            taken = self.pool.take(max(0, self._pages(length) - len(stream.pages)))
            if taken is not None:
                stream.pages += taken
                return back
            last = max(self.running, key=lambda s: s.rank)
            if (lost := works.pop(last, None)) is not None:
                back += lost.stop - lost.start
            self.preempt(last)
            if last is stream:
                return None

    def _pages(self, length: int) -> int:
        return -(-length // self.pool.size)

    def computed(self, work: Work) -> None:
        """It is on its way. Full pages may be shared from now on, but for those with a token that nobody knows yet."""
        stream, size = work.stream, self.pool.size
        stream.computed = work.stop
        while self.pool.caching and (len(stream.digests) + 1) * size <= min(stream.computed, stream.known):
            at = len(stream.digests)
            before = stream.digests[-1] if stream.digests else b""
            stream.digests.append(self.pool.digest(before, stream.tokens[at * size : (at + 1) * size]))
            self.pool.commit(stream.pages[at], stream.digests[-1])

    def preempt(self, stream: Stream) -> None:
        """Give the pages back; what was computed is computed again."""
        self.preemptions += 1
        self.running.remove(stream)
        self._let_go(stream)
        insort(self.waiting, stream, key=lambda s: s.rank)

    def remove(self, stream: Stream) -> None:
        """Finished or given up."""
        stream.ended = True
        for held in (self.running, self.waiting):
            if stream in held:
                held.remove(stream)
        self._let_go(stream)

    def _let_go(self, stream: Stream) -> None:
        self.pool.release(stream.pages)
        stream.pages, stream.digests, stream.computed, stream.state = [], [], 0, None
