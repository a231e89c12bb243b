"""CUDA graphs of steps: of single tokens for some counts of streams, with prompts among them for some counts of rows.

A step is one copy of numbers and one launch. A graph reads everything from the same memory each time. Rows of no
stream write to the slot that nobody reads, and streams that are not there have texts of length 0. Tokens that the step
before has drawn never leave the device: they lie before those that were sent, and `sources` says which are read.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbit.engine.batch import Batch, Flight
from fewbit.engine.tables import Tables
from fewbit.kernels.table import BLOCK, Table

STREAMS = (1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, 513, 32), *range(576, 1025, 64))
ROWS = (16, 32, 64, *range(128, 1281, 128), 1536, 1792, 2048)  # of graphs with prompts; beyond, launching is hidden
PROMPTS = 16  # blocks of rows that a graph has room for beyond those that are full: about so many prompts
NUMPY = {torch.int16: "<i2", torch.int32: "<i4"}


def sizes(most: int) -> list[int]:
    """Counts of streams that have a graph of single tokens."""
    return [*(n for n in STREAMS if n < most), min(most, STREAMS[-1])]


@dataclass(frozen=True, slots=True)
class Size:
    """What a graph has room for. blocks: of prompts' rows; 0: each stream has one row, and its logits are wanted."""

    rows: int
    streams: int
    blocks: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """How many numbers of each kind it is sent."""
        by_row = dict.fromkeys(("ids", "sources", "positions", "slots"), self.rows)  # ids first: they follow others
        by_stream = {"lengths": self.streams, "tables": self.streams, "starts": self.streams + 1}
        return by_row | by_stream | ({"asked": self.streams, "blocks": 2 * self.blocks} if self.blocks else {})

    def packed(self, given: Mapping[str, Sequence[int]], absent: Mapping[str, int]) -> np.ndarray:
        """All of them in one row. absent: what stands for rows and streams that are not there, where that is not 0."""
        if not self.blocks:  # streams that are not there have a row too, which attention makes 0
            given = {**given, "starts": range(self.streams + 1)}
        each = []
        for name, count in self.counts.items():
            numbers = np.full(count, absent.get(name, 0), np.int32)
            numbers[: len(given[name])] = given[name]
            each.append(numbers)
        return np.concatenate(each)


class Graphs:
    def __init__(self, tables: Tables, size: int, reach: int, dump: int, step: Callable[..., Any],
                 forward: Callable[..., Tensor], budget: int):  # fmt: skip
        """step: (slots=, table=) -> Step; forward: (step, ids, positions, rows to keep or None) -> logits [n, V].

        budget: most tokens of a step with prompts; 0: steps of single tokens alone are recorded.
        """
        self._tables, self._size, self._reach, self._dump = tables, size, reach, dump
        self._step, self._forward = step, forward
        self.device = tables.pages.device
        streams = sizes(len(tables.pages))
        self.sizes = [Size(n, n) for n in streams]
        rows = ROWS[: bisect_left(ROWS, budget) + 1] if budget else ()
        self.sizes += [Size(n, min(n, streams[-1]), n // BLOCK + PROMPTS) for n in rows]
        most = max(sum(size.counts.values()) for size in self.sizes)
        self._held = torch.zeros(len(tables.pages) + most, dtype=torch.int32, device=self.device)
        self._last, self._numbers = self._held.split([len(tables.pages), most])
        self._graphs: dict[Size, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.seconds = 0.0

    def capture(self, tell: Callable[[int, int], None]) -> None:
        """The largest first, so that the others find room in its memory."""
        begun, pool = time.monotonic(), torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for done, size in enumerate(reversed(self.sizes)):
                self._send(size, dict.fromkeys(size.counts, ()), 0)
                self._run(size)  # compiles what is compiled when first used
                torch.cuda.synchronize(self.device)
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    logits = self._run(size)
                finally:
                    graph.capture_end()
                self._graphs[size] = graph, lent(logits)
                tell(done + 1, len(self.sizes))
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.seconds = time.monotonic() - begun

    def _run(self, size: Size) -> Tensor:
        counts = size.counts
        parts = self._numbers[: sum(counts.values())].split(list(counts.values()))
        held = dict(zip(counts, parts, strict=True))
        ids = self._held[: len(self._last) + size.rows].index_select(0, held["sources"])
        blocks = held["blocks"].view(-1, 2) if size.blocks else None
        table = Table(self._tables.pages.index_select(0, held["tables"]), held["lengths"], held["starts"],
                      size.streams, size.rows if size.blocks else 1, self._reach, self._size, blocks)  # fmt: skip
        keep = held["asked"].long() if size.blocks else None
        step = self._step(slots=held["slots"], table=table)
        return self._forward(step, ids, held["positions"].long(), keep).contiguous()

    def size(self, batch: Batch) -> Size | None:
        """The smallest that takes it."""
        decodes, rows, blocks = batch.decodes, len(batch.ids), len(batch.blocks)
        streams = max(len(batch.works), len(batch.asked))
        fitting = (size for size in self.sizes if rows <= size.rows and streams <= size.streams)
        return next((size for size in fitting if (blocks <= size.blocks if size.blocks else decodes)), None)

    def run(self, size: Size, batch: Batch, flight: Flight | None) -> Tensor:
        """-> [wanted, V], until the next call."""
        if batch.pending:
            assert flight is not None
            self._last[: len(flight.tokens)].copy_(flight.tokens)
        self._send_batch(size, batch)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[: len(batch.asked)]

    def _send_batch(self, size: Size, batch: Batch) -> None:
        tables = self._tables.rows([work.stream for work in batch.works])
        own = range(len(self._last), len(self._last) + len(batch.ids))
        sources = [at if row < 0 else row for at, row in zip(own, batch.sources, strict=True)]
        given = {"ids": batch.ids, "sources": sources, "positions": batch.positions, "slots": batch.slots,
                 "lengths": [work.stop for work in batch.works], "starts": batch.starts, "asked": batch.asked,
                 "tables": tables, "blocks": [number for block in batch.blocks for number in block]}  # fmt: skip
        self._send(size, given, len(batch.ids))

    def _send(self, size: Size, given: Mapping[str, Sequence[int]], rows: int) -> None:
        held = size.packed(given, {"slots": self._dump, "starts": rows, "blocks": -1})
        numbers = torch.from_numpy(held)
        numbers = numbers.pin_memory() if self.device.type == "cuda" else numbers
        self._numbers[: len(held)].copy_(numbers, non_blocking=True)


class Lent:
    """Memory of a tensor that is not kept, as numpy's and torch's interface for arrays tells of it."""

    def __init__(self, tensor: Tensor, kind: str):
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape), "typestr": kind, "data": (tensor.data_ptr(), False), "version": 3,
        }  # fmt: skip


def lent(logits: Tensor) -> Tensor:
    """The same memory, which later graphs may write to in between: logits of many graphs are gigabytes otherwise."""
    whole = logits.view({2: torch.int16, 4: torch.int32}[logits.element_size()])
    return torch.as_tensor(Lent(whole, NUMPY[whole.dtype]), device=logits.device).view(logits.dtype)
