"""How kernels round the inputs of a product to codes, read off the activation spec of a format.

A row's scale is its largest magnitude over what the element reaches, as quant.reference computes it. Who makes a tensor
may round its rows as it does: what reads it says how (`Wanted`), and from then on the tensor comes with its codes.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fewbit.quant.elements import E4M3, E8M0, F32, INT8
from fewbit.quant.spec import QuantSpec

DTYPES = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True, slots=True)
class Rounding:
    """columns: of a run that shares a scale, 0 = a whole row; given: one scale for everything is stored.

    ranks: who have the other parts of the rows, where a scale is of all of them.
    """

    element: str
    columns: int
    given: bool
    reach: float  # the magnitude that the scale puts the largest value on
    empty: float  # the scale where all values are 0
    powers: bool  # scales are powers of two, rounded up
    ranks: Any = None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.element]


@dataclass(slots=True)
class Wanted:
    """How a tensor's reader rounds its rows, known to its maker from the second call on."""

    how: Rounding | None = None
    codes_only: bool = False  # it reads nothing else where there are codes as it rounds
    mail: Tensor | None = None  # by which programs of one maker that share a row agree on its scale

    @property
    def alone(self) -> Rounding | None:
        """For a maker that asks no other rank."""
        return None if self.how is None or self.how.ranks is not None else self.how


Codes = tuple[Tensor, Tensor]
Unscaled = tuple[Tensor, Tensor | None, Tensor | None]  # [..., N], and float32 [M, 1] and [N] that it is to be times


def version(x: Tensor) -> int:
    """How often a tensor was changed in place, as far as torch counts: in inference mode it does not."""
    return 0 if x.is_inference() else x._version


def offer(made: Tensor, wanted: Wanted, codes: Codes | None) -> Tensor:
    """A tensor just made, so that its reader can say how it rounds it, with codes where it has."""
    held: Any = made
    held.fewbit_wanted, held.fewbit_codes = wanted, (wanted.how, codes, version(made))
    return made


def offered(x: Tensor, how: Rounding) -> Codes | None:
    """The codes that x came with; if there are none, its maker hears of it."""
    wanted: Wanted | None = getattr(x, "fewbit_wanted", None)
    if wanted is None or how.columns or how.given:
        return None
    made, codes, then = x.fewbit_codes  # type: ignore[attr-defined]
    wanted.how = how
    fits, alone = made == how and then == version(x), codes is not None and wanted.codes_only
    assert fits or not alone, f"codes of {made} are all there is, and {how} was asked for, or x is another by now"
    return codes if fits else None


@cache
def nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1] NaN, which stands for what nobody is to read."""
    return torch.full((1,), torch.nan, dtype=dtype, device=device)


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
