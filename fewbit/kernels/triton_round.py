"""Values rounded to multiples of a scale on a GPU; see kernels.rounded, and round.cpp for the way.

One launch, and one before it where a scale of all values is searched, which leaves the largest of each of its parts.
"""

import triton
import triton.language as tl
from torch import Tensor, empty_like, int32

from fewbit.kernels.rounded import AMAX, CEIL, GIVEN, INTEGER, ROUND, TWO, Grid
from fewbit.kernels.triton_runtime import cdiv, power

HELD = 16384  # columns of a row that stay in registers between the search and the rounding
TILE = 2048  # values of a program otherwise
PARTS = 512  # programs that look for the largest of all, at most
G, A, C, R, T, WHOLE = (tl.constexpr(n) for n in (GIVEN, AMAX, CEIL, ROUND, TWO, INTEGER))
EVEN = tl.constexpr(12582912.0)


def rounded(x: Tensor, how: Grid, given: Tensor | None, cut: Tensor | None) -> Tensor:
    """x: [..., K] -> the same. given: [1] float32, where it is; cut: what counts values beyond a given scale."""
    x = x.contiguous()
    out, count, parts = empty_like(x), x.numel(), 0
    if how.whole:
        parts = min(PARTS, power(cdiv(count, TILE)))
        given = x.new_empty(parts, dtype=int32)
        _largest[(parts,)](x, given, count, cdiv(count, parts * TILE), TILE=TILE, num_warps=4)
    columns = TILE if how.rule == GIVEN else how.columns or x.shape[-1]
    width = power(columns)
    held = min(width, HELD)
    each = max(1, TILE // held)
    runs = cdiv(count, columns)
    _round[(cdiv(runs, each),)](
        x, out, given, cut, count, columns, how.fraction, how.least, how.low, how.high, how.rule, how.reach, how.power,
        how.empty, how.divides, each, held, width > held, parts, num_warps=max(1, min(16, each * held // 512)),
    )  # fmt: skip
    return out


@triton.jit
def _bits(values):
    """Of magnitudes: as whole numbers they have the same order, and NaN is the largest."""
    return values.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit(do_not_specialize=["turns"], do_not_specialize_on_alignment=["count"])
def _largest(x, found, count, turns, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * turns * TILE + tl.arange(0, TILE)
    most = tl.zeros([TILE], tl.int32)
    for _ in range(turns):
        most = tl.maximum(most, _bits(tl.load(x + at, mask=at < count, other=0.0)))
        at += TILE
    tl.store(found + tl.program_id(0), tl.max(most, 0))


@triton.jit
def _outer(found, PARTS: tl.constexpr, REACH: tl.constexpr, DIVIDES: tl.constexpr):
    """The scale of all values from the largest of their parts."""
    amax = tl.max(tl.load(found + tl.arange(0, PARTS)), 0, keep_dims=True).to(tl.float32, bitcast=True)
    most = tl.zeros_like(amax) + REACH * 448.0
    if DIVIDES:
        value = tl.math.div_rn(most, tl.maximum(amax, 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL))
        value = tl.where(value == float("inf"), 1.0, value)
        return tl.where(value == value, value, 0.0)
    return tl.where(amax > 0, tl.math.div_rn(amax, most), 1.0)


@triton.jit(do_not_specialize_on_alignment=["count"])
def _round(
    x, out, given, cut, count, columns: tl.constexpr, FRACTION: tl.constexpr, LEAST: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, RULE: tl.constexpr, REACH: tl.constexpr, POWER: tl.constexpr, EMPTY: tl.constexpr,
    DIVIDES: tl.constexpr, EACH: tl.constexpr, HELD: tl.constexpr, LONG: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0).to(tl.int64) * EACH + tl.arange(0, EACH)
    at = run[:, None] * columns + tl.arange(0, HELD)[None, :]
    inside = (tl.arange(0, HELD) < columns)[None, :] & (at < count)
    outer = 1.0
    if PARTS > 0:
        outer = _outer(given, PARTS, REACH, DIVIDES)
    elif given is not None:
        outer = tl.load(given)
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if RULE == G:
        scale = tl.zeros((EACH, 1), tl.float32) + outer
    else:
        most = tl.max(_bits(values), 1)
        if LONG:
            for start in range(HELD, columns, HELD):
                more = (tl.arange(0, HELD) + start < columns)[None, :] & (at + start < count)
                values = tl.load(x + at + start, mask=more, other=0.0)
                most = tl.maximum(most, tl.max(_bits(values), 1))
        scale = _scale(most.to(tl.float32, bitcast=True), outer, RULE, REACH, POWER, EMPTY, DIVIDES)[:, None]
    if cut is not None:
        many = tl.sum(tl.sum((((values < LOW * outer) | (values > HIGH * outer)) & inside).to(tl.int64), 1), 0)
        if many > 0:
            tl.atomic_add(cut, many)
    if LONG:
        for start in range(0, columns, HELD):
            more = (tl.arange(0, HELD) + start < columns)[None, :] & (at + start < count)
            values = tl.load(x + at + start, mask=more, other=0.0).to(tl.float32)
            found = _near(values, scale, FRACTION, LEAST, LOW, HIGH)
            tl.store(out + at + start, found.to(out.dtype.element_ty), mask=more)
    else:
        found = _near(values, scale, FRACTION, LEAST, LOW, HIGH)
        tl.store(out + at, found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _near(values, scale, FRACTION: tl.constexpr, LEAST: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    scale = tl.broadcast_to(scale, values.shape)
    value = tl.math.div_rn(values, scale)
    value = tl.maximum(value, LOW, propagate_nan=tl.PropagateNan.ALL)
    value = tl.minimum(value, HIGH, propagate_nan=tl.PropagateNan.ALL)
    if FRACTION == WHOLE:
        near = value + EVEN - EVEN
    else:
        near = _to_float(value, FRACTION, LEAST)
    return near * scale


@triton.jit
def _to_float(value, FRACTION: tl.constexpr, LEAST: tl.constexpr):
    power = tl.maximum(value.to(tl.int32, bitcast=True) & 0x7F800000, (LEAST + 127) << 23)
    grid = (power + ((23 - FRACTION) << 23) | 0x400000).to(tl.float32, bitcast=True)
    return value + grid - grid


@triton.jit
def _power_of_two(power):
    power = tl.minimum(power, 254)
    return tl.where(power > 0, power << 23, 0x400000).to(tl.float32, bitcast=True)


@triton.jit
def _scale(
    amax, outer, RULE: tl.constexpr, REACH: tl.constexpr, POWER: tl.constexpr, EMPTY: tl.constexpr,
    DIVIDES: tl.constexpr,
):  # fmt: skip
    if RULE == A:
        value = tl.math.div_rn(amax, REACH)
        value = tl.minimum(value, 3.4028234663852886e38, propagate_nan=tl.PropagateNan.ALL)
        value = tl.where(value == 0, EMPTY, value)
    elif RULE == C:
        bits = tl.math.div_rn(amax, REACH).to(tl.int32, bitcast=True)
        power = bits >> 23
        power += ((bits & 0x7FFFFF) > tl.where(power == 0, 0x400000, 0)).to(tl.int32)
        value = tl.where(amax > 0, _power_of_two(power), 1.0)
    elif RULE == T:
        if DIVIDES:
            ideal = outer * tl.math.div_rn(amax, REACH)
            inner = _to_float(tl.minimum(ideal, 448.0, propagate_nan=tl.PropagateNan.ALL), 3, -6)
            value = tl.math.div_rn(tl.where(inner == 0, 0.125, inner), tl.zeros_like(amax) + outer)
        else:
            ideal = tl.math.div_rn(amax, tl.zeros_like(amax) + REACH * outer)
            ideal = tl.minimum(ideal, 448.0, propagate_nan=tl.PropagateNan.ALL)
            inner = _to_float(tl.maximum(ideal, 0.001953125, propagate_nan=tl.PropagateNan.ALL), 3, -6)
            value = tl.where(amax > 0, inner, 1.0) * outer
    else:
        bits = amax.to(tl.int32, bitcast=True)
        if RULE == R:
            bits += 1 << 21
        value = _power_of_two(tl.where(amax > 0, (bits >> 23) - POWER, 0))
    return value
