"""One rank's part of a tensor: dense, or quantized with everything that lies beside it. The whole is not kept alive."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from fewbit.errors import UnsupportedError
from fewbit.models.shard_values import Cut, Runs
from fewbit.quant.qtensor import Planes, QTensor, Quantized, Transform, slice
from fewbit.quant.spec import FLAT, Scale


def dense(x: Tensor, axis: int, runs: Runs) -> Tensor:
    """Runs of an axis, in the order given."""
    if len(runs) == 1 and x.shape[axis] == runs[0][1] - runs[0][0]:
        return x
    found = [x.narrow(axis, start, stop - start) for start, stop in runs]
    return torch.cat(found, axis) if len(found) > 1 else found[0].clone(memory_format=torch.contiguous_format)


def take(parts: Sequence[Quantized], cut: Cut) -> tuple[Quantized, ...]:
    """parts: along N -> those of one rank."""
    if cut.kind == "rows":
        return rows(parts, cut.runs)
    ((start, stop),) = cut.runs
    if cut.kind == "experts":
        return tuple(experts(q, start, stop) for q in parts)
    return tuple(columns(q, start, stop, cut.whole) for q in parts)


def rows(parts: Sequence[Quantized], runs: Runs) -> tuple[Quantized, ...]:
    pieces: list[tuple[int, int, int]] = []
    for start, stop in runs:
        at = 0
        for i, q in enumerate(parts):
            n = q.weight.shape[-2]
            first, last = max(start, at) - at, min(stop, at + n) - at
            if first < last:
                pieces.append((i, first, last))
            at += n
    return tuple(rows_of(parts[i], [(a, b) for _, a, b in held]) for i, held in groupby(pieces, lambda p: p[0]))


def rows_of(q: Quantized, runs: Sequence[tuple[int, int]]) -> Quantized:
    if list(runs) == [(0, q.weight.shape[-2])]:
        return q
    weight = joined([slice(q.weight, -2, start, stop) for start, stop in runs])
    moved = [Transform(t.kind, {"a": t.tensors["a"], "b": dense(t.tensors["b"], -2, tuple(runs))})
             if t.kind == "low_rank" else t for t in q.transforms]  # fmt: skip
    return replace(q, weight=weight, transforms=tuple(moved))


def joined(held: Sequence[QTensor]) -> QTensor:
    """QTensors of one spec and K, one under the other; each but the last ends on block edges."""
    spec, first = held[0].spec, held[0]
    planes = {"codes": torch.cat([q.planes["codes"] for q in held], -2)}
    for stem, chain in (("scale", spec.scales), ("zero", spec.zeros)):
        for i, scale in enumerate(chain):
            planes[f"{stem}{i}"] = under([q.planes[f"{stem}{i}"] for q in held], scale)
    return QTensor(spec, (*first.shape[:-2], sum(q.shape[-2] for q in held), first.shape[-1]), planes)


def under(planes: Sequence[Tensor], scale: Scale) -> Tensor:
    """Planes of row blocks that follow one another."""
    if scale.block[0] == 0:
        return planes[0].clone()
    return torch.cat(list(planes), -1 if scale.block[0] == FLAT else -2)


def columns(q: Quantized, start: int, stop: int, whole: bool) -> Quantized:
    """whole: the input comes whole, and the permutation picks what is wanted."""
    permuted = any(t.kind == "permute" for t in q.transforms)
    if permuted != whole:
        raise UnsupportedError("the order of its columns is not what the headers said: it cannot be cut by columns")
    if any(plane.numel() > max(1, q.weight.shape[0] if plane.dim() > 2 else 1) for plane in q.act.values()):
        raise UnsupportedError("its input has several static scales: it cannot be cut by columns")
    kinds: list[Transform] = []
    for t in q.transforms:
        full = whole and not any(k.kind == "permute" for k in kinds) and t.kind != "permute"
        kinds.append(t if full else column_transform(t, start, stop))
    weight = owned(slice(q.weight, -1, start, stop))
    return replace(q, weight=weight, transforms=tuple(kinds))


def column_transform(t: Transform, start: int, stop: int) -> Transform:
    names = {"permute": "index", "input_scale": "scale"}
    if t.kind not in names:
        raise UnsupportedError(f"a {t.kind} beside the codes mixes columns: it cannot be cut by columns")
    return Transform(t.kind, {name: dense(value, -1, ((start, stop),)) for name, value in t.tensors.items()})


def experts(q: Quantized, start: int, stop: int) -> Quantized:
    def some(planes: Planes) -> Planes:
        return {name: plane[start:stop].clone() for name, plane in planes.items()}

    transforms = tuple(Transform(t.kind, some(t.tensors)) for t in q.transforms)
    return replace(q, weight=owned(slice(q.weight, -3, start, stop)), act=some(q.act), transforms=transforms)


def owned(q: QTensor) -> QTensor:
    """With memory of its own."""
    return QTensor(q.spec, q.shape, {name: plane.clone() for name, plane in q.planes.items()})
