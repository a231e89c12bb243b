"""Hidden: the hidden states of many batches, in memory up to a budget, the rest in a file that has no name."""

import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import CapacityError
from fewbit.files.disk import bytes_of


class Hidden:
    """A list of tensors of fixed length; each may be replaced by one of the same shape or smaller."""

    def __init__(self, count: int, budget: int | None = None, folder: Path | None = None):
        self._held: list[Tensor | None] = [None] * count
        self._places: dict[int, tuple[int, torch.dtype, tuple[int, ...]]] = {}
        self._budget, self._folder = budget, folder
        self._file: Any = None
        self._end = 0

    def __len__(self) -> int:
        return len(self._held)

    @property
    def filled(self) -> bool:
        """True when every tensor has come; a model that runs whole has none."""
        return all(t is not None or i in self._places for i, t in enumerate(self._held))

    @property
    def in_memory(self) -> int:
        return sum(t.nbytes for t in self._held if t is not None)

    @property
    def spilled(self) -> int:
        return self._end

    def __setitem__(self, i: int, value: Tensor) -> None:
        value = value.detach()
        self._held[i] = None
        if i not in self._places and (self._budget is None or self.in_memory + value.nbytes <= self._budget):
            self._held[i] = value
        else:
            self._spill(i, value)

    def __getitem__(self, i: int) -> Tensor:
        held = self._held[i]
        if held is not None:
            return held
        start, dtype, shape = self._places[i]
        out = torch.empty(shape, dtype=dtype)
        view, done = bytes_of(out), 0
        while done < len(view):
            done += os.preadv(self._file.fileno(), [view[done:]], start + done)
        return out

    def _spill(self, i: int, value: Tensor) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
            weakref.finalize(self, self._file.close)
        start = self._places[i][0] if i in self._places else self._end
        view, done = bytes_of(value), 0
        try:
            while done < len(view):
                done += os.pwrite(self._file.fileno(), view[done:], start + done)
        except OSError as error:
            raise CapacityError(f"{self._folder}: cannot spill {len(view)} bytes of hidden states: {error}") from error
        self._places[i] = start, value.dtype, tuple(value.shape)
        self._end = max(self._end, start + len(view))
