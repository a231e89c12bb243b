"""Clip: per block, the range that loses least of the output; a row for which it does not pay keeps the rule's planes.

The error of a block is d^T H d with its own part of the Hessian, as far as the stats know it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.algos.algo import Stats
from fewbit.algos.ranges import (
    Ranges,
    block_of,
    from_codes,
    in_codes,
    movable,
    planes,
    ranges,
    signed,
    values,
)
from fewbit.algos.rounding import nearest
from fewbit.quant.blocks import Block, blocked
from fewbit.quant.qtensor import Planes, QTensor
from fewbit.quant.reference import assign, decode, encode
from fewbit.quant.spec import FLAT, QuantSpec

CHUNK = 1 << 22  # weights searched at a time, where rows do not depend on one another


def factors(least: float, steps: int, spec: QuantSpec) -> list[float]:
    """From 1 down to `least`; for a two-level float also 1.5, its largest value on the code below the top."""
    down = [1 - (1 - least) * i / steps for i in range(1, steps + 1)]
    return [*down, 1.5] if spec.element.name == "e2m1" else down


def clipped(w: Tensor, spec: QuantSpec, given: Planes, stats: Stats, grid: Sequence[float]) -> QTensor:
    """w: [N, K] -> its codes, never worse than encode(w, spec, given) in row_errors."""
    plain = encode(w, spec, given)
    if not movable(spec):
        return plain
    found = search(w, spec, given, block_metric(stats, block_of(spec), w), grid)
    return better(w, plain, assign(w, spec, found.planes), stats)


def better(w: Tensor, plain: QTensor, found: QTensor, stats: Stats) -> QTensor:
    """Row by row where rows have their own scales, else whole: the one that loses less."""
    was, now = (row_errors(decode(q) - w, stats) for q in (plain, found))
    if block_of(plain.spec)[0] != 1:
        return found if float(now.sum()) < float(was.sum()) else plain
    pick = (now < was).view(-1, 1)
    own = {n: p for n, p in plain.planes.items() if p.shape[0] == w.shape[0]}
    merged = {n: torch.where(pick, found.planes[n], p) for n, p in own.items()}
    return QTensor(plain.spec, plain.shape, found.planes | merged)


@dataclass(slots=True)
class Found:
    """The best range of each block so far [R, C]: its error, its planes, the factors of both ends, the scale's sign."""

    error: Tensor
    planes: Planes
    low: Tensor
    high: Tensor
    sign: Tensor


def search(w: Tensor, spec: QuantSpec, given: Planes, metric: Tensor | None, grid: Sequence[float]) -> Found:
    """The best range of each block among those that `grid` shrinks it to; metric: from block_metric, None = squares."""
    given = ranges(w, spec, given).given
    rows = max(1, CHUNK // w.shape[-1])
    parts = torch.split(w, rows) if block_of(spec)[0] == 1 else (w,)
    found = [_search(part, spec, given, metric, grid) for part in parts]
    if len(found) == 1:
        return found[0]
    joined = {name: torch.cat([f.planes[name] for f in found], -2) for name in found[0].planes if name not in given}
    error, low, high, sign = (torch.cat([getattr(f, n) for f in found]) for n in ("error", "low", "high", "sign"))
    return Found(error, given | joined, low, high, sign)


def _search(w: Tensor, spec: QuantSpec, given: Planes, metric: Tensor | None, grid: Sequence[float]) -> Found:
    r, x = ranges(w, spec, given), blocked(w, block_of(spec))
    start, ones = planes(r, r.low, r.high), torch.ones_like(r.low)
    best = Found(_error(x, start, spec, w, metric), start, ones, ones, ones)
    for low, high, sign in _candidates(best, grid, r):
        chosen = planes(r, r.low * low, r.high * high, sign)
        _keep(best, Found(_error(x, chosen, spec, w, metric), chosen, low, high, sign))
    return best


def _candidates(best: Found, grid: Sequence[float], r: Ranges) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Factors of both ends together, with either sign; then of one end with the other held."""
    ones = torch.ones_like(r.low)
    flip = torch.where(r.high > -r.low, -ones, ones)
    for f in grid:
        yield ones * f, ones * f, ones
    for f in (1.0, *grid) if grid and signed(r.spec) else ():
        yield ones * f, ones * f, flip
    for f in grid if r.spec.zeros else ():
        yield ones * f, best.high, ones
    for f in grid if r.spec.zeros else ():
        yield best.low, ones * f, ones


def _keep(best: Found, now: Found) -> None:
    """Take over the blocks that a candidate improves."""
    gain = now.error < best.error
    for name, plane in best.planes.items():
        if plane.shape == gain.shape:
            best.planes = best.planes | {name: torch.where(gain, now.planes[name], plane)}
    best.error, best.sign = torch.where(gain, now.error, best.error), torch.where(gain, now.sign, best.sign)
    best.low, best.high = torch.where(gain, now.low, best.low), torch.where(gain, now.high, best.high)


def _error(x: Tensor, chosen: Planes, spec: QuantSpec, w: Tensor, metric: Tensor | None) -> Tensor:
    scale, zero = values(chosen, spec, tuple(w.shape))
    ideal = in_codes(x, scale, zero, spec)
    back = from_codes(nearest(spec.element, x.device)(ideal, ideal), scale, zero, spec)
    return block_errors(back.sub_(x), metric)


def block_metric(stats: Stats | None, block: Block, w: Tensor) -> Tensor | None:
    """What weighs errors inside a block: [C, cols, cols] of the Hessian, blocked squares, or nothing."""
    k = w.shape[-1]
    if stats is None:
        return None
    if block[0] == FLAT:
        return blocked(stats.square.expand(w.shape), block)
    cols = block[1] or k
    if stats.hessian is not None:
        pieces = blocked(stats.hessian, (cols, cols))  # [C, cols, C, cols]
        return pieces.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    if stats.sample is None:
        return blocked(stats.square[None], (1, cols))
    x = blocked(stats.sample, (1, cols)).flatten(0, 1).transpose(0, 1)  # [C, S, cols]
    return x.transpose(1, 2) @ x / x.shape[1]


def block_errors(d: Tensor, metric: Tensor | None) -> Tensor:
    """d: [R, rows, C, cols] -> [R, C]."""
    if metric is None:
        return d.square().sum((-3, -1))
    if metric.dim() == 4:
        return (d.square() * metric).sum((-3, -1))
    t = d.permute(2, 0, 1, 3).flatten(1, 2)
    return torch.unflatten((t @ metric).mul_(t).sum(-1), 1, d.shape[:2]).sum(-1).T


def row_errors(d: Tensor, stats: Stats) -> Tensor:
    """d: [N, K], the change of a weight -> [N]: the mean square that it adds to each output."""
    if stats.hessian is not None:
        return ((d @ stats.hessian) * d).sum(-1)
    if stats.sample is not None:
        return (d @ stats.sample.T).square().mean(-1)
    return (d.square() * stats.square).sum(-1)
