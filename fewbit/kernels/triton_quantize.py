"""Activations to codes: scales by row, by run of columns, or given; the codes that quant.reference would choose.

Divisions are rounded once, codes to the nearest, ties to even, saturating: as fake_quant does, bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from fewbit.env import triton_interpreted
from fewbit.kernels.input_rounding import Rounding, offered
from fewbit.kernels.near import ROWS, Near
from fewbit.kernels.triton_early import begin, early
from fewbit.kernels.triton_near import largest, near_by
from fewbit.kernels.triton_runtime import cdiv, power

HELD = 16384  # columns of a row that stay in registers between the search and the rounding
MANY = 256  # rows from which on a processor has several of them
TILE = 2048  # values of a program that rounds runs of columns
INTERPRETED = tl.constexpr(triton_interpreted())


def input_codes(x: Tensor, how: Rounding, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x: [..., K] as `quantize_rows` has it, unless its maker has done so: codes [M, K]."""
    codes = offered(x, how)
    return codes or quantize_rows(x.reshape(-1, x.shape[-1]), how, scale)


def room(x: Tensor, how: Rounding) -> tuple[Tensor, Tensor]:
    """Where a kernel puts codes and scales of x [..., K], rounded by row as it makes it."""
    m, k = x.numel() // x.shape[-1], x.shape[-1]
    scales = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    return torch.empty(m, k, dtype=how.dtype, device=x.device), scales


def flags(how: Rounding | None) -> dict[str, object]:
    """What a kernel is compiled for that may round what it makes."""
    if how is None:
        return {"ROUND": False, "REACH": 1.0, "EMPTY": 1.0, "POWERS": False, "INT": False}
    return {"ROUND": True, **codes_by(how)}


def codes_by(how: Rounding) -> dict[str, object]:
    """What `scale_of` and `codes_of` are compiled for."""
    return {"REACH": how.reach, "EMPTY": how.empty, "POWERS": how.powers, "INT": how.element == "int8"}


def agreed(how: Rounding, rows: int) -> tuple[Rounding | None, Near | None]:
    """For a kernel whose programs have a row each: how it rounds, if it can, and over whom a row's scale is."""
    if how.ranks is None:
        return how, None
    near = how.ranks.near
    return (how, near) if near is not None and rows <= ROWS else (None, None)


