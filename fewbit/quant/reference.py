"""encode, decode, fake_quant, linear: what every format means, in plain torch. The oracle for every kernel.

`choose` picks the planes a rule wants, `assign` rounds a tensor with planes given; encode is one after the other, and
fake_quant is decode of encode by construction. Everything is computed in float32.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear as matmul

from fewbit.errors import SpecError, UnsupportedError
from fewbit.quant import elements
from fewbit.quant.blocks import At, blocked, finite_or_raise, largest, over, part, per_block, pieces, regrid, unblocked
from fewbit.quant.elements import Element
from fewbit.quant.ggml import GGML_RULES
from fewbit.quant.qtensor import Planes, QTensor, Quantized, Transform, empty, grid, load, scale_codes, store
from fewbit.quant.runs import decode_run
from fewbit.quant.spec import QuantSpec, Scale, describe

CHUNK = 1 << 18  # values worked on at a time on a CPU: the temporaries stay in cache
Rule = Callable[[Tensor, QuantSpec, Planes], Planes]


def encode(w: Tensor, spec: QuantSpec, given: Planes | None = None) -> QTensor:
    """w: [..., N, K] finite float -> the QTensor its rule chooses; given: unpacked planes that are fixed already."""
    if spec.element.kind == "run":
        reason = "its codebook search is not part of this package; a file that holds it can be read"
        raise UnsupportedError(f"cannot encode to {spec.element.name}", [reason])
    if w.dim() < 2 or not w.numel():
        raise SpecError(f"cannot encode a tensor of {list(w.shape)}: want [..., N, K] with at least one element")
    w = w.float()
    top = finite_or_raise(w)
    if top > 2 * _reach(spec):  # twice: zeros may move the range
        raise SpecError(f"cannot encode: {top:.6g} is far beyond what {describe(spec)} holds")
    if spec.rule in GGML_RULES:
        return GGML_RULES[spec.rule](w, spec)
    return assign(w, spec, choose(w, spec, given or {}))


def choose(w: Tensor, spec: QuantSpec, given: Planes) -> Planes:
    """-> unpacked planes (scale0, zero0 ...) for w: those given, the others by the spec's rule."""
    if spec.rule not in RULES:
        raise SpecError(f"rule {spec.rule!r} is not known; known: {', '.join(sorted({*RULES, *GGML_RULES}))}")
    return RULES[spec.rule](w, spec, given) if spec.scales else {}


def assign(w: Tensor, spec: QuantSpec, planes: Planes) -> QTensor:
    """Round w with the planes given (unpacked codes) -> QTensor."""
    out = empty(spec, w.shape, w.device)
    for name, plane in planes.items():
        chain = spec.scales if name.startswith("scale") else spec.zeros
        scale = chain[int(name[-1])]
        shape = (*w.shape[:-2], *grid(w.shape, scale.block))
        out.planes[name].copy_(store(plane.expand(shape), scale.element))
    scale_value, zero = scale_values(out), zero_values(out)
    for at in _pieces(w.shape, spec, w.device):
        x = _in_codes(w[at], spec, _part(scale_value, at, spec.scales, w.shape), _part(zero, at, spec.zeros, w.shape))
        out.planes["codes"][at] = store(elements.encode(x, spec.element), spec.element)
    return out


def _in_codes(x: Tensor, spec: QuantSpec, scale: Tensor | None, zero: Tensor | None) -> Tensor:
    """Values -> what rounds to codes."""
    if zero is not None and not spec.zeros_in_codes:
        x = _spread(x, spec.zeros[0].block, zero, torch.add)
    if scale is not None:
        x = _spread(x, spec.scales[0].block, scale, torch.div)
    if zero is not None and spec.zeros_in_codes:
        # rounded around the middle code, where compressed-tensors rounds: elsewhere a sum may fall on another tie
        middle = _middle(spec.element)
        x = _spread(x, spec.zeros[0].block, zero - middle, torch.add).round_().add_(middle)
    return x


def _middle(element: Element) -> float:
    return float(2 ** (int(element.bits) - 1))


def decode(q: QTensor) -> Tensor:
    """-> [..., N, K] float32."""
    spec = q.spec
    if spec.element.kind == "run":
        return decode_run(q.planes["codes"], spec.element)
    scale, zero = scale_values(q), zero_values(q)
    parts = _pieces(q.shape, spec, q.device)
    out = torch.empty(q.shape if len(parts) > 1 else 0, device=q.device)
    for at in parts:
        x = _values(q.planes["codes"][at], spec.element, q.shape[-1])
        x = _from_codes(x, spec, _part(scale, at, spec.scales, q.shape), _part(zero, at, spec.zeros, q.shape))
        if len(parts) == 1:
            return x.view(q.shape)
        out[at] = x
    return out


