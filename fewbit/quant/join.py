"""join: quantized tensors that read the same input, one below the other along N, every value what it was."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fewbit.errors import SpecError
from fewbit.quant.qtensor import Planes, QTensor, Quantized
from fewbit.quant.spec import Format, Scale, describe


def join(parts: Sequence[Quantized]) -> Quantized:
    """Equal formats, and what stands beside the weight equal too; SpecError says what is not."""
    first = parts[0]
    for part in parts[1:]:
        if _act(part.format) != _act(first.format) or not _same(part.act, first.act):
            raise SpecError("their inputs are rounded in different ways")
        if [t.kind for t in part.transforms] != [t.kind for t in first.transforms]:
            raise SpecError("they have different transforms")
        if not all(_same(a.tensors, b.tensors) for a, b in zip(part.transforms, first.transforms, strict=True)):
            raise SpecError("their transforms have different values")
    if any(t.kind == "low_rank" for t in first.transforms):
        raise SpecError("each has a low-rank branch of its own")
    weight = join_weights([part.weight for part in parts])
    return Quantized(replace(first.format, weight=weight.spec), weight, first.act, first.transforms)


def join_weights(parts: Sequence[QTensor]) -> QTensor:
    """A plane with one value for its whole tensor stays so where all agree, else each row gets its tensor's value."""
    first = parts[0]
    for part in parts[1:]:
        if part.spec.stored != first.spec.stored:
            raise SpecError(f"{describe(part.spec)} beside {describe(first.spec)}")
        if part.shape[-1] != first.shape[-1]:
            raise SpecError(f"{part.shape[-1]} columns beside {first.shape[-1]}")
    planes = {"codes": torch.cat([p.planes["codes"] for p in parts], -2)}
    chains: dict[str, list[Scale]] = {"scale": [], "zero": []}
    for stem, chain in (("scale", first.spec.scales), ("zero", first.spec.zeros)):
        for i, scale in enumerate(chain):
            planes[f"{stem}{i}"], block = _plane(parts, f"{stem}{i}", scale)
            chains[stem].append(replace(scale, block=block))
    spec = replace(first.spec, scales=tuple(chains["scale"]), zeros=tuple(chains["zero"]))
    return QTensor(spec, (sum(p.shape[-2] for p in parts), first.shape[-1]), planes)


def _plane(parts: Sequence[QTensor], name: str, scale: Scale) -> tuple[Tensor, tuple[int, int]]:
    rows, _ = scale.block
    planes = [part.planes[name] for part in parts]
    if rows > 0:
        if any(part.shape[-2] % rows for part in parts[:-1]):
            raise SpecError(f"{name} shares a value over {rows} rows, and they meet within such a run")
        return torch.cat(planes, -2), scale.block
    if rows == 0 and all(torch.equal(plane, planes[0]) for plane in planes):
        return planes[0], scale.block
    if scale.block != (0, 0):
        raise SpecError(f"{name} shares values over rows of the whole tensor, and they differ")
    each = [plane.expand(part.shape[-2], -1) for plane, part in zip(planes, parts, strict=True)]
    return torch.cat(each, -2), (1, 0)


def _act(format: Format) -> object:
    return format.act.stored if format.act else None


def _same(a: Planes, b: Planes) -> bool:
    return a.keys() == b.keys() and all(torch.equal(plane, b[name]) for name, plane in a.items())
