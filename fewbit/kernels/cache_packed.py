"""A cache of any format whose scales are chosen row by row: codes and scales packed as a QTensor has them.

Read and written by quant.reference alone, so it saves memory and no time; no attention kernel takes it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.kernels.cache import Cache, Rounding, held_as
from fewbit.quant.qtensor import Planes, QTensor, empty
from fewbit.quant.reference import assign, choose, decode
from fewbit.quant.spec import QuantSpec


@dataclass(slots=True)
class PackedCache:
    """Planes of keys and of values, [slots, G, n] each; sizes: numbers of a key and of a value."""

    spec: QuantSpec
    sizes: tuple[int, int]
    planes: tuple[Planes, Planes]

    @classmethod
    def like(cls, slots: int, key: Tensor, value: Tensor, spec: QuantSpec) -> "PackedCache":
        """Room for so many tokens of these: [1, G, T, D]."""
        made = []
        for t in (key, value):
            held = empty(spec, (slots * t.shape[1], t.shape[3]), t.device).planes
            made.append({name: plane.view(slots, t.shape[1], -1) for name, plane in held.items()})
        return cls(spec, (key.shape[3], value.shape[3]), (made[0], made[1]))

    @property
    def slot_bytes(self) -> int:
        return sum(plane.nbytes // len(plane) for held in self.planes for plane in held.values())

    @property
    def rounds(self) -> bool:
        return True

    def write(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """key, value: [1, G, T, D]; slots: [T]."""
        for held, given in zip(self.planes, (key, value), strict=True):
            rows = given[0].transpose(0, 1)  # [T, G, D]
            flat = rows.reshape(-1, rows.shape[-1]).float()
            found = assign(flat, self.spec, choose(flat, self.spec, {}))
            for name, plane in found.planes.items():
                held[name][slots] = plane.view(*rows.shape[:2], -1)

    def read(self, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """-> [1, G, length, D] of each."""
        found = [self._read(held, size, slots).to(dtype) for held, size in zip(self.planes, self.sizes, strict=True)]
        return found[0], found[1]

    def _read(self, held: Planes, size: int, slots: Tensor) -> Tensor:
        rows = {name: plane.index_select(0, slots) for name, plane in held.items()}
        shape = *rows["codes"].shape[:2], size
        flat = QTensor(self.spec, (shape[0] * shape[1], size), {n: plane.flatten(0, 1) for n, plane in rows.items()})
        return decode(flat).view(shape).transpose(0, 1)[None]


def room(slots: int, key: Tensor, value: Tensor, dtype: torch.dtype | None, kv: Rounding | None) -> Cache | PackedCache:
    """The cache of a layer whose keys and values are rounded so; dtype: where they are held as values, None: theirs."""
    how = held_as(kv[0], key.device) if kv is not None else ""
    if kv is not None and how == "packed":
        return PackedCache.like(slots, key, value, kv[0])
    return Cache.like(slots, key, value, dtype, kv if how == "codes" else None, kv is not None)