def _from_codes(x: Tensor, spec: QuantSpec, scale: Tensor | None, zero: Tensor | None) -> Tensor:
    """The inverse: the values of codes -> values; x is worked on in place, fresh pages cost more than arithmetic."""
    if zero is not None and spec.zeros_in_codes:
        x = _spread(x, spec.zeros[0].block, zero, torch.Tensor.sub_)
    if scale is not None:
        x = _spread(x, spec.scales[0].block, scale, torch.Tensor.mul_)
    if zero is not None and not spec.zeros_in_codes:
        x = _spread(x, spec.zeros[0].block, zero, torch.Tensor.sub_)
    return x


def fake_quant(x: Tensor, spec: QuantSpec, planes: Planes | None = None) -> Tensor:
    """x: [..., K] -> x rounded through the spec, same shape and dtype. planes: static scales, as stored."""
    if not x.numel():
        return x
    flat = x.reshape(-1, x.shape[-1]).float()
    if spec.rule in GGML_RULES:
        return decode(GGML_RULES[spec.rule](flat, spec)).view(x.shape).to(x.dtype)
    given = {n: load_plane(p, spec, n, flat.shape) for n, p in (planes or {}).items()}
    q = assign(flat, spec, choose(flat, spec, given))
    return decode(q).view(x.shape).to(x.dtype)


def linear(x: Tensor, q: Quantized, bias: Tensor | None = None, activations: bool = True) -> Tensor:
    """y = x W^T + bias with everything the format says: transforms, activation rounding, weights decoded."""
    x = transformed(x, q.transforms)
    rounded = fake_quant(x, q.format.act, q.act) if activations and q.format.act else x
    y = matmul(rounded, decode(q.weight).to(x.dtype), bias)
    for transform in q.transforms:
        if transform.kind == "low_rank":
            a, b = (transform.tensors[n].to(x.dtype) for n in ("a", "b"))
            y = y + matmul(matmul(x, a), b)
    return y


def transformed(x: Tensor, transforms: Iterable[Transform]) -> Tensor:
    """x: [..., K] as the quantized weight wants to see it."""
    for transform in transforms:
        t = transform.tensors
        if transform.kind == "permute":
            x = x.index_select(-1, t["index"])
        elif transform.kind == "input_scale":
            x = x * t["scale"].to(x.dtype)
        elif transform.kind == "rotate":
            matrix = t["matrix"].to(x.dtype)
            x = (torch.unflatten(x, -1, (-1, matrix.shape[0])) @ matrix).flatten(-2)
        elif transform.kind != "low_rank":
            raise SpecError(f"transform {transform.kind!r} is not known")
    return x


def scale_values(q: QTensor) -> Tensor:
    """-> [..., R, C] float32: the multiplier of each innermost block, the whole chain applied."""
    return _chain(q, "scale", q.spec.scales)


def zero_values(q: QTensor) -> Tensor | None:
    """-> [..., R, C] float32: the offset of each innermost zero block."""
    return _chain(q, "zero", q.spec.zeros) if q.spec.zeros else None


def load_plane(plane: Tensor, spec: QuantSpec, name: str, shape: Iterable[int]) -> Tensor:
    """A stored plane -> unpacked codes."""
    scale = (spec.scales if name.startswith("scale") else spec.zeros)[int(name[-1])]
    return load(plane, scale.element, grid(tuple(shape), scale.block)[1])


def _chain(q: QTensor, stem: str, chain: tuple[Scale, ...]) -> Tensor:
    if not chain:
        return torch.ones(1, 1)
    total = _multiplier(scale_codes(q, f"{stem}0"), chain[0])
    for i, scale in enumerate(chain[1:], 1):
        outer = elements.decode(scale_codes(q, f"{stem}{i}"), scale.element)
        total = OPS[scale.op](total, regrid(outer, q.shape, scale.block, chain[0].block))
    return total


def _multiplier(codes: Tensor, scale: Scale) -> Tensor:
    """What the codes of an innermost scale multiply by."""
    values = elements.decode(codes, scale.element)
    return 1 / values if scale.op == "div" else values


OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mul": torch.mul, "div": torch.div, "add": torch.add}


def _inner(spec: QuantSpec) -> tuple[int, int]:
    return spec.scales[0].block


