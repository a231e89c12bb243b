"""CUDA graphs of decoding steps, one for each of some counts of streams: a step is one copy of numbers and one launch.

A graph reads everything from the same memory each time. Rows of no stream write to the slot that nobody reads, and
have texts of length 0. Tokens that the step before has drawn never leave the device: `fed` puts them in their places.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbit.engine.batch import Batch, Flight
from fewbit.engine.tables import Tables
from fewbit.modules.paged import Table

MOST = 256  # streams of the largest graph
IDS, SOURCES, POSITIONS, SLOTS, LENGTHS, ROWS = range(6)


def fed(ids: Tensor, sources: Tensor, tokens: Tensor) -> Tensor:
    """ids: [T]; where sources is not -1, that row of tokens instead."""
    return torch.where(sources >= 0, tokens.index_select(0, sources.clamp(min=0)), ids)


def sizes(most: int) -> list[int]:
    """Counts of streams that have a graph."""
    found = [n for n in (1, 2, 4, *range(8, MOST + 1, 8)) if n < most]
    return [*found, min(most, MOST)]


class Graphs:
    def __init__(self, tables: Tables, size: int, reach: int, dump: int, step: Callable[..., Any],
                 forward: Callable[..., Tensor]):  # fmt: skip
        """step: (slots=, table=) -> Step; forward: (step, ids, positions, None) -> logits [n, V]."""
        self._tables, self._size, self._reach, self._dump = tables, size, reach, dump
        self._step, self._forward = step, forward
        self.device = tables.pages.device
        self.sizes = sizes(len(tables.pages))
        self._numbers = torch.zeros(6, self.sizes[-1], dtype=torch.int32, device=self.device)
        self._last = torch.zeros(len(tables.pages), dtype=torch.int64, device=self.device)
        self._starts = torch.arange(self.sizes[-1] + 1, dtype=torch.int32, device=self.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.seconds = 0.0

    def capture(self, tell: Callable[[int, int], None]) -> None:
        """The largest first, so that the others find room in its memory."""
        begun, pool = time.monotonic(), torch.cuda.graph_pool_handle()
        self._send(np.zeros((6, 0), np.int32))
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for done, n in enumerate(reversed(self.sizes)):
                self._run(n)  # compiles what is compiled when first used
                torch.cuda.synchronize(self.device)
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    logits = self._run(n)
                finally:
                    graph.capture_end()
                self._graphs[n] = graph, logits
                tell(done + 1, len(self.sizes))
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.seconds = time.monotonic() - begun

    def _run(self, n: int) -> Tensor:
        held = self._numbers[:, :n]
        ids = fed(held[IDS].long(), held[SOURCES], self._last)
        table = Table(self._tables.pages.index_select(0, held[ROWS]), held[LENGTHS], self._starts[: n + 1], n, 1,
                      self._reach, self._size)  # fmt: skip
        return self._forward(self._step(slots=held[SLOTS].long(), table=table), ids, held[POSITIONS].long(), None)

    def takes(self, batch: Batch) -> bool:
        return batch.decodes and len(batch.works) <= self.sizes[-1]

    def run(self, batch: Batch, flight: Flight | None) -> Tensor:
        """-> [count, V], until the next call."""
        if batch.pending:
            assert flight is not None
            self._last[: len(flight.tokens)].copy_(flight.tokens)
        rows = self._tables.rows([work.stream for work in batch.works])
        lengths = [work.stop for work in batch.works]
        self._send(np.array([batch.ids, batch.sources, batch.positions, batch.slots, lengths, rows], np.int32))
        n = next(n for n in self.sizes if n >= len(rows))
        graph, logits = self._graphs[n]
        graph.replay()
        return logits[: len(rows)]

    def _send(self, numbers: np.ndarray) -> None:
        held = np.zeros(tuple(self._numbers.shape), np.int32)
        held[SOURCES], held[SLOTS] = -1, self._dump
        held[:, : numbers.shape[1]] = numbers
        self._numbers.copy_(torch.from_numpy(held).pin_memory(), non_blocking=True)
