"""Keys and values of one layer, by slot, and the plain way to write and read them: the oracle of triton_cache.

What is narrower than the model is held as codes of a byte each under float32 scales: one for each slot and head, the
largest magnitude / what a code reaches; or one for each head, measured beforehand, beyond which values are cut off and
counted. Other formats are held by cache_packed, or rounded before they come here.

A value that is the first numbers of its key, as in latent attention, is held there and nowhere else.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache as once

import torch
from torch import Tensor

from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.kernels import saturation
from fewbit.quant.elements import E4M3, E4M3_240, E5M2, INT8, Element
from fewbit.quant.kv import whole
from fewbit.quant.qtensor import Planes
from fewbit.quant.spec import QuantSpec

Rounding = tuple[QuantSpec, Planes, Planes]  # what keys and values are rounded to, and the measured scales of each
HELD = {E4M3: torch.float8_e4m3fn, E4M3_240: torch.float8_e4m3fn, E5M2: torch.float8_e5m2, INT8: torch.int8}
E4M3_SINCE = (8, 9)  # compute capability of an NVIDIA GPU that converts e4m3


def held_as(spec: QuantSpec, device: torch.device) -> str:
    """codes, packed: as the format says; or emulated: values rounded to it, held in the model's type."""
    if whole(spec):
        e4m3 = HELD[spec.element] == torch.float8_e4m3fn
        return "emulated" if e4m3 and device.type == "cuda" and _capability(device) < E4M3_SINCE else "codes"
    rows = all(scale.block[0] == 1 for scale in (*spec.scales, *spec.zeros) if scale.dynamic)
    measured = any(not scale.dynamic for scale in (*spec.scales, *spec.zeros))
    return "packed" if device.type == "cpu" and rows and not measured else "emulated"


@dataclass(slots=True)
class Cache:
    """[slots, G, D] each, value perhaps within key. Of codes, scales [slots, G] chosen in writing, or [G] measured."""

    key: Tensor
    value: Tensor
    element: Element | None = None  # of the codes; None: the values themselves
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    key_measured: Tensor | None = None
    value_measured: Tensor | None = None
    ended: Tensor | None = None  # programs of texts in parts, as triton_attention_decode counts them; 0 between steps

    @classmethod
    def like(
        cls, slots: int, key: Tensor, value: Tensor, dtype: torch.dtype | None = None, coded: Rounding | None = None,
        apart: bool = False,
    ) -> "Cache":  # fmt: skip
        """Room for so many tokens of these: [1, G, T, D]. coded: what the codes are; see quant.kv.whole.

        apart: what is written is not what is given here, so that a value that lies in its key has a plane of its own.
        """
        held = dtype if coded is None else HELD[coded[0].element]
        if coded is None and not apart and begins(key, value):
            plane = torch.empty(slots, key.shape[1], key.shape[3], dtype=held or key.dtype, device=key.device)
            return cls(plane, plane[..., : value.shape[3]])
        planes = [torch.empty(slots, t.shape[1], t.shape[3], dtype=held or t.dtype, device=t.device)
                  for t in (key, value)]  # fmt: skip
        if coded is None:
            return cls(planes[0], planes[1])
        spec, *measured = coded
        if spec.dynamic:
            each = [torch.empty(plane.shape[:2], dtype=torch.float32, device=plane.device) for plane in planes]
            return cls(planes[0], planes[1], spec.element, each[0], each[1])
        each = [of_heads(given["scale0"], plane) for given, plane in zip(measured, planes, strict=True)]
        return cls(planes[0], planes[1], spec.element, None, None, each[0], each[1])

    @property
    def slot_bytes(self) -> int:
        return sum(t.nbytes // len(t) for plane, scales, _ in self._planes() for t in (plane, scales) if t is not None)

    @property
    def rounds(self) -> bool:
        """Whether what is written is rounded to the format here."""
        return self.element is not None

    @property
    def shared(self) -> bool:
        """Whether values are the first numbers of keys."""
        return self.value.data_ptr() == self.key.data_ptr()

    def fits(self, slots: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether there is a slot for each token and room for its heads: kernels trust that, `write` does not."""
        pairs, count = ((key, self.key), (value, self.value)), len(slots)
        there = all(t.shape == (1, plane.shape[1], count, plane.shape[2]) for t, plane in pairs)
        return there and (not self.shared or begins(key, value))

    def write(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """key, value: [1, G, T, D]; slots: [T]."""
        if self.shared and not begins(key, value):
            raise UnsupportedError("values of this cache are the first numbers of its keys, and others were given")
        for (plane, scales, measured), given in zip(self._planes(), (key, value), strict=False):
            rows = given[0].transpose(0, 1)
            if self.element is None:
                plane[slots] = rows.to(plane.dtype)
            elif scales is not None:
                plane[slots], scales[slots] = coded(rows, self.element)
            else:
                assert measured is not None
                wide = rows.float() / measured[:, None]
                cut = (wide > self.element.max) | (wide < self.element.min)
                saturation.count_of(rows.device).add_(cut.sum())
                plane[slots] = codes_of(wide, self.element)

    def read(self, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """-> [1, G, length, D] of each."""
        found = [_read(*planes, slots, dtype).transpose(0, 1)[None] for planes in self._planes()]
        return found[0], found[0][..., : self.value.shape[2]] if self.shared else found[1]

    def _planes(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        """Those that lie apart."""
        yield self.key, self.key_scale, self.key_measured
        if not self.shared:
            yield self.value, self.value_scale, self.value_measured


def begins(key: Tensor, value: Tensor) -> bool:
    """Whether value [1, G, T, Dv] is the first numbers of key [1, G, T, D], in the same memory."""
    same = value.data_ptr() == key.data_ptr() and value.stride() == key.stride() and value.dtype == key.dtype
    return same and value.shape[:3] == key.shape[:3] and value.shape[3] <= key.shape[3]


def of_heads(scale: Tensor, plane: Tensor) -> Tensor:
    """Measured scales, one or one for each head -> [G] beside a plane [slots, G, D]."""
    heads = plane.shape[1]
    if scale.numel() not in (1, heads):
        raise CheckpointError(
            f"{scale.numel()} scales of the KV cache, and a layer with {heads} heads: want 1 or {heads}"
        )
    return scale.flatten().to(plane.device, torch.float32).expand(heads).contiguous()


def coded(rows: Tensor, element: Element) -> tuple[Tensor, Tensor]:
    """[..., D] -> codes [..., D] and float32 scales [...]."""
    wide = rows.float()
    scale = wide.abs().amax(-1) / wide.new_tensor(element.max)  # CUDA multiplies by 1 / a number
    return codes_of(wide / scale.where(scale > 0, 1.0)[..., None], element), scale


def codes_of(wide: Tensor, element: Element) -> Tensor:
    """Values / scale -> codes; what a code cannot hold becomes the nearest. NaN stays NaN, or 0 where there is none."""
    held = HELD[element]
    wide = wide if held.is_floating_point else wide.round().nan_to_num()
    return wide.clamp(element.min, element.max).to(held)


def _read(plane: Tensor, scales: Tensor | None, measured: Tensor | None, slots: Tensor, dtype: torch.dtype) -> Tensor:
    codes = plane.index_select(0, slots)
    if scales is not None:
        return (codes.float() * scales.index_select(0, slots)[..., None]).to(dtype)
    return codes.to(dtype) if measured is None else (codes.float() * measured[:, None]).to(dtype)


@once
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
