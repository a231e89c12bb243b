"""Activations to codes: scales by row, by run of columns, or given; the codes that quant.reference would choose.

A row's scale is its largest magnitude over what the element reaches, as fake_quant computes it: divisions rounded once,
codes to the nearest, ties to even, saturating. `Recipe` says which; `recipe` reads it off a format's activation spec.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbit.quant.elements import E4M3, E8M0, F32, INT8
from fewbit.quant.spec import QuantSpec

HELD = 16384  # columns of a row that stay in registers between the search and the rounding
TILE = 2048  # values of a program that rounds runs of columns
DTYPES = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}
RULES = ("amax", "range")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How activations become codes. columns: of a run that shares a scale, 0 = a row; given: the scale is stored."""

    element: str
    columns: int
    given: bool
    reach: float  # the magnitude that the scale puts the largest value on
    empty: float  # the scale where all values are 0
    powers: bool = False  # scales are powers of two, rounded up

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.element]


def recipe(spec: QuantSpec) -> Recipe | str:
    """-> how quantize_rows does it, or why it does not."""
    if spec.element not in (E4M3, INT8) or spec.zeros or len(spec.scales) != 1:
        return "rounds activations to e4m3 or int8 with one scale"
    scale, element = spec.scales[0], spec.element
    powers = scale.element is E8M0
    known = (E8M0, "mx-ceil") if powers else (F32, spec.rule if spec.rule in RULES else "amax or range")
    if (scale.element, spec.rule) != known or scale.op != "mul":
        return f"knows float32 scales by amax or range and e8m0 by mx-ceil, not {scale.element.name} by {spec.rule}"
    rows, columns = scale.block
    whole = scale.dynamic and (rows, columns) == (1, 0)
    runs = scale.dynamic and rows == 1 and columns in (32, 64, 128, 256)
    given = not scale.dynamic and (rows, columns) == (0, 0) and not powers
    if not (whole or runs or given):
        return "rounds activations by token, by runs of 32 to 256 columns, or with one stored scale"
    reach = (element.max - element.min) / 2 if spec.rule == "range" else element.max
    empty = torch.finfo(torch.float32).eps if spec.rule == "range" else 1.0
    return Recipe(element.name, columns, given, reach, empty, powers)


def quantize_rows(x: Tensor, how: Recipe, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x: [M, K] float -> codes [M, K] and float32 scales [M, 1], [M, runs], or the one given."""
    x = x.contiguous()
    m, k = x.shape
    codes = torch.empty(m, k, dtype=how.dtype, device=x.device)
    if how.columns:
        return codes, _by_runs(x, codes, how)
    scales = scale if how.given else torch.empty(m, 1, dtype=torch.float32, device=x.device)
    block = min(triton.next_power_of_2(k), HELD)
    warps = max(1, min(16, block // 512))
    if m:
        _token[(m,)](x, codes, scales, k, how.reach, how.empty, block, block >= k, how.given, how.powers,
                     how.element == "int8", num_warps=warps)  # fmt: skip
    return codes, scales


def _by_runs(x: Tensor, codes: Tensor, how: Recipe) -> Tensor:
    m, k = x.shape
    runs = triton.cdiv(k, how.columns)
    scales = torch.empty(m, runs, dtype=torch.float32, device=x.device)
    each = min(triton.next_power_of_2(runs), TILE // how.columns)
    if m:
        _runs[(m, triton.cdiv(runs, each))](x, codes, scales, k, runs, how.reach, how.empty, how.columns, each,
                                            how.powers, how.element == "int8", num_warps=4)  # fmt: skip
    return scales


@triton.jit
def _scale(amax, REACH: tl.constexpr, EMPTY: tl.constexpr, POWERS: tl.constexpr):
    """Largest magnitudes -> scales; one that would round to 0 is that of an empty row."""
    value = tl.math.div_rn(amax, tl.full(amax.shape, REACH, tl.float32))
    if POWERS:
        bits = value.to(tl.int32, bitcast=True)
        power, rest = bits >> 23, bits & 0x7FFFFF
        power += (rest > tl.where(power == 0, 0x400000, 0)).to(tl.int32)
        power = tl.where(value > 0, tl.minimum(power, 254), 127)
        bits = tl.where(power > 0, power << 23, 0x400000)  # 2**-127 is subnormal
        return bits.to(tl.float32, bitcast=True)
    return tl.where(value == 0, EMPTY, tl.minimum(value, 3.4028234663852886e38))


@triton.jit
def _codes(x, scale, INT: tl.constexpr):
    value = tl.math.div_rn(x, scale)
    if INT:
        value = tl.minimum(tl.maximum(value, -256.0), 256.0)
        return tl.minimum(tl.maximum(value + 12582912.0 - 12582912.0, -128.0), 127.0).to(tl.int8)
    value = tl.maximum(value, -448.0, propagate_nan=tl.PropagateNan.ALL)
    value = tl.minimum(value, 448.0, propagate_nan=tl.PropagateNan.ALL)
    # rounded before the cast, so that any cast is exact: a constant whose last bit is worth e4m3's last bit at value
    power = tl.maximum(value.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
    grid = (power + (20 << 23) | 0x400000).to(tl.float32, bitcast=True)
    near = value + grid - grid
    return tl.where(near == 0, value * 0.0, near).to(tl.float8e4nv)  # a zero keeps its sign


@triton.jit
def _token(
    x, codes, scales, k: tl.constexpr, REACH: tl.constexpr, EMPTY: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr, GIVEN: tl.constexpr, POWERS: tl.constexpr, INT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x += row * k
    codes += row * k
    if WHOLE:
        values = tl.load(x + at, mask=at < k, other=0.0).to(tl.float32)
        if GIVEN:
            scale = tl.load(scales)
        else:
            scale = _scale(tl.max(tl.abs(values), 0), REACH, EMPTY, POWERS)
            tl.store(scales + row, scale)
        tl.store(codes + at, _codes(values, tl.full((BLOCK,), 1.0, tl.float32) * scale, INT), mask=at < k)
    else:
        if GIVEN:
            scale = tl.load(scales)
        else:
            top = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, k, BLOCK):
                values = tl.load(x + start + at, mask=start + at < k, other=0.0).to(tl.float32)
                top = tl.maximum(top, tl.abs(values))
            scale = _scale(tl.max(top, 0), REACH, EMPTY, POWERS)
            tl.store(scales + row, scale)
        for start in range(0, k, BLOCK):
            values = tl.load(x + start + at, mask=start + at < k, other=0.0).to(tl.float32)
            found = _codes(values, tl.full((BLOCK,), 1.0, tl.float32) * scale, INT)
            tl.store(codes + start + at, found, mask=start + at < k)


@triton.jit
def _runs(
    x, codes, scales, k: tl.constexpr, runs: tl.constexpr, REACH: tl.constexpr, EMPTY: tl.constexpr,
    COLUMNS: tl.constexpr, EACH: tl.constexpr, POWERS: tl.constexpr, INT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    run = tl.program_id(1) * EACH + tl.arange(0, EACH)
    at = run[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    values = tl.load(x + row * k + at, mask=at < k, other=0.0).to(tl.float32)
    scale = _scale(tl.max(tl.abs(values), 1), REACH, EMPTY, POWERS)
    tl.store(scales + row * runs + run, scale, mask=run < runs)
    found = _codes(values, tl.broadcast_to(scale[:, None], (EACH, COLUMNS)), INT)
    tl.store(codes + row * k + at, found, mask=at < k)
