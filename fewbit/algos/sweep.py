"""Loops over columns: GPTQ's own, and coordinate descent on codes and scales afterwards, which only lowers the cost.

Everything is transposed, [K, N], so that a column of the weight is contiguous. A run is a stretch of columns; where
they share their scales row by row it is worked on in units of codes, and a column costs four small operations. What a
run owes to all others comes as one product of matrices before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.algos.rounding import Round

Run = tuple[slice, int | None]  # columns, and their one group
Choose = Callable[[int, Tensor, slice], None]  # (group, what its columns have become, where they are)


@dataclass(frozen=True, slots=True)
class Moves:
    """How the planes of a block may change."""

    scale: Callable[[int, Tensor], Tensor]  # (group, better multipliers [N]) -> those that can be stored
    zeros: tuple[float, float] | None  # the range of zeros, where they are codes


@dataclass(slots=True)
class Codes:
    """What has been chosen so far. Column j has the scales of group[j]."""

    values: Tensor  # [K, N] of codes, less the middle one where zeros are codes
    scale: Tensor  # [groups, N]
    zero: Tensor | None  # [groups, N] in units of codes
    group: Tensor  # [K]

    def units(self, at: slice, g: int | None = None) -> Tensor:
        """-> [n, N]: what the scales multiply, of columns that are all of group g, or of any."""
        index = self.group[at] if g is None else g
        return self.values[at] if self.zero is None else self.values[at] - self.zero[index]

    def weight(self, at: slice, g: int | None = None) -> Tensor:
        """-> [n, N]: the decoded columns."""
        return self.units(at, g) * self.scale[self.group[at] if g is None else g]


def runs(group: Tensor, longest: int) -> list[Run]:
    """Whole groups, or parts of one; `longest` columns of many (None) where groups are scattered."""
    found = group.tolist()
    edges = [j for j in range(1, len(found)) if found[j] != found[j - 1]]
    if len(edges) >= len(set(found)) or (len(edges) > 1 and len(edges) == len(found) - 1):
        return [(slice(j, min(j + longest, len(found))), None) for j in range(0, len(found), longest)]
    out: list[Run] = []
    for start, stop in zip([0, *edges], [*edges, len(found)], strict=True):
        out += [(slice(j, min(j + longest, stop)), found[start]) for j in range(start, stop, longest)]
    return out


def feed(w: Tensor, a: Tensor, codes: Codes, nearest: Round, cut: Sequence[Run], choose: Choose | None) -> None:
    """GPTQ: fill codes column by column. w: [K, N]; a: [K, K], see algos.hessian."""
    errors = torch.empty_like(w)
    for at, g in cut:
        done = slice(0, at.start)
        target = torch.addmm(w[at], a[done, at].T, errors[done])
        if choose is not None and g is not None:
            choose(g, _likely(w[at], target, a[at, at]), at)
        errors[at] = _round_run(codes, (at, g), target, w[at], a[at, at], nearest)


def descend(w: Tensor, h: Tensor, codes: Codes, nearest: Round, cut: Sequence[Run], moves: Moves | None) -> None:
    """One pass over all columns: each code moves where tr(E H E^T) is least, the others held; before it, its scale."""
    error = w - codes.weight(slice(None))
    diagonal = h.diagonal()
    for at, g in cut:
        slope, near = h[at] @ error, h[at, at]
        if moves is not None and g is not None:
            _refit(codes, at, g, error, slope, near, moves)
        held = codes.weight(at, g)
        _round_run(codes, (at, g), held + slope / diagonal[at, None], held, near / diagonal[at], nearest)
        torch.sub(w[at], codes.weight(at, g), out=error[at])


def _likely(w: Tensor, target: Tensor, push: Tensor) -> Tensor:
    """What columns are asked to become before those of their run err, with what they would carry to one another."""
    carried: Tensor = torch.linalg.solve_triangular(push.T, target - w, upper=False, unitriangular=True)
    return carried.add_(w)


def _round_run(codes: Codes, run: Run, target: Tensor, origin: Tensor, push: Tensor, nearest: Round) -> Tensor:
    """Round one run of target [n, N], which is used up -> origin less what came out, [n, N]."""
    at, g = run
    if g is None:
        index = codes.group[at]
        zeros = None if codes.zero is None else codes.zero[index]
        codes.values[at], errors = _sweep_mixed(target, origin, push, nearest, codes.scale[index], zeros)
        return errors
    target /= codes.scale[g]
    origin = origin / codes.scale[g]
    if codes.zero is not None:
        target += codes.zero[g]
        origin += codes.zero[g]
    codes.values[at], errors = _sweep(target, origin, push, nearest)
    return errors.mul_(codes.scale[g])


def _sweep(target: Tensor, origin: Tensor, push: Tensor, nearest: Round) -> tuple[Tensor, Tensor]:
    """Round target [n, N] row by row; what came out, taken from origin, goes on to later rows by push [n, n]."""
    found, errors = torch.empty_like(target), torch.empty_like(target)
    for i, parts in enumerate(zip(target, origin, found, errors, strict=True)):
        row, start, kept, left = parts
        nearest(row, kept)
        torch.sub(start, kept, out=left)
        target[i + 1 :].addr_(push[i, i + 1 :], left)
    return found, errors


def _sweep_mixed(
    target: Tensor, origin: Tensor, push: Tensor, nearest: Round, scale: Tensor, zero: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same with all in units of the weight, and a scale [n, N] for every row."""
    found, errors = torch.empty_like(target), torch.empty_like(target)
    for i in range(target.shape[0]):
        ideal = target[i] / scale[i]
        shift = 0.0 if zero is None else zero[i]
        nearest(ideal.add_(shift), found[i])
        torch.sub(origin[i], (found[i] - shift) * scale[i], out=errors[i])
        target[i + 1 :].addr_(push[i, i + 1 :], errors[i])
    return found, errors


def _refit(codes: Codes, at: slice, g: int, error: Tensor, slope: Tensor, near: Tensor, moves: Moves) -> None:
    """Move the zero and the scale of one block where the cost is least with its codes held; error, slope follow."""
    if codes.zero is not None and moves.zeros is not None:
        _move_zero(codes, at, g, error, slope, near, moves.zeros)
    units, scale = codes.units(at, g), codes.scale[g]
    curve = near @ units
    gain, bend = (slope * units).sum(0), (curve * units).sum(0)
    ideal = scale + gain / bend
    step = moves.scale(g, torch.where(ideal.isfinite() & (ideal * scale > 0), ideal, scale)) - scale
    step = torch.where(step * (2 * gain - step * bend) > 0, step, 0.0)
    codes.scale[g] = scale + step
    error[at] -= units * step
    slope -= curve * step


def _move_zero(
    codes: Codes, at: slice, g: int, error: Tensor, slope: Tensor, near: Tensor, bounds: tuple[float, float]
) -> None:
    assert codes.zero is not None
    scale, zero = codes.scale[g], codes.zero[g]
    gain, bend = slope.sum(0) * scale, near.sum() * scale * scale
    step = (zero - torch.nan_to_num(gain / bend, 0.0, 0.0, 0.0).round_()).clamp_(*bounds) - zero
    step = torch.where(step * (2 * gain + step * bend) < 0, step, 0.0)
    codes.zero[g] = zero + step
    error[at] += step * scale
    slope += near.sum(1)[:, None] * (step * scale)
