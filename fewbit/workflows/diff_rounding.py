"""What formats explain of the difference of two modules: the error that rounding one's weight to the other's format
would make, by the format's own rule, and that of rounding the input where only one of them does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fewbit.errors import FewbitError, SpecError, UnsupportedError
from fewbit.kernels.torch_dequant import expert
from fewbit.modules.experts import ATTRIBUTE
from fewbit.quant.qtensor import Quantized, Transform, slice
from fewbit.quant.recast import recast
from fewbit.quant.reference import decode, encode, fake_quant, transformed
from fewbit.quant.spec import QuantSpec
from fewbit.workflows.refit import effective

ROWS = 16384  # of a larger matrix, so many are looked at
RUN = 128  # in runs of so many


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [N, K]: quantized parts along N, or dense."""

    parts: tuple[Quantized, ...] = ()
    dense: Tensor | None = None

    @property
    def rows(self) -> int:
        return sum(q.weight.shape[-2] for q in self.parts) if self.dense is None else self.dense.shape[0]

    def values(self, start: int, stop: int) -> Tensor:
        """Rows as float32, transforms folded in."""
        if self.dense is not None:
            return self.dense[start:stop].float()
        out, at = [], 0
        for q in self.parts:
            n = q.weight.shape[-2]
            first, last = max(start - at, 0), min(stop - at, n)
            if first < last:
                out.append(effective(cut(q, first, last)))
            at += n
        return torch.cat(out)

    def runs(self, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
        """The rows that are looked at: all, or runs spread evenly."""
        stop = self.rows if stop is None else stop
        count = stop - start
        if count <= ROWS:
            return [(start, stop)]
        step = count / (ROWS // RUN)
        firsts = [int(i * step) // RUN * RUN for i in range(ROWS // RUN)]
        return [(start + first, start + first + RUN) for first in firsts]


def cut(q: Quantized, start: int, stop: int) -> Quantized:
    """Rows of a module."""
    if (start, stop) == (0, q.weight.shape[-2]):
        return q
    transforms = tuple(
        Transform(t.kind, t.tensors | {"b": t.tensors["b"][start:stop]}) if t.kind == "low_rank" else t
        for t in q.transforms
    )
    return Quantized(q.format, slice(q.weight, -2, start, stop), q.act, transforms)


def matrix(module: nn.Module, projection: str = "", e: int = 0) -> Matrix:
    """The weight of a Linear, or of one expert's projection."""
    if not projection:
        parts = module.parts
        return Matrix(tuple(p.quantized for p in parts)) if parts else Matrix(dense=module.weight)
    ours = getattr(module, ATTRIBUTE, None)
    if ours is not None and projection in ours.parts:
        return Matrix(tuple(expert(p.quantized, e) for p in ours.parts[projection]))
    held = getattr(module, projection)[e]
    return Matrix(dense=held.mT if module.is_transposed else held)


@dataclass(frozen=True, slots=True)
class Rounding:
    """Rounding some rows of a weight to a format: delta is what it does to them, [n, K]; act, to their input."""

    rows: Tensor
    span: tuple[int, int]  # the rows that they stand for
    delta: Tensor
    weight: Tensor
    act: QuantSpec | None
    transforms: tuple[Transform, ...]
    before: Tensor | None = None  # what brings an input, and an output, into the scaling of this format's model
    after: Tensor | None = None

    def error(self, x: Tensor) -> Tensor:
        """-> [..., n]"""
        y = self._error(x if self.before is None else x * self.before.to(x.dtype))
        return y if self.after is None else y / self.after.to(y.dtype)

    def _error(self, x: Tensor) -> Tensor:
        x = transformed(x, self.transforms)
        if self.act is None:
            return linear(x, self.delta)
        rounded = fake_quant(x, self.act)
        return linear(rounded, self.delta) + linear(rounded - x, self.weight)


def roundings(a: Matrix, b: Matrix, dtype: torch.dtype) -> list[Rounding] | None:
    """What stands between two weights if each is what its format makes of the other; None: a format cannot be encoded.

    Codes that carry over leave nothing to explain but the rounding of their scales.
    """
    carried = [recasted(a, b), recasted(b, a)]
    alike = acts(a) == acts(b)
    out = []
    try:
        for (of, to), fits, back in zip(((a, b), (b, a)), carried, reversed(carried), strict=True):
            if fits is None and back is not None:
                fits = [q.weight for q in to.parts]  # explained by the other direction alone
            out += list(_roundings(of, to, fits, alike, dtype))
    except (UnsupportedError, SpecError):
        return None
    return out


def _roundings(of: Matrix, to: Matrix, fits: list[Any] | None, alike: bool, dtype: torch.dtype) -> Iterator[Rounding]:
    start = 0
    for i, q in enumerate(to.parts):
        stop = start + q.weight.shape[-2]
        runs = to.runs(start, stop)
        values = torch.cat([of.values(*run) for run in runs])
        weight = stored(values, q.transforms, [(a - start, b - start) for a, b in runs])
        if fits is None:
            delta = decode(encode(weight, q.weight.spec)) - weight
        elif fits[i] is q.weight:
            delta = torch.zeros_like(weight)
        else:
            old, new = of.parts[i].weight, fits[i]
            both = [torch.cat([decode(slice(w, -2, a - start, b - start)) for a, b in runs]) for w in (old, new)]
            delta = both[1] - both[0]
        index = torch.cat([torch.arange(*run) for run in runs]).to(weight.device)
        yield Rounding(
            index, (start, stop), delta.to(dtype), weight.to(dtype), None if alike else q.format.act, q.transforms
        )
        start = stop


def recasted(a: Matrix, b: Matrix) -> list[Any] | None:
    """a's codes in b's formats, where they carry over."""
    shapes = [[q.weight.shape for q in m.parts] for m in (a, b)]
    kinds = [[[t.kind for t in q.transforms] for q in m.parts] for m in (a, b)]
    if not a.parts or shapes[0] != shapes[1] or kinds[0] != kinds[1]:
        return None
    try:
        return [recast(p.weight, q.weight.spec) for p, q in zip(a.parts, b.parts, strict=True)]
    except FewbitError:
        return None


def acts(m: Matrix) -> set[QuantSpec | None]:
    return {q.format.act.stored if q.format.act else None for q in m.parts} or {None}


def stored(w: Tensor, transforms: tuple[Transform, ...], runs: list[tuple[int, int]]) -> Tensor:
    """The inverse of `effective`: rows of an effective weight as they lie beside these transforms."""
    for transform in transforms:
        t = transform.tensors
        if transform.kind == "permute":
            w = w.index_select(-1, t["index"].long())
        elif transform.kind == "input_scale":
            w = w / t["scale"].float()
        elif transform.kind == "rotate":
            inverse = torch.linalg.inv(t["matrix"].float().T)
            w = (w.unflatten(-1, (-1, inverse.shape[0])) @ inverse).flatten(-2)
        elif transform.kind == "low_rank":
            w = w - torch.cat([t["b"][a:b] for a, b in runs]).float() @ t["a"].float()
    return w


def apart(a: Matrix, b: Matrix) -> tuple[float, float]:
    """Squared norms of b - a and of a."""
    gap = norm = 0.0
    for run in a.runs():
        mine = a.values(*run)
        gap += float((b.values(*run) - mine).double().square().sum())
        norm += float(mine.double().square().sum())
    return gap, norm
