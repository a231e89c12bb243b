"""Offsets: one weight on the grid of its format, with what may move: each value's rounding, each block's range.

Rounding is taken as the identity where gradients are concerned (straight-through). The planes come from the reference's
own rule at every step, so that the last one is stored as it was seen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.algos import clip
from fewbit.algos.ranges import Ranges, block_of, from_codes, in_codes, movable, planes, ranges, spacing, values
from fewbit.algos.rounding import nearest
from fewbit.quant.blocks import blocked, unblocked
from fewbit.quant.qtensor import Planes, QTensor, scale_codes
from fewbit.quant.reference import assign, encode
from fewbit.quant.spec import QuantSpec

SPAN = (0.3, 1.6)  # how far an end of a range may move


@dataclass(slots=True)
class Ends:
    """The moving ranges of one weight's blocks: the factors of low and high [2, R, C], and the signs of the scales."""

    ranges: Ranges
    factors: Tensor
    sign: Tensor

    def planes(self) -> Planes:
        return planes(self.ranges, self.ranges.low * self.factors[0], self.ranges.high * self.factors[1], self.sign)


@dataclass(slots=True)
class Rounding:
    """What is tuned of one weight; weights and offsets are blocked [R, rows, C, cols]."""

    spec: QuantSpec
    shape: tuple[int, ...]
    w: Tensor
    offsets: Tensor
    planes: Planes  # of the ends as they are
    ends: Ends | None  # None: the planes stay


def begin(w: Tensor, spec: QuantSpec, given: Planes, search: bool = True, minmax: bool = True) -> Rounding:
    """Offsets 0, ranges as the rule has them or as a search on the weights found them."""
    x = blocked(w, block_of(spec)).contiguous()
    state = Rounding(spec, tuple(w.shape), x, torch.zeros_like(x), {}, None)
    if movable(spec):
        found = clip.search(w, spec, given, None, clip.factors(0.5, 10, spec) if search else ())
        state.planes = found.planes
        if minmax and spec.scales[0].element.kind != "exponent":
            state.ends = Ends(ranges(w, spec, given), torch.stack((found.low, found.high)), found.sign)
    else:
        q = encode(w, spec, given)
        state.planes = {name: scale_codes(q, name) for name in q.planes if name != "codes"}
    return state


def dense(t: Rounding) -> Tensor:
    """The weight [N, K] as it stands, each value on the grid of its block."""
    scale, zero = values(t.planes, t.spec, t.shape)
    x = in_codes(t.w, scale, zero, t.spec)
    x = x.add_(t.offsets * spacing(x, t.spec.element))
    return unblocked(from_codes(nearest(t.spec.element, x.device)(x, x), scale, zero, t.spec), t.shape)


def even(grad: Tensor) -> Tensor:
    """A sign that fades where the gradient is small beside others of its row and column: there the sign is noise.

    grad: [N, K] -> in -1..1; at twice the root mean square it is full.
    """
    tiny = torch.finfo(torch.float32).tiny
    u = grad / grad.square().mean(0, keepdim=True).sqrt_().clamp_(min=tiny)
    return u.div_(u.square().mean(1, keepdim=True).sqrt_().mul_(2).clamp_(min=tiny)).clamp_(-1, 1)


def move(t: Rounding, grad: Tensor, lr: float, lr_ends: float, soft: bool = True) -> None:
    """One step against the (soft) sign of the gradient; grad: of the loss by the dense weight [N, K]."""
    scale, zero = values(t.planes, t.spec, t.shape)
    g = blocked(grad, block_of(t.spec))
    x = in_codes(t.w, scale, zero, t.spec)
    gap = spacing(x, t.spec.element)
    moved = x + t.offsets * gap
    inside = (moved >= t.spec.element.min - gap / 2) & (moved <= t.spec.element.max + gap / 2)
    step = blocked(even(grad) if soft else grad.sign(), block_of(t.spec))
    t.offsets.sub_((step * (scale.sign() * lr)).mul_(inside)).clamp_(-0.5, 0.5)
    if t.ends is not None:
        slopes = _slopes(t.spec, t.ends, g, x, nearest(t.spec.element, x.device)(moved, moved), inside, scale, zero)
        t.ends.factors = (t.ends.factors - lr_ends * slopes.sign()).clamp_(*SPAN)
        t.planes = t.ends.planes()


def _slopes(
    spec: QuantSpec, ends: Ends, g: Tensor, x: Tensor, q: Tensor, inside: Tensor, scale: Tensor, zero: Tensor | None
) -> Tensor:
    """Gradients by the factors [2, R, C]. Rounding taken as the identity, a scale matters inside its range by the
    rounding error alone, outside in full."""
    held = q - zero if zero is not None and spec.zeros_in_codes else q
    by_scale = (g * torch.where(inside, q - x, held)).sum((-3, -1))
    if zero is None:
        return (by_scale * ends.sign).expand(2, -1, -1)
    by_zero = -(g * ~inside * (scale if spec.zeros_in_codes else 1.0)).sum((-3, -1))
    return _asymmetric(spec, ends, scale[:, 0, :, 0], by_scale, by_zero)


def _asymmetric(spec: QuantSpec, ends: Ends, scale: Tensor, by_scale: Tensor, by_zero: Tensor) -> Tensor:
    """With a, b the factors of low and high: scale = (b high - a low) / steps; zero = -a low / scale, or -a low."""
    low, high = ends.ranges.low.clamp(max=0), ends.ranges.high.clamp(min=0)
    steps = spec.element.max - spec.element.min
    by_low, by_high = -low / steps, high / steps
    if not spec.zeros_in_codes:
        return torch.stack((by_scale * by_low - by_zero * low, by_scale * by_high))
    turn = ends.factors[0] * low / scale.square()
    zero_by_low, zero_by_high = turn * by_low - low / scale, turn * by_high
    return torch.stack((by_scale * by_low + by_zero * zero_by_low, by_scale * by_high + by_zero * zero_by_high))


def finish(t: Rounding) -> QTensor:
    """The codes of the tuned weight: rounding a value that is on the grid already gives it back."""
    return assign(dense(t), t.spec, t.planes)
