"""How kernels round the inputs of a product to codes, read off the activation spec of a format.

A row's scale is its largest magnitude over what the element reaches, as quant.reference computes it.
"""

from dataclasses import dataclass

import torch

from fewbit.quant.elements import E4M3, E8M0, F32, INT8
from fewbit.quant.spec import QuantSpec

DTYPES = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True, slots=True)
class Rounding:
    """columns: of a run that shares a scale, 0 = a whole row; given: one scale for everything is stored."""

    element: str
    columns: int
    given: bool
    reach: float  # the magnitude that the scale puts the largest value on
    empty: float  # the scale where all values are 0
    powers: bool  # scales are powers of two, rounded up

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.element]


def rounding(spec: QuantSpec) -> Rounding | str:
    """-> how, or why none of ours does it."""
    if spec.element not in (E4M3, INT8) or spec.zeros or len(spec.scales) != 1:
        return f"rounds inputs to e4m3 or int8 with one scale, not to {spec.element.name} with {len(spec.scales)}"
    scale, element = spec.scales[0], spec.element
    powers = (scale.element, spec.rule) == (E8M0, "mx-ceil")
    plain = scale.element is F32 and spec.rule in ("amax", "range")
    if scale.op != "mul" or not (powers or plain):
        return f"chooses float32 scales by amax or range, e8m0 by mx-ceil; not {scale.element.name} by {spec.rule}"
    rows, columns = scale.block
    by_row = scale.dynamic and rows == 1 and columns in (0, 32, 64, 128)
    given = not scale.dynamic and scale.block == (0, 0) and plain
    if not (by_row or given):
        return "rounds inputs by token, by runs of 32, 64 or 128 columns, or with one stored scale"
    reach = (element.max - element.min) / 2 if spec.rule == "range" else element.max
    empty = torch.finfo(torch.float32).eps if spec.rule == "range" else 1.0
    return Rounding(element.name, columns, given, reach, empty, powers)
