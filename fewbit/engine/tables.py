"""Where texts lie. Tables: pages as rows of one array on a GPU, of which only what changes is sent. Slots: of each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fewbit.engine.request import Stream
from fewbit.engine.transfer import sent


class Tables:
    def __init__(self, rows: int, width: int, device: torch.device):
        self.width = width
        self.pages = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self._free = list(range(rows))
        self._held: dict[Stream, tuple[int, list[int], int]] = {}  # row, the very list that was sent, how much of it

    def rows(self, streams: Sequence[Stream]) -> list[int]:
        """The row of each, its pages on their way."""
        self._forget(set(streams))
        places: list[int] = []
        values: list[int] = []
        found = [self._row(stream, places, values) for stream in streams]
        if places:
            device = self.pages.device
            self.pages.view(-1).index_copy_(0, sent(places, torch.int64, device), sent(values, torch.int32, device))
        return found

    def _row(self, stream: Stream, places: list[int], values: list[int]) -> int:
        row, pages, count = self._held.get(stream) or (self._free.pop(), stream.pages, 0)
        if pages is not stream.pages:  # taken back and begun again
            count = 0
        if count < len(stream.pages):
            places += range(row * self.width + count, row * self.width + len(stream.pages))
            values += stream.pages[count:]
            self._held[stream] = row, stream.pages, len(stream.pages)
        return row

    def _forget(self, streams: set[Stream]) -> None:
        for stream in [s for s in self._held if not s.pages and s not in streams]:
            self._free.append(self._held.pop(stream)[0])


class Slots:
    """Where the tokens of each text lie, as a tensor that is made anew when the text gets a page."""

    def __init__(self, size: int, device: torch.device):
        self._size, self._device = size, device
        self._held: dict[Stream, tuple[list[int], int, Tensor]] = {}  # the very list of pages, how many, slots

    def of(self, stream: Stream) -> Tensor:
        """[slots of its pages]"""
        pages, count, slots = self._held.get(stream, (None, 0, None))
        if slots is None or pages is not stream.pages or count != len(stream.pages):
            places = torch.arange(self._size, device=self._device)
            each = torch.tensor(stream.pages, device=self._device)[:, None] * self._size + places
            slots = each.flatten()
            self._held[stream] = stream.pages, len(stream.pages), slots
        return slots

    def forget(self) -> None:
        """Those that have no pages any more."""
        for stream in [s for s in self._held if not s.pages]:
            del self._held[stream]
