"""From what was seen of activations, keys and values to static scales: observers, and planes of a spec."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fewbit.errors import SpecError, UnsupportedError
from fewbit.quant.elements import E4M3, Element
from fewbit.quant.qtensor import Planes, store
from fewbit.quant.reference import assign, choose, decode
from fewbit.quant.spec import QuantSpec, describe
from fewbit.workflows.stats import Extremes
from fewbit.workflows.stats_gather import BINS, Spread

How = Literal["max", "percentile", "mse"]
Range = tuple[float, float]
HOW = ("max", "percentile", "mse")
POINTS = 8  # of a histogram's bin, when an error is summed over it
TRIED = 80  # ranges that "mse" tries: five octaves below the largest value


def observe_range(seen: Spread, spec: QuantSpec, how: How = "max", percentile: float = 99.99) -> Range:
    """The values that a static scale of `spec` is to reach: all of them, all but a few, or those that lose least.

    A spec without zeros gets a range around zero. One whose inner scale is chosen at each call needs the largest value
    whatever is asked: its static outer scale clips nothing, it only places the inner ones.
    """
    if how not in HOW:
        raise SpecError(f"observer {how!r} is not known; known: {', '.join(HOW)}")
    if not 0 < percentile <= 100:
        raise SpecError(f"percentile {percentile:g} is not above 0 and at most 100")
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    if how == "max" or spec.scales[0].dynamic:
        return _meant(spec, low, high)
    if seen.counts is None:
        raise SpecError(f"observer {how!r} needs a histogram of the activations, and none was kept")
    if how == "percentile":
        return _meant(spec, *_percentile(seen, spec, percentile))
    return _least(seen, spec, low, high)


def static_planes(spec: QuantSpec, reach: Range) -> Planes:
    """The planes, as stored, that hold the static scales and zeros of an activation spec which is to reach `reach`."""
    static = {f"scale{i}": s for i, s in enumerate(spec.scales) if not s.dynamic}
    static |= {f"zero{i}": s for i, s in enumerate(spec.zeros) if not s.dynamic}
    for name, scale in static.items():
        if scale.block != (0, 0):
            raise UnsupportedError(f"static activations of {describe(spec)}", [f"{name} is not per tensor"])
    if not static:
        return {}
    planes = choose(torch.tensor([[reach[0], reach[1]]]), spec, {})
    return {name: store(planes[name], scale.element) for name, scale in static.items()}


def kv_scales(
    seen: Mapping[str, Extremes], per: Literal["tensor", "head"] = "tensor", element: Element = E4M3
) -> dict[str, dict[str, Tensor]]:
    """Attention module -> {"k": ..., "v": ...}: float32 [1] or [G], largest value / what the element reaches."""
    if per not in ("tensor", "head"):
        raise SpecError(f"KV scales per {per!r} are not known; known: tensor, head")
    if not seen:
        reason = "its attention does not pass through this package, or no batch was run"
        raise UnsupportedError("no keys and values were seen", [reason])
    return {path: {"k": _scale(e.key, per, element), "v": _scale(e.value, per, element)} for path, e in seen.items()}


def _scale(amax: Tensor, per: str, element: Element) -> Tensor:
    amax = amax if per == "head" else amax.amax(0, keepdim=True)
    if not bool(amax.isfinite().all()):
        raise UnsupportedError("keys or values hold NaN or Inf", ["try dtype=float32"])
    return torch.where(amax > 0, amax / element.max, 1.0)


def _meant(spec: QuantSpec, low: float, high: float) -> Range:
    """Around zero, unless the spec has zeros."""
    top = max(-low, high)
    return (low, high) if spec.zeros else (-top, top)


def _edges() -> Tensor:
    """[BINS / 2 + 1]: where the bins of magnitudes begin; the last finite ones end at the largest float32."""
    bits = torch.arange(BINS // 2 + 1, dtype=torch.int64) << 19
    return bits.clamp(max=0x7F7FFFFF).to(torch.int32).view(torch.float32).double()


def _percentile(seen: Spread, spec: QuantSpec, percentile: float) -> Range:
    """As many values are left out above as `percentile` says; with zeros, half of them at each end."""
    assert seen.counts is not None
    positive, negative = seen.counts.cpu().view(2, -1).double()
    keep = percentile / 100
    if not spec.zeros:
        top = min(_quantile(positive + negative, keep), max(-seen.low, seen.high))
        return -top, top
    out = (positive.sum() + negative.sum()) * (1 - keep) / 2
    ends = [_quantile(c, 1 - float(out / c.sum())) if c.sum() > out else 0.0 for c in (negative, positive)]
    return -min(ends[0], max(-seen.low, 0.0)), min(ends[1], max(seen.high, 0.0))


def _quantile(counts: Tensor, share: float) -> float:
    """Magnitudes -> the value that `share` of them do not pass, straight within a bin."""
    total = counts.cumsum(0)
    wanted = total[-1] * share
    at = int(torch.searchsorted(total, wanted).clamp(max=len(counts) - 1))
    below = total[at - 1] if at else 0.0
    part = float(((wanted - below) / counts[at]).clamp(0, 1)) if counts[at] else 0.0
    edges = _edges()
    return float(edges[at] + part * (edges[at + 1] - edges[at]))


def _least(seen: Spread, spec: QuantSpec, low: float, high: float) -> Range:
    """The shrunken range whose planes round the histogram with the least squared error."""
    values, weights = _points(seen)
    best, least = _meant(spec, low, high), float("inf")
    for i in range(TRIED):
        factor = 2 ** (-i / 16)
        tried = _meant(spec, low * factor, high * factor)
        planes = choose(torch.tensor([[tried[0], tried[1]]]), spec, {})
        error = float(((decode(assign(values, spec, planes)) - values).double().square() * weights).sum())
        if error < least:
            best, least = tried, error
    return best


def _points(seen: Spread) -> tuple[Tensor, Tensor]:
    """Some values of every bin that is not empty, and how many each stands for: [1, n] each."""
    assert seen.counts is not None
    positive, negative = seen.counts.cpu().view(2, -1)
    edges, inside = _edges(), (torch.arange(POINTS) + 0.5) / POINTS
    values, weights = [], []
    for sign, counts in ((1, positive), (-1, negative)):
        at = counts.nonzero()[:, 0]
        spans = edges[at, None] + (edges[at + 1] - edges[at])[:, None] * inside
        limit = seen.high if sign > 0 else -seen.low
        values.append(sign * spans.clamp(max=max(limit, 0.0)).flatten())
        weights.append((counts[at] / POINTS).repeat_interleave(POINTS))
    return torch.cat(values).float()[None], torch.cat(weights)[None]
