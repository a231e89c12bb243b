"""Values rounded through a spec in one pass: quant.reference.fake_quant bit for bit, and counted what it cuts off.

round.cpp does it on a CPU, triton_round on a GPU; what neither takes is left to the reference.
"""

import ctypes
import math
import struct
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fewbit.kernels import saturation, triton_runtime
from fewbit.kernels.compiled import call, left, library
from fewbit.quant.elements import E4M3, E8M0, F32
from fewbit.quant.qtensor import Planes
from fewbit.quant.reference import fake_quant
from fewbit.quant.spec import QuantSpec, Scale

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
GIVEN, AMAX, FLOOR, ROUND, CEIL, TWO = range(6)  # how a scale is found; round.cpp and triton_round number them so too
MX = {"mx-floor": FLOOR, "mx-round": ROUND, "mx-ceil": CEIL}
INTEGER = 1 << 20  # the fraction bits of a whole number: more than any float here has


@dataclass(frozen=True, slots=True)
class Grid:
    """Which multiples of its scale a value may take, and where the scale comes from."""

    fraction: int  # bits of a float's fraction, or INTEGER
    least: int  # the exponent of its smallest normal number
    low: float
    high: float
    rule: int
    columns: int  # that share a scale, 0 = a row; of GIVEN: all
    reach: float  # the magnitude that a scale puts the largest value on
    power: int  # of two, the largest in reach
    empty: float  # the scale where all values are 0
    divides: bool  # TWO: the outer scale is stored as its reciprocal
    whole: bool  # TWO: the outer scale is chosen at each call, from all values


@cache
def grid(spec: QuantSpec) -> Grid | str:
    """-> how, or why neither takes it."""
    element = spec.element
    if spec.zeros or element.kind not in ("int", "float"):
        return f"rounds to whole numbers and floats without zeros, not to {element.name}"
    rule, columns = _scales(spec)
    if rule is None:
        return "takes one scale, given or of each run of a row, in float32 or e8m0, or such of e4m3 under one of all"
    reach = (element.max - element.min) / 2 if spec.rule == "range" else element.max
    empty = torch.finfo(torch.float32).eps if spec.rule == "range" else 1.0
    fraction, least = (INTEGER, 0) if element.kind == "int" else (element.mantissa, 1 - element.bias)
    outer = spec.scales[1] if rule == TWO else None
    return Grid(fraction, least, element.min, element.max, rule, columns, reach, math.frexp(element.max)[1] - 1, empty,
                outer is not None and outer.op == "div", outer is not None and outer.dynamic)  # fmt: skip


def _scales(spec: QuantSpec) -> tuple[int | None, int]:
    """-> the rule and the columns of a run."""
    plain = spec.rule in ("amax", "range")
    match spec.scales:
        case ():
            return GIVEN, 0
        case (Scale(element=e, block=(0, 0), op="mul", dynamic=False),) if e is F32 and plain:
            return GIVEN, 0
        case (Scale(element=e, block=(1, columns), op="mul", dynamic=True),) if e is F32 and plain:
            return AMAX, columns
        case (Scale(element=e, block=(1, columns), op="mul", dynamic=True),) if e is E8M0 and columns:
            return MX.get(spec.rule), columns
        case (Scale(element=e, block=(1, columns), op="mul", dynamic=True), Scale(element=o, block=(0, 0), op=op)) if (
            e is E4M3 and columns and o is F32 and plain and op in ("mul", "div")
        ):
            return TWO, columns
    return None, 0


def rounded(x: Tensor, spec: QuantSpec, planes: Planes) -> Tensor:
    """x: [..., K] -> the same, rounded. planes: static scales, as stored."""
    how = grid(spec)
    if isinstance(how, Grid) and x.numel() and (how.columns == 0 or x.shape[-1] % how.columns == 0):
        given = _given(how, spec, planes)
        cut = saturation.count_of(x.device) if how.rule == GIVEN and spec.scales else None
        if x.device.type == "cuda" and triton_runtime.lacking(x.device) is None:
            from fewbit.kernels import triton_round

            return triton_round.rounded(x, how, given, cut)
        ours = x.device.type == "cpu" and x.dtype in DTYPES and not left()
        if ours and isinstance(built := library("round"), ctypes.CDLL):
            return _on_cpu(built, x.contiguous(), how, given, cut)
    saturation.count(x, spec, planes)
    return fake_quant(x, spec, planes)


def _given(how: Grid, spec: QuantSpec, planes: Planes) -> Tensor | None:
    """-> [1] float32: the scale of everything, where it is given."""
    name = {GIVEN: "scale0" if spec.scales else "", TWO: "" if how.whole else "scale1"}.get(how.rule)
    return planes[name].float().reshape(1) if name else None


def _searched(x: Tensor, how: Grid) -> Tensor:
    """-> [1] float32: the outer scale, under the largest of all values."""
    low, high = torch.aminmax(x)
    amax, most = torch.maximum(-low, high).float(), how.reach * E4M3.max
    if how.divides:
        return (most / amax.clamp(min=torch.finfo(torch.float32).tiny)).nan_to_num(posinf=1.0).reshape(1)
    return torch.where(amax > 0, amax / most, 1.0).reshape(1)


CALL = struct.Struct("4P2q6i4f")  # round.cpp's Round, in the types and the alignment of C


def _on_cpu(built: ctypes.CDLL, x: Tensor, how: Grid, given: Tensor | None, cut: Tensor | None) -> Tensor:
    out = torch.empty_like(x)
    columns = how.columns or x.shape[-1]
    given = _searched(x, how) if how.whole else given
    call(built.round_values, CALL.pack(
        x.data_ptr(), out.data_ptr(), 0 if given is None else given.data_ptr(), 0 if cut is None else cut.data_ptr(),
        x.numel() // columns, columns, DTYPES[x.dtype], how.fraction, how.least, how.rule, how.power, how.divides,
        how.low, how.high, how.reach, how.empty,
    ))  # fmt: skip
    return out