def _spread(x: Tensor, block: tuple[int, int], values: Tensor, op: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """op(x, the value of x's block)."""
    if block == (0, 0):
        return op(x, values)
    return unblocked(op(blocked(x, block), per_block(values)), tuple(x.shape))


def _values(plane: Tensor, element: Element, cols: int) -> Tensor:
    """Packed codes -> float32 values in memory of their own; a byte of 2- or 4-bit codes is looked up whole."""
    if element.bits in (2, 4):
        wide = _wide(element, plane.device).index_select(0, plane.reshape(-1).int())
        return wide.view(torch.float32).view(*plane.shape[:-1], -1)[..., :cols]
    found = elements.decode(load(plane, element, cols), element)
    return found.clone() if element is elements.F32 else found


@cache
def _wide(element: Element, device: torch.device) -> Tensor:
    """-> [256]: the values of the codes in every byte, seen as one wide number: gathering rows is 5 times slower."""
    bits = int(element.bits)
    lanes = [(torch.arange(256) >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    table = elements.values(element)[torch.stack(lanes, -1)]
    return table.view(torch.int64 if bits == 4 else torch.complex128).view(-1).to(device)


def _pieces(shape: Sequence[int], spec: QuantSpec, device: torch.device) -> list[At]:
    blocks = [scale.block for scale in (*spec.scales[:1], *spec.zeros[:1])]
    return pieces(shape, blocks, CHUNK if device.type == "cpu" else CHUNK << 8)


def _part(values: Tensor | None, at: At, chain: tuple[Scale, ...], shape: Sequence[int]) -> Tensor | None:
    return part(values, at, chain[0].block, shape) if values is not None and chain else None


def _amax(w: Tensor, spec: QuantSpec) -> Tensor:
    low, high = _extremes(w, _inner(spec)) if spec.scales else (w.amin(), w.amax())
    return torch.maximum(-low, high)


def _extremes(w: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    x = blocked(w, block)
    return x.amin((-3, -1)), x.amax((-3, -1))


def _rule_scaled(w: Tensor, spec: QuantSpec, given: Planes) -> Planes:
    """Two-sided or asymmetric ranges, one or two levels: scale = extreme / what the element reaches."""
    if spec.zeros and "zero0" not in given:
        return _asymmetric(w, spec)
    if not _missing(spec, given):
        return given
    amax = _amax(w, spec)
    element = spec.element
    reach = (element.max - element.min) / 2 if spec.rule == "range" else element.max
    if len(spec.scales) == 1:
        return given | {"scale0": _scale_codes(over(amax, reach), spec.scales[0], spec)}
    return _two_levels(amax, w.shape, spec, given, reach)


def _reach(spec: QuantSpec) -> float:
    """The largest magnitude that a code and its chain of scales can make."""
    return math.prod(max(-e.min, e.max) for e in (spec.element, *(scale.element for scale in spec.scales)))


def _missing(spec: QuantSpec, given: Planes) -> list[str]:
    return [f"scale{i}" for i in range(len(spec.scales)) if f"scale{i}" not in given]


def _nonzero(scale: Tensor, spec: QuantSpec) -> Tensor:
    """An all-zero block needs some scale: 1, or compressed-tensors' choice under its rule."""
    return torch.where(scale == 0, torch.finfo(torch.float32).eps if spec.rule == "range" else 1.0, scale)


def _scale_codes(values: Tensor, scale: Scale, spec: QuantSpec) -> Tensor:
    """Multipliers -> what is stored of them, never too large for it and never 0, not even by rounding."""
    values = _nonzero(values, spec)
    stored = _held(1 / values if scale.op == "div" else values, scale.element)
    least = elements.encode(_nonzero(torch.zeros_like(values), spec), scale.element)
    return torch.where(elements.decode(stored, scale.element) == 0, least, stored)


def _held(values: Tensor, element: Element) -> Tensor:
    """-> codes; a float type that is too small for a value is an error."""
    if element.top < elements.BF16.top and element.kind == "native" and bool((values.abs() > element.top).any()):
        found = values.abs().max().item()
        raise SpecError(f"cannot encode: a block needs the scale {found:.6g}, {element.name} ends at {element.top:g}")
    return elements.encode(values, element)


def _two_levels(amax: Tensor, shape: torch.Size, spec: QuantSpec, given: Planes, reach: float) -> Planes:
    """NVFP4: an outer float brings the inner scales into their element's range; stored as is or as its reciprocal."""
    inner, outer = spec.scales
    top = 256.0 if spec.rule == "four-over-six" else inner.element.max
    if "scale1" not in given:
        whole = largest(amax, tuple(shape), inner.block, outer.block)
        tiny = torch.finfo(torch.float32).tiny
        if outer.op == "div":
            factor = torch.nan_to_num(top * reach / whole.clamp(min=tiny), posinf=1.0)
        else:
            factor = torch.where(whole > 0, over(whole, reach * top), 1.0)
        given = given | {"scale1": elements.encode(factor, outer.element)}
    factor = regrid(elements.decode(given["scale1"], outer.element), tuple(shape), outer.block, inner.block)
    if outer.op == "div":
        ideal = factor * over(amax, reach)
        rounded = elements.encode(ideal, inner.element)
        empty_block = elements.encode(torch.full_like(ideal, 0.125), inner.element)
        return given | {"scale0": torch.where(elements.decode(rounded, inner.element) == 0, empty_block, rounded)}
    ideal = torch.where(amax > 0, (amax / (reach * factor)).clamp(2.0**-9, inner.element.max), 1.0)
    return given | {"scale0": elements.encode(ideal, inner.element)}


def _asymmetric(w: Tensor, spec: QuantSpec) -> Planes:
    """The range of each block, zero included; the offset in codes (or, if stored as a float, in values)."""
    element, scale = spec.element, spec.scales[0]
    low, high = _extremes(w, scale.block)
    low, high = low.clamp(max=0), high.clamp(min=0)
    steps = element.max - element.min
    s = _scale_codes(over(high - low, steps), scale, spec)
    value = _multiplier(s, scale)
    if spec.zeros_in_codes:
        middle = _middle(element)
        zero = (element.min - middle - low / value).round() + middle
        zero = torch.where(high > low, zero, middle)  # an all-zero block
    else:
        zero = -(low - element.min * value)
    return {"scale0": s, "zero0": _held(zero, spec.zeros[0].element)}


def _rule_mx(w: Tensor, spec: QuantSpec, given: Planes) -> Planes:
    """Shared exponents. Three conventions are in use; all start from the block's largest magnitude."""
    if not _missing(spec, given):
        return given
    amax = _amax(w, spec)
    top = spec.element.max
    if spec.rule == "mx-ceil":
        mantissa, power = torch.frexp(over(amax, top))  # amax / top = mantissa * 2**power, mantissa in [0.5, 1)
        power = power - (mantissa == 0.5).int()
    else:
        bits = amax.view(torch.int32)
        if spec.rule == "mx-round":
            bits = bits + (1 << 21)  # half a unit at the mantissa bit that FP4 keeps
        power = (bits >> 23) - 127 - int(torch.tensor(top).log2().floor())
    code = torch.where(amax > 0, (power + 127).clamp(0, 254), 0 if spec.rule != "mx-ceil" else 127)
    return given | {"scale0": code.to(torch.uint8)}


def _rule_four_over_six(w: Tensor, spec: QuantSpec, given: Planes) -> Planes:
    """NVFP4 whose blocks put their largest value on code 6 or on code 4, whichever loses less."""
    six = _rule_scaled(w, spec, given)
    inner, outer = spec.scales
    factor = regrid(elements.decode(six["scale1"], outer.element), tuple(w.shape), outer.block, inner.block)
    quarter = _amax(w, spec) * 0.25
    ideal = quarter * factor if outer.op == "div" else quarter / factor
    four = elements.encode(ideal.clamp(2.0**-9, inner.element.max), inner.element)
    errors = []
    for scale0 in (six["scale0"], four):
        back = decode(assign(w, spec, six | {"scale0": scale0}))
        errors.append(blocked((back - w).square_(), inner.block).sum((-3, -1)))
    return six | {"scale0": torch.where(errors[1] < errors[0], four, six["scale0"])}


def _rule_double(w: Tensor, spec: QuantSpec, given: Planes) -> Planes:
    """bitsandbytes' double quantization: block maxima less their mean, themselves in blocks with an 8-bit table."""
    first, second, mean = spec.scales
    amax = over(_amax(w, spec), spec.element.max)
    offset = elements.encode(amax.mean((-2, -1), keepdim=True), mean.element)
    rest = amax - elements.decode(offset, mean.element)
    nested = _nonzero(largest(rest.abs(), tuple(w.shape), first.block, second.block), spec)
    codes = elements.encode(rest / regrid(nested, tuple(w.shape), second.block, first.block), first.element)
    return {"scale0": codes, "scale1": elements.encode(nested, second.element), "scale2": offset}


RULES: dict[str, Rule] = {
    "amax": _rule_scaled,  # scale = amax / largest value: ModelOpt, AutoFP8, bitsandbytes
    "range": _rule_scaled,  # scale = amax / half the range: compressed-tensors, GPTQ
    "mx-ceil": _rule_mx,  # ModelOpt: never clips
    "mx-floor": _rule_mx,  # OCP, ggml: clips the top quarter of an octave
    "mx-round": _rule_mx,  # compressed-tensors: up from 1.75
    "four-over-six": _rule_four_over_six,
    "double": _rule_double,
}
SUMMING = frozenset({"four-over-six", "double", *GGML_RULES})  # rules that add up: last bits depend on the device
