"""Batch: the tokens of a step in one row, as numbers on the host; what a runner sends to its device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fewbit.engine.request import PENDING, Stream
from fewbit.engine.scheduler import Work
from fewbit.kernels.table import BLOCK


@dataclass(frozen=True, slots=True)
class Flight:
    """Tokens that a step before has drawn and that are still on the device: [n] int64, and whose they are."""

    tokens: Tensor
    rows: Mapping[Stream, int]


@dataclass(slots=True)
class Batch:
    """ids: PENDING where `sources` says which row of the flight has the token. slots: page x size + place."""

    works: Sequence[Work]
    ids: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    asked: list[int] = field(default_factory=list)  # rows whose logits are wanted
    counts: list[int] = field(default_factory=list)  # of each work's
    ones: int = 0  # so many leading works have one token each

    @classmethod
    def of(cls, works: Sequence[Work], size: int, flight: Flight | None = None) -> "Batch":
        batch = cls(works)
        for work in works:
            batch._add(work, size, flight)
        return batch

    def _add(self, work: Work, size: int, flight: Flight | None) -> None:
        stream, start, stop = work.stream, work.start, work.stop
        begin = len(self.ids)
        if self.ones == len(self.counts) and stop - start == 1:
            self.ones += 1
        for page in range(start // size, -(-stop // size)):
            first = stream.pages[page] * size
            self.slots += range(first + max(start - page * size, 0), first + min(stop - page * size, size))
        self.ids += stream.tokens[start:stop]
        self.positions += range(start, stop)
        self.sources += [-1] * (stop - start)
        if work.pending:
            assert flight is not None, "a token is in flight, and the flight was not given"
            self.sources[-1] = flight.rows[stream]
        rows = [begin + row for row in wanted(work)]
        self.asked += rows
        self.counts.append(len(rows))
        self.starts.append(len(self.ids))

    @property
    def decodes(self) -> bool:
        """Whether it is one token of each stream, and its logits: what graphs and tapes hold."""
        return self.ones == len(self.works) and self.asked == list(range(self.ones))

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """(work, first of its rows) of each BLOCK of rows, for works of more than one; those that see most first."""
        sizes = [(i, work.stop - work.start) for i, work in enumerate(self.works)]
        found = [(i, row) for i, size in sizes if size > 1 for row in range(0, size, BLOCK)]
        return sorted(found, key=lambda block: -self.works[block[0]].start - block[1])

    @property
    def pending(self) -> bool:
        return PENDING in self.ids

    @property
    def longest(self) -> int:
        return max(b - a for a, b in zip(self.starts, self.starts[1:], strict=False))


def wanted(work: Work) -> list[int]:
    """Places among the work's own tokens whose logits are needed."""
    count = work.stop - work.start
    if work.stream.request.params.prompt_logprobs is not None and work.stop <= work.stream.prompt_length:
        return list(range(count))
    return [count - 1] if work.samples else []
