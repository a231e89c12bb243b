"""recast: the same codes under another spec, as far as that is possible without choosing new ones.

Blocks may be cut finer (their value repeats), scales may change float type or become reciprocals, a symmetric integer
may be written with a constant zero. Everything else means new codes, and is refused.
"""

import torch
from torch import Tensor

from fewbit.errors import SpecError, UnsupportedError
from fewbit.quant import elements
from fewbit.quant.blocks import regrid
from fewbit.quant.elements import F32
from fewbit.quant.qtensor import Planes, QTensor, codes, grid, scale_codes, store
from fewbit.quant.reference import scale_values, zero_values
from fewbit.quant.spec import QuantSpec, Scale, describe


def recast(q: QTensor, spec: QuantSpec) -> QTensor:
    """q under another spec: its codes carry over, its scales within the rounding of their new type."""
    if q.spec.stored == spec.stored:
        return QTensor(spec, q.shape, q.planes)
    planes = {"codes": _codes(q, spec)}
    if len(q.spec.scales) != len(spec.scales):
        raise _no(q, spec, f"{len(q.spec.scales)} levels of scales against {len(spec.scales)}")
    for i, (old, new) in enumerate(zip(q.spec.scales, spec.scales, strict=True)):
        values = elements.decode(scale_codes(q, f"scale{i}"), old.element)
        planes[f"scale{i}"] = _plane(q, values, old, new, spec)
    return QTensor(spec, q.shape, planes | _zeros(q, spec))


def _no(q: QTensor, spec: QuantSpec, why: str) -> UnsupportedError:
    return UnsupportedError(f"the codes of {describe(q.spec)} do not carry over to {describe(spec)}", [why])


def _codes(q: QTensor, spec: QuantSpec) -> Tensor:
    old, new = q.spec.element, spec.element
    if old == new:
        return q.planes["codes"]
    if old.kind == new.kind == "int" and old.bits == new.bits:
        return store(codes(q) ^ (1 << (int(old.bits) - 1)), new)  # offset binary and two's complement: one bit apart
    raise _no(q, spec, f"{old.name} codes mean something else as {new.name}")


def _plane(q: QTensor, values: Tensor, old: Scale, new: Scale, spec: QuantSpec) -> Tensor:
    if (old.op == "add") != (new.op == "add"):
        raise _no(q, spec, f"a scale that is {old.op} cannot become {new.op}")
    if old.op != new.op:
        values = 1 / values
    finer = _regrid(q, values, old, new, spec)
    return store(elements.encode(finer, new.element), new.element)


def _regrid(q: QTensor, values: Tensor, old: Scale, new: Scale, spec: QuantSpec) -> Tensor:
    if old.block == new.block:
        return values
    block = tuple(0 if b in (0, size) else b for b, size in zip(old.block, q.shape[-2:], strict=True))
    shape = [*q.shape[:-2], *grid(q.shape, new.block)]
    try:
        return regrid(values, q.shape, (block[0], block[1]), new.block).expand(shape)
    except SpecError as error:
        raise _no(q, spec, f"a scale shared by {old.block} is not a whole number of blocks of {new.block}") from error


def _zeros(q: QTensor, spec: QuantSpec) -> Planes:
    if not q.spec.zeros and not spec.zeros:
        return {}
    middle = 2.0 ** (q.spec.element.bits - 1)
    signed_to_plain = q.spec.element.signed and not spec.element.signed
    zero = zero_values(q)
    if zero is None:
        assert signed_to_plain
        zero = torch.full((1, 1), middle).expand(*q.shape[:-2], *grid(q.shape, q.spec.scales[0].block))
        held = Scale(F32, q.spec.scales[0].block)
    else:
        held = q.spec.zeros[0]
    if not spec.zeros:
        if not q.spec.zeros_in_codes or bool((zero != middle).any()):
            raise _no(q, spec, "its zeros are not all at the middle, and the target has none")
        return {}
    if len(spec.zeros) != 1:
        raise _no(q, spec, "two levels of zeros")
    in_codes = q.spec.zeros_in_codes or not q.spec.zeros
    if spec.zeros_in_codes != in_codes:
        scale = scale_values(q)
        zero = zero * scale if in_codes else zero / scale
        if spec.zeros_in_codes and bool((zero != zero.round()).any()):
            raise _no(q, spec, "its offsets are not whole numbers of codes")
    finer = _regrid(q, zero, held, spec.zeros[0], spec)
    return {"zero0": store(elements.encode(finer, spec.zeros[0].element), spec.zeros[0].element)}
