"""Keys and values of one layer, by slot, and the plain way to write and read them: the oracle of triton_cache.

A cache may be narrower than the model. Floats are cast, those of 8 bits after clamping: a cast alone makes NaN of what
e4m3 cannot hold. int8 has a scale per token and head beside its codes, the largest magnitude / 127.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
CODES = 127  # largest code of int8


@dataclass(slots=True)
class Cache:
    """[slots, G, D] each, and of int8 its scales: [slots, G] float32."""

    key: Tensor
    value: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    @classmethod
    def like(cls, slots: int, key: Tensor, value: Tensor, dtype: torch.dtype | None) -> "Cache":
        """Room for so many tokens of these: [1, G, T, D]."""
        rooms = [torch.empty(slots, t.shape[1], t.shape[3], dtype=dtype or t.dtype, device=t.device)
                 for t in (key, value)]  # fmt: skip
        if dtype != torch.int8:
            return cls(*rooms)
        return cls(*rooms, *(torch.empty(room.shape[:2], dtype=torch.float32, device=room.device) for room in rooms))

    @property
    def slot_bytes(self) -> int:
        return sum(t.nbytes // len(t) for pair in self._planes() for t in pair if t is not None)

    def write(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """key, value: [1, G, T, D]; slots: [T]."""
        for (plane, scales), given in zip(self._planes(), (key, value), strict=True):
            rows = given[0].transpose(0, 1)
            if scales is None:
                plane[slots] = narrowed(rows, plane.dtype)
            else:
                plane[slots], scales[slots] = coded(rows)

    def read(self, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """-> [1, G, length, D] of each."""
        return tuple(_read(*pair, slots, dtype).transpose(0, 1)[None] for pair in self._planes())  # type: ignore[return-value]

    def _planes(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        yield self.key, self.key_scale
        yield self.value, self.value_scale


def narrowed(rows: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype in FP8:
        most = torch.finfo(dtype).max
        rows = rows.clamp(-most, most)
    return rows.to(dtype)


def coded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] -> int8 [..., D] and float32 [...]."""
    wide = rows.float()
    scale = wide.abs().amax(-1) / wide.new_tensor(CODES)  # CUDA multiplies by 1 / a number
    return (wide / scale.where(scale > 0, 1.0)[..., None]).round().to(torch.int8), scale


def _read(plane: Tensor, scales: Tensor | None, slots: Tensor, dtype: torch.dtype) -> Tensor:
    codes = plane.index_select(0, slots)
    if scales is None:
        return codes.to(dtype)
    return (codes.float() * scales.index_select(0, slots)[..., None]).to(dtype)
