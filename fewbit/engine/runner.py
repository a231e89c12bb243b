"""Runners: tokens of many streams -> the logits that are wanted.

Paged packs them into one flat row over a paged cache. Alone runs each stream by itself with transformers' own cache,
for architectures whose state is not keys and values by position. The twin decides which; both see the same Work.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewbit.engine.batch import Batch, Flight, wanted
from fewbit.engine.graph import Graphs
from fewbit.engine.scheduler import Work
from fewbit.engine.tables import Slots, Tables
from fewbit.engine.tapes import Tapes
from fewbit.engine.transfer import sent
from fewbit.errors import UnsupportedError
from fewbit.modules import rotary_tables
from fewbit.modules.paged import AnyCache, Span, Step, Table, stepping
from fewbit.modules.rotary import Astray

LOG = logging.getLogger("fewbit.engine")
LATE = "fewbit_late"  # of a model: False where queries and keys do not come to attention as they were handed on


def rounder(count: int) -> int:
    """A count of rows of which there are few: for each new one, a CPU's libraries compile and keep a multiplication."""
    step = 1 if count <= 16 else 16 if count <= 128 else 32 if count <= 512 else 64
    return -(-count // step) * step


def fed(ids: Tensor, sources: Tensor, tokens: Tensor) -> Tensor:
    """ids: [T]; where sources is not -1, that row of tokens instead."""
    return torch.where(sources >= 0, tokens.index_select(0, sources.clamp(min=0)), ids)


@dataclass(frozen=True, slots=True)
class Logits:
    """rows: [n, V], the wanted ones of all works in order; counts: how many are each work's."""

    rows: Tensor
    counts: Sequence[int]

    def each(self) -> list[Tensor]:
        return list(self.rows.split(list(self.counts)))

    def last(self, works: Sequence[int]) -> Tensor:
        """The last row of each of these works."""
        if all(count == 1 for count in self.counts) and len(works) == len(self.counts):
            return self.rows
        ends, end = [], 0
        for count in self.counts:
            end += count
            ends.append(end - 1)
        return self.rows.index_select(0, sent([ends[i] for i in works], torch.int64, self.rows.device))


class Runner(Protocol):
    paged: bool
    ahead: bool  # takes a step whose tokens another still draws

    def run(self, works: Sequence[Work], flight: Flight | None = None) -> Logits: ...

    def free(self) -> None: ...


class Paged:
    """One forward for all. Slots are page x size + place; caches are made as the first step meets the layers."""

    paged = True

    def __init__(self, model: nn.Module, pages: int, size: int, cache_dtype: torch.dtype | None, apart: bool = False,
                 streams: int = 1, reach: int = 0, budget: int = 0):  # fmt: skip
        """apart: one stream a forward, for rotary tables that depend on the longest text of a batch.

        On a GPU at most `streams` run, none longer than `reach` tokens; steps of up to `budget` tokens are recorded.
        """
        self.model, self.size, self.capacity, self.cache_dtype = model, size, pages * size, cache_dtype
        self.apart, self.reach, self.budget = apart, reach or self.capacity, budget
        self.caches: dict[int, AnyCache] = {}
        self.device = device_of(model)
        self.ahead = self.device.type == "cuda" and not apart
        self.keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.tables = Tables(streams, -(-self.reach // size), self.device) if self.device.type == "cuda" else None
        self.slots = Slots(size, self.device)
        self.graphs: Graphs | None = None
        self.tapes: Tapes | None = None
        self.exact = False  # no rows beyond the last text, which somebody who watches would take for text

    def capture(self, tell: Callable[[int, int], None], prompts: bool = True) -> None:
        """Record CUDA graphs of steps, of those with prompts too. tell: (how many are done, of how many)."""
        assert self.tables is not None
        most = self.budget if prompts else 0
        rotary_tables.keep(self.model, self.reach)
        self.graphs = Graphs(self.tables, self.size, self.reach, self.capacity, self._step, self._model, most)
        self.graphs.capture(tell)

    def forget(self) -> None:
        """What was recorded."""
        self.graphs = None

    def tape(self) -> None:
        """Record steps of few streams on a CPU as they come."""
        self.tapes = Tapes(self.slots, self.capacity, self._step, self._model)

    @property
    def _step(self) -> Callable[..., Step]:
        """Of a step that is recorded."""
        return partial(
            Step, make_spans=no_spans, caches=self.caches, capacity=self.capacity + 1, dtype=self.cache_dtype
        )

    def run(self, works: Sequence[Work], flight: Flight | None = None) -> Logits:
        if not self.apart:
            return self._forward(works, flight)
        each = [self._forward([work], flight) for work in works]
        return Logits(torch.cat([found.rows for found in each]), [found.counts[0] for found in each])

    def _forward(self, works: Sequence[Work], flight: Flight | None) -> Logits:
        batch = Batch.of(works, self.size, flight)
        if self.graphs is not None and (size := self.graphs.size(batch)) is not None:
            return Logits(self.graphs.run(size, batch, flight), batch.counts)
        plainly = partial(self._eager, batch, flight)
        if self.tapes is not None and not self.exact and self.tapes.takes(batch):
            return Logits(self.tapes.run(batch, plainly), batch.counts)
        return Logits(plainly(), batch.counts)

    def _eager(self, batch: Batch, flight: Flight | None) -> Tensor:
        """Rows beyond the last text make the count a rounder one; what they write goes to a slot that nobody reads."""
        whole, asked = len(batch.ids), len(batch.asked)
        cpu = self.device.type == "cpu" and not self.exact
        extra, more = (rounder(whole) - whole, rounder(asked) - asked) if cpu else (0, 0)
        there = partial(sent, dtype=torch.int64, device=self.device)
        ids = there(batch.ids + [0] * extra)
        if batch.pending:
            assert flight is not None
            ids = fed(ids, there(batch.sources + [-1] * extra), flight.tokens)
        step = Step(there(batch.slots + [self.capacity] * extra), partial(self._spans, batch), self.caches,
                    self.capacity + 1, self.cache_dtype, self._table(batch))  # fmt: skip
        keep = None if batch.asked == list(range(whole)) and not extra else there(batch.asked + [0] * more)
        return self._model(step, ids, there(batch.positions + [0] * extra), keep)[:asked]

    def _model(self, step: Step, ids: Tensor, positions: Tensor, keep: Tensor | None) -> Tensor:
        """ids, positions: [T] -> logits of the rows to keep, of all where None."""
        step.late = getattr(self.model, LATE, True)  # attention turns queries and keys
        try:
            return self._logits(step, ids, positions, keep)
        except Astray as error:
            LOG.info("queries and keys are turned before attention: %s", error)
            setattr(self.model, LATE, False)
            step.late = False
            return self._logits(step, ids, positions, keep)

    def _logits(self, step: Step, ids: Tensor, positions: Tensor, keep: Tensor | None) -> Tensor:
        asked: dict[str, Any] = {"logits_to_keep": keep} if self.keeps and keep is not None else {}
        with stepping(step), torch.no_grad():  # inference mode does not count changes in place: see Merged
            out: Tensor = self.model(
                input_ids=ids[None], position_ids=positions[None], use_cache=False, **asked
            ).logits[0]
        return out if self.keeps or keep is None else out[keep]

    def _table(self, batch: Batch) -> Table | None:
        if self.tables is None:
            return None
        numbers = partial(sent, dtype=torch.int32, device=self.device)
        rows = numbers(self.tables.rows([work.stream for work in batch.works]))
        lengths = [work.stop for work in batch.works]
        return Table(self.tables.pages.index_select(0, rows), numbers(lengths), numbers(batch.starts), batch.ones,
                     batch.longest, max(lengths), self.size)  # fmt: skip

    def _spans(self, batch: Batch) -> list[Span]:
        held = zip(batch.works, batch.starts, batch.starts[1:], strict=False)
        found = [Span(start, stop, work.stop, self.slots.of(work.stream)[: work.stop]) for work, start, stop in held]
        self.slots.forget()
        return found

    @property
    def slot_bytes(self) -> int:
        """What one token takes in the layers that were met."""
        return sum(cache.slot_bytes for cache in self.caches.values())

    def free(self) -> None:
        self.graphs = self.tapes = None
        self.caches.clear()


def no_spans() -> list[Span]:
    raise UnsupportedError("where a step is recorded attention must have a kernel")


class Alone:
    """Each stream by itself: its text at once, then token by token on transformers' own cache.

    cache: the name that the model's outputs and arguments have for it; "" where the twin found none that goes on
    exactly, and every step computes the whole text.
    """

    paged = ahead = False

    def __init__(self, model: nn.Module, cache: str):
        self.model, self.cache, self.device = model, cache, device_of(model)

    def run(self, works: Sequence[Work], flight: Flight | None = None) -> Logits:
        found = [self._one(work) for work in works]
        asked = [rows for rows in found if len(rows)]
        return Logits(torch.cat(asked) if asked else torch.empty(0, 0), [len(rows) for rows in found])

    def _one(self, work: Work) -> Tensor:
        stream, rows = work.stream, wanted(work)
        if not rows:  # a chunk of a prompt: it is computed with the last one
            return torch.empty(0, 0)
        held, cache = stream.state or (0, None)
        start = held if cache is not None and held == work.start == work.stop - 1 else 0
        ids = torch.tensor([stream.tokens[start : work.stop]], device=self.device)
        asked = {self.cache: cache if start else None, "use_cache": True} if self.cache else {"use_cache": False}
        with torch.no_grad():
            out = self.model(input_ids=ids, **asked)
        stream.state = (work.stop, getattr(out, self.cache)) if self.cache else None
        logits: Tensor = out.logits[0][[work.start - start + row for row in rows]]
        return logits

    def free(self) -> None:
        pass


def device_of(model: nn.Module) -> torch.device:
    return next(t.device for t in [*model.parameters(), *model.buffers()] if t.device.type != "meta")
