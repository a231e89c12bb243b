"""Tapes of decoding steps on a CPU, one for each of some counts of streams: a step without the model's Python.

A tape is recorded in the second step of its size, so that nothing is on it that is done once, and must then give the
bits of the model itself in the next ones before it stands for it. Rows of no stream write to the slot that nobody
reads, and read it.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewbit.engine.batch import Batch
from fewbit.engine.tables import Slots
from fewbit.engine.tape import Tape
from fewbit.errors import FewbitError
from fewbit.kernels import saturation
from fewbit.kernels.attend import Queries
from fewbit.models.twin import first_line

LOG = logging.getLogger(__name__)
SIZES = (1, 2, 4, 8, 16)  # counts of streams that have a tape
PROOFS = 2  # steps in which a tape must give what the model gives
IDS, POSITIONS, SLOTS, PLACES, LENGTHS = range(5)


class Tapes:
    def __init__(self, slots: Slots, dump: int, step: Callable[..., Any], forward: Callable[..., Tensor]):
        """step: (slots=, queries=) -> Step; forward: (step, ids, positions, None) -> logits."""
        self._step, self._forward, self._slots = step, forward, slots
        self._dump = torch.tensor([dump])
        self._tapes: dict[int, One] = {}
        self._met: set[int] = set()
        self._refused: set[int] = set()

    def takes(self, batch: Batch) -> bool:
        return batch.decodes and len(batch.works) <= SIZES[-1] and not batch.pending

    def run(self, batch: Batch, plainly: Callable[[], Tensor]) -> Tensor:
        """-> [count, V], until the next call. plainly: the same by the model itself."""
        count = len(batch.works)
        n = next(n for n in SIZES if n >= count)
        if n in self._refused or n not in self._met:
            self._met.add(n)
            return plainly()
        try:
            return self._run(n, batch, plainly)
        except (FewbitError, RuntimeError) as error:  # the model itself has the last word on both
            self._leave(n, first_line(error))
            return plainly()

    def _run(self, n: int, batch: Batch, plainly: Callable[[], Tensor]) -> Tensor:
        count, one = len(batch.works), self._tapes.get(n) or One(n)
        self._send(one, batch)
        if n not in self._tapes:
            one.record(self._step, self._forward)
            self._tapes[n] = one
        elif one.proofs < PROOFS:
            wanted = plainly().clone()
            with saturation.uncounted(wanted.device):
                one.tape.replay()
            if not same(one.logits[:count], wanted):
                self._leave(n, "its logits were not the model's")
                return wanted
            one.proofs += 1
        else:
            one.tape.replay()
        return one.logits[:count]

    def _send(self, one: "One", batch: Batch) -> None:
        texts = [self._slots.of(work.stream) for work in batch.works]
        self._slots.forget()
        extra = one.n - len(texts)
        dump = int(self._dump)
        one.numbers.copy_(torch.tensor([
            batch.ids + [0] * extra, batch.positions + [0] * extra, batch.slots + [dump] * extra,
            [text.data_ptr() for text in texts] + [self._dump.data_ptr()] * extra,
            [work.stop for work in batch.works] + [1] * extra,
        ]))  # fmt: skip

    def _leave(self, n: int, why: str) -> None:
        self._refused.add(n)
        self._tapes.pop(n, None)
        LOG.info("steps of %d streams run without a tape: %s", n, why)


class One:
    """Of steps of n rows."""

    def __init__(self, n: int):
        self.n, self.tape, self.proofs = n, Tape(), 0
        self.numbers = torch.zeros(5, n, dtype=torch.int64)
        self.queries = Queries(torch.arange(n), self.numbers[PLACES], self.numbers[LENGTHS], [])
        self.logits = torch.empty(0)

    def record(self, step: Callable[..., Any], forward: Callable[..., Tensor]) -> None:
        held = self.numbers
        with self.tape.recording():
            self.logits = forward(step(slots=held[SLOTS], queries=self.queries), held[IDS], held[POSITIONS], None)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