def quantize_rows(x: Tensor, how: Rounding, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x: [M, K] float -> codes [M, K] and float32 scales [M, 1], [M, runs], or the one given."""
    x = x.contiguous()
    m, k = x.shape
    able, near = agreed(how, m)
    top = how.ranks.largest(x.abs().amax(1).float()) if able is None and m else None
    codes = torch.empty(m, k, dtype=how.dtype, device=x.device)
    if how.columns:
        return codes, _by_runs(x, codes, how)
    scales = scale if how.given else torch.empty(m, 1, dtype=torch.float32, device=x.device)
    block = min(power(k), HELD)
    warps = max(1, min(16, block // (1024 if m >= MANY else 512)))
    if m:
        _token[(m,)](x, codes, scales, top, k, how.reach, how.empty, block, block >= k, how.given, how.powers,
                     how.element == "int8", num_warps=warps, **near_by(near), **early(x.device))  # fmt: skip
    return codes, scales


def _by_runs(x: Tensor, codes: Tensor, how: Rounding) -> Tensor:
    m, k = x.shape
    runs = cdiv(k, how.columns)
    scales = torch.empty(m, runs, dtype=torch.float32, device=x.device)
    each = min(power(runs), TILE // how.columns)
    if m:
        _runs[(m, cdiv(runs, each))](x, codes, scales, k, runs, how.reach, how.empty, how.columns, each,
                                            how.powers, how.element == "int8", num_warps=4,
                                            **early(x.device))  # fmt: skip
    return scales


@triton.jit
def scale_of(amax, REACH: tl.constexpr, EMPTY: tl.constexpr, POWERS: tl.constexpr):
    """Largest magnitudes -> scales; one that would round to 0 is that of an empty row."""
    value = tl.math.div_rn(amax, REACH)
    if POWERS:
        bits = value.to(tl.int32, bitcast=True)
        power, rest = bits >> 23, bits & 0x7FFFFF
        power += (rest > tl.where(power == 0, 0x400000, 0)).to(tl.int32)
        power = tl.where(value > 0, tl.minimum(power, 254), 127)
        bits = tl.where(power > 0, power << 23, 0x400000)  # 2**-127 is subnormal
        value = bits.to(tl.float32, bitcast=True)
    else:
        value = tl.where(value == 0, EMPTY, tl.minimum(value, 3.4028234663852886e38))
    return value


@triton.constexpr_function
def _able() -> bool:
    """Whether it is compiled for what rounds to e4m3 itself, and adds products without rounding them."""
    return cuda_capability_geq(8, 9) and not INTERPRETED


@triton.jit
def _divided(x, scale, GIVEN: tl.constexpr, POWERS: tl.constexpr):
    """x / scale as far as codes depend on it: it lies on the same side of every middle between two of them.

    A product with the reciprocal is off by less than 1.5 of its last bits. Corrected once by what it leaves of x, it
    can differ from the quotient only where that lies next to a point at which float32 rounds the other way. A middle of
    codes has few bits, so there are few such quotients around it: tests try them all, each comes out to the bit.
    """
    if not _able():
        return tl.math.div_rn(x, scale)
    inverse = tl.math.div_rn(1.0, scale)
    if POWERS:  # exact, and rounded once
        return x * inverse
    usual = (scale > 2.0**-64) & (scale < 2.0**64)  # float32 ends far from all that counts here
    if tl.min(usual.to(tl.int32)) > 0:
        near = x * inverse
        if GIVEN:  # of what lies beyond all codes infinity may come, and of that NaN
            near = tl.minimum(tl.maximum(near, -512.0), 512.0)
        value = tl.fma(tl.fma(scale, near, x * -1.0), -inverse, near)  # so a zero keeps its sign
    else:
        value = tl.math.div_rn(x, scale)
    return value


@triton.jit
def codes_of(x, scale, GIVEN: tl.constexpr, POWERS: tl.constexpr, INT: tl.constexpr):
    value = _divided(x, scale, GIVEN, POWERS)
    if INT:
        value = tl.minimum(tl.maximum(value, -256.0), 256.0)
        codes = tl.minimum(tl.maximum(value + 12582912.0 - 12582912.0, -128.0), 127.0).to(tl.int8)
    elif _able():
        codes = value.to(tl.float8e4nv)
    else:
        value = tl.maximum(value, -448.0, propagate_nan=tl.PropagateNan.ALL)
        value = tl.minimum(value, 448.0, propagate_nan=tl.PropagateNan.ALL)
        # rounded before the cast, so that any cast is exact: to a constant's last bit, worth as much as e4m3's at value
        power = tl.maximum(value.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
        grid = (power + (20 << 23) | 0x400000).to(tl.float32, bitcast=True)
        near = value + grid - grid
        codes = tl.where(near == 0, value * 0.0, near).to(tl.float8e4nv)  # a zero keeps its sign
    return codes


@triton.jit
def put_codes(
    y, row, at, inside, whole_row, codes, scales, K: tl.constexpr, REACH: tl.constexpr, EMPTY: tl.constexpr,
    POWERS: tl.constexpr, INT: tl.constexpr,
):  # fmt: skip
    """y: [ROWS, BLOCK], whole rows; row: [ROWS], at: [BLOCK]."""
    values = y.to(tl.float32)
    if y.shape[1] > K:  # beyond a row may be a bias
        values = tl.where((at < K)[None, :], values, 0.0)
    scale = scale_of(tl.max(tl.abs(values), 1), REACH, EMPTY, POWERS)
    tl.store(scales + row, scale, whole_row)
    there = tl.max_contiguous(row[:, None] * K + at[None, :], (1, 8))  # as y lies: another way is by shared memory
    tl.store(codes + there, codes_of(values, scale[:, None], False, POWERS, INT), inside)


@triton.jit
def _token(
    x, codes, scales, top, k: tl.constexpr, REACH: tl.constexpr, EMPTY: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr, GIVEN: tl.constexpr, POWERS: tl.constexpr, INT: tl.constexpr, near, RANKS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """top: the largest of each row, where that is not to be found here."""
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x += row * k
    codes += row * k
    held = tl.load(x + at, mask=at < k, other=0.0).to(tl.float32)
    if GIVEN:
        scale = tl.load(scales + tl.arange(0, 1))
    else:
        if top is not None:
            most = tl.load(top + row + tl.arange(0, 1))
        else:
            reach = tl.abs(held)
            for start in range(BLOCK, k, BLOCK):
                values = tl.load(x + start + at, mask=start + at < k, other=0.0).to(tl.float32)
                reach = tl.maximum(reach, tl.abs(values))
            most = tl.max(reach, 0, keep_dims=True)
            if RANKS:
                most = largest(most, near, RANKS)
        scale = scale_of(most, REACH, EMPTY, POWERS)
        tl.store(scales + row + tl.arange(0, 1), scale)
    if WHOLE:
        tl.store(codes + at, codes_of(held, scale, GIVEN, POWERS, INT), mask=at < k)
    else:
        for start in range(0, k, BLOCK):
            values = tl.load(x + start + at, mask=start + at < k, other=0.0).to(tl.float32)
            found = codes_of(values, scale, GIVEN, POWERS, INT)
            tl.store(codes + start + at, found, mask=start + at < k)


@triton.jit
def _runs(
    x, codes, scales, k: tl.constexpr, runs: tl.constexpr, REACH: tl.constexpr, EMPTY: tl.constexpr,
    COLUMNS: tl.constexpr, EACH: tl.constexpr, POWERS: tl.constexpr, INT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    run = tl.program_id(1) * EACH + tl.arange(0, EACH)
    at = run[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    values = tl.load(x + row * k + at, mask=at < k, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(values), 1), REACH, EMPTY, POWERS)
    tl.store(scales + row * runs + run, scale, mask=run < runs)
    found = codes_of(values, scale[:, None], False, POWERS, INT)
    tl.store(codes + row * k + at, found, mask=at < k)
