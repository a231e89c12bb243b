"""How weights become ggml's codes: its simple rules to the bit, and a search of our own where ggml searches too.

Q4_0 to Q8_0, TQ2_0 and MXFP4 repeat the arithmetic of ggml's reference quantizers (float32, halves rounded away from
zero). The K types and IQ4 minimise the weighted squared error: scales are searched inside each sub-block, scales of
scales the same way one level up, then all are refined in turn with the codes held, and codes with the scales held.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fewbit.errors import SpecError
from fewbit.quant import elements
from fewbit.quant.blocks import over
from fewbit.quant.ggml_search import extreme, inverse, symmetric, two_level, two_level_offset
from fewbit.quant.qtensor import Planes, QTensor, empty, scale_of, store
from fewbit.quant.spec import QuantSpec

CHUNK = 1 << 16  # weights encoded at a time on a CPU: the temporaries stay in cache; 64 times that elsewhere
Fit = Callable[[Tensor, Tensor | None, QuantSpec], Planes]


def encode_blocks(fit: Fit, w: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> QTensor:
    """w: [..., N, K] float32 -> QTensor. fit sees blocks [rows, B, n] and gives unpacked codes per plane.

    importance: [K], the weight of each column's squared error.
    """
    outer = max(scale.block[1] for scale in spec.scales)
    if w.shape[-1] % outer:
        raise SpecError(f"{spec.rule} holds rows in blocks of {outer}; a row of {w.shape[-1]} does not divide")
    out = empty(spec, w.shape, w.device)
    rows = w.reshape(-1, w.shape[-1])
    weight = None if importance is None else importance.float().view(1, -1, outer)
    step = max(1, (CHUNK if w.device.type == "cpu" else CHUNK << 6) // w.shape[-1])
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        for name, codes in fit(torch.unflatten(part, -1, (-1, outer)), weight, spec).items():
            element = spec.element if name == "codes" else scale_of(spec, name).element
            out.planes[name].flatten(0, -2)[start : start + step] = store(codes.flatten(1), element)
    return out


def _round_away(x: Tensor) -> Tensor:
    magnitude = x.abs()
    floor = magnitude.floor()  # adding a half and truncating would take 0.49999997 to 1
    return torch.copysign(floor + (magnitude - floor >= 0.5), x)


def _float16(x: Tensor) -> Tensor:
    out = x.half()
    if bool(out.isinf().any()):
        raise SpecError(f"cannot encode: a block needs the scale {x.abs().max().item():.6g}, float16 ends at 65504")
    return out


def _offset(x: Tensor, weight: Tensor | None, spec: QuantSpec) -> Planes:
    """Q4_0, Q5_0: the extreme value lands on the lowest code."""
    half = 2 ** (int(spec.element.bits) - 1)
    d = extreme(x) / -half
    codes = torch.trunc(x * inverse(d) + (half + 0.5)).clamp_(0, 2 * half - 1).to(torch.uint8)
    return {"codes": codes ^ half, "scale0": _float16(d)}


def _ranged(x: Tensor, weight: Tensor | None, spec: QuantSpec) -> Planes:
    """Q4_1, Q5_1: from the lowest value to the highest."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    d = over(high - low, spec.element.max)
    codes = torch.trunc((x - low) * inverse(d) + 0.5).clamp_(0, spec.element.max).to(torch.uint8)
    return {"codes": codes, "scale0": _float16(d), "zero0": -_float16(low)}


def _q8_0(x: Tensor, weight: Tensor | None, spec: QuantSpec) -> Planes:
    d = over(x.abs().amax(-1, keepdim=True), 127)
    codes = _round_away(x * inverse(d)).to(torch.int8).view(torch.uint8)
    return {"codes": codes, "scale0": _float16(d)}


def _tq2_0(x: Tensor, weight: Tensor | None, spec: QuantSpec) -> Planes:
    d = x.abs().amax(-1, keepdim=True)
    return {"codes": (_round_away(x * inverse(d)) + 1).to(torch.uint8), "scale0": _float16(d)}


def _q1_0(x: Tensor, weight: Tensor | None, spec: QuantSpec) -> Planes:
    """The mean magnitude is the best scale of signs."""
    return {"codes": (x >= 0).to(torch.uint8), "scale0": _float16(x.abs().mean(-1, keepdim=True))}


def _mxfp4(x: Tensor, weight: Tensor | None, spec: QuantSpec) -> Planes:
    """ggml takes the exponent from a float32 logarithm, and of two equally near codes the first in its table."""
    amax = x.abs().amax(-1, keepdim=True)
    power = torch.where(amax > 0, torch.floor(torch.log2(amax)) - 2 + 127, 0.0).clamp(min=0).to(torch.uint8)
    ratio = x * torch.exp2(127.0 - power.float())
    magnitude = torch.bucketize(ratio.abs(), ratio.new_tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]))
    negative = (ratio < 0) & (magnitude > 0)
    return {"codes": (magnitude + 8 * negative).to(torch.uint8), "scale0": power}


def _symmetric(x: Tensor, weight: Tensor | None, spec: QuantSpec) -> Planes:
    codes, d = symmetric(x, weight, spec.element)
    return {"codes": codes, "scale0": _float16(d)}


def _two_level(x: Tensor, weight: Tensor | None, spec: QuantSpec) -> Planes:
    inner = spec.scales[0]
    codes, i, d = two_level(*_sub_blocks(x, weight, inner.block[1]), spec.element, inner.element)
    return {"codes": codes.flatten(-2), "scale0": elements.encode(i, inner.element), "scale1": _float16(d)}


def _two_level_offset(x: Tensor, weight: Tensor | None, spec: QuantSpec) -> Planes:
    inner = spec.scales[0]
    codes, i, j, d, e = two_level_offset(*_sub_blocks(x, weight, inner.block[1]), spec.element, inner.element)
    planes = {"codes": codes.flatten(-2), "scale1": _float16(d), "zero1": _float16(e)}
    return {**planes, "scale0": elements.encode(i, inner.element), "zero0": elements.encode(j, inner.element)}


def _sub_blocks(x: Tensor, weight: Tensor | None, step: int) -> tuple[Tensor, Tensor | None]:
    return torch.unflatten(x, -1, (-1, step)), None if weight is None else torch.unflatten(weight, -1, (-1, step))


FITS: dict[str, Fit] = {
    "q4_0": _offset,
    "q5_0": _offset,
    "q4_1": _ranged,
    "q5_1": _ranged,
    "q8_0": _q8_0,
    "tq2_0": _tq2_0,
    "mxfp4-ggml": _mxfp4,
    "sign-mean": _q1_0,
    "iq4_nl": _symmetric,
    "q3_k": _two_level,
    "q6_k": _two_level,
    "iq4_xs": _two_level,
    "q2_k": _two_level_offset,
    "q4_k": _two_level_offset,
    "q5_k": _two_level_offset,
}
GGML_RULES: dict[str, Callable[[Tensor, QuantSpec], QTensor]] = {
    name: partial(encode_blocks, fit) for name, fit in FITS.items()
}
