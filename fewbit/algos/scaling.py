"""Scaling: which per-channel factors s a group's weights take (W * s, and x / s) so that its outputs suffer least.

A candidate is judged without running the model: by the Hessian, or by a sample of inputs where they are rounded too.
"""

from collections.abc import Callable, Iterable, Sequence
from math import inf

import torch
from torch import Tensor
from torch.nn.functional import linear

from fewbit.algos.algo import Stats, shared_planes
from fewbit.errors import SpecError
from fewbit.quant.reference import decode, encode, fake_quant
from fewbit.quant.spec import QuantSpec

ROWS = 384  # of each weight are enough to compare candidates, where rows are encoded by themselves
Curve = Callable[[float], Tensor]  # a strength in 0..1 -> s [K]


def search(
    group: Sequence[Tensor],
    specs: Sequence[QuantSpec],
    act: QuantSpec | None,
    stats: Stats,
    curves: Sequence[Curve],
    steps: int,
) -> Tensor:
    """The best s of the curves at strengths 0, 1/steps .. 1 and halfway beside the best; ones where none gains."""
    error = judge(group, specs, act, stats)
    found = torch.ones_like(stats.amax)
    least, at = error(found), -1.0
    chosen = curves[0]
    for curve in curves:
        for strength in (i / steps for i in range(steps + 1)):
            now = error(curve(strength))
            if now < least:
                least, at, chosen, found = now, strength, curve, curve(strength)
    for strength in (at - 0.5 / steps, at + 0.5 / steps) if at >= 0 else ():
        s = chosen(min(max(strength, 0.0), 1.0))
        if (now := error(s)) < least:
            least, found = now, s
    return found


def judge(
    group: Sequence[Tensor], specs: Sequence[QuantSpec], act: QuantSpec | None, stats: Stats
) -> Callable[[Tensor], float]:
    """-> s [K] -> the error of the group's outputs, each weight's relative to the square of its outputs."""
    if stats.sample is None and stats.hessian is None:
        raise SpecError("a search of scales needs stats with a hessian or a sample; these have neither")
    thin = [_thinned(w.float(), spec) for w, spec in zip(group, specs, strict=True)]
    measure = _by_sample if stats.sample is not None and (act is not None or stats.hessian is None) else _by_hessian
    whole = [max(measure(torch.zeros_like(w), w, None, stats, None), 1e-30) for w in thin]

    def error(s: Tensor) -> float:
        scaled = [w * s for w in thin]
        total = 0.0
        for w, ws, spec, given, size in zip(thin, scaled, specs, shared_planes(scaled, specs), whole, strict=True):
            total += measure(decode(encode(ws, spec, given)), w, act, stats, s) / size
        return total

    return error


def _thinned(w: Tensor, spec: QuantSpec) -> Tensor:
    """Rows of w, evenly spaced."""
    if w.shape[0] <= ROWS or any(scale.block[0] not in (0, 1) for scale in spec.scales):
        return w
    return w[torch.linspace(0, w.shape[0] - 1, ROWS, device=w.device).long()]


def _by_hessian(q: Tensor, w: Tensor, act: QuantSpec | None, stats: Stats, s: Tensor | None) -> float:
    assert stats.hessian is not None
    d = (q if s is None else q / s) - w
    return float(((d @ stats.hessian) * d).sum())


def _by_sample(q: Tensor, w: Tensor, act: QuantSpec | None, stats: Stats, s: Tensor | None) -> float:
    assert stats.sample is not None
    x = stats.sample if s is None else stats.sample / s
    rounded = fake_quant(x, act) if act is not None else x
    return float((linear(rounded, q) - linear(stats.sample, w)).square().mean())


def shared(x: Tensor, share: Tensor | None, reduce: str) -> Tensor:
    """x: [K] with one value for all channels of equal `share` (their mean or amax), where the producer has one row."""
    if share is None:
        return x
    slots = torch.zeros(int(share.max()) + 1, dtype=x.dtype, device=x.device)
    return slots.scatter_reduce(0, share, x, reduce, include_self=False)[share]


def balanced(s: Tensor) -> Tensor:
    """s with its extremes equally far from 1."""
    s = s.clamp(min=1e-4)
    return s / (s.amax() * s.amin()).sqrt()


def magnitude(x: Tensor) -> Tensor:
    """x with channels that are never active held above 0."""
    top = float(x.amax())
    return x.clamp(min=top * 1e-5) if 0 < top < inf else torch.ones_like(x)


def columns(group: Iterable[Tensor], of: Callable[[Tensor], Tensor]) -> Tensor:
    """Some [N_i, K] view of every weight, one above another."""
    return torch.cat([of(w.float()) for w in group])
