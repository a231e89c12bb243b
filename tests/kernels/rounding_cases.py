"""Specs and numbers that rounding in one pass is held against fake_quant on, here and on a GPU."""

from dataclasses import replace

import torch
from torch import Tensor

from fewbit.kernels.rounded import Grid, grid
from fewbit.quant.elements import E4M3, E8M0, ELEMENTS, F32
from fewbit.quant.formats import FORMATS
from fewbit.quant.spec import QuantSpec, spec

NARROW = [e for e in ELEMENTS.values() if e.kind in ("int", "float") and e.signed and e.bits > 1]
SPECS: dict[str, QuantSpec] = {f"inputs of {name}": form.act for name, form in FORMATS.items() if form.act}
for e in NARROW:
    two = spec(e, (E4M3, 1, 16), (F32, 0, 0), dynamic=1)
    SPECS |= {
        f"{e.name} given": spec(e, (F32, 0, 0)),
        f"{e.name} by row": spec(e, (F32, 1, 0), dynamic=1),
        f"{e.name} by 32": spec(e, (F32, 1, 32), dynamic=1),
        f"{e.name} by range": spec(e, (F32, 1, 0), rule="range", dynamic=1),
        **{f"{e.name} {rule}": spec(e, (E8M0, 1, 32), rule=rule, dynamic=1)
           for rule in ("mx-ceil", "mx-floor", "mx-round")},
        f"{e.name} in two levels": two,
        f"{e.name} under a reciprocal": replace(two, scales=(two.scales[0], replace(two.scales[1], op="div"))),
        f"{e.name} under the largest of all": spec(e, (E4M3, 1, 16), (F32, 0, 0), dynamic=2),
    }  # fmt: skip
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def planes(s: QuantSpec) -> dict[str, Tensor]:
    """Static scales, of no round number."""
    at = {"mul": 0.0371, "div": 1 / 0.0371}
    return {f"scale{i}": torch.full((1, 1), at[scale.op]) for i, scale in enumerate(s.scales) if not scale.dynamic}


def numbers(dtype: torch.dtype, columns: int) -> Tensor:
    """[2, 24, columns]: of every size, ties, a row of zeros, one of a single value, and signs of zero."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(48, columns, generator=draw) * torch.logspace(-6, 4, 48)[:, None]
    x[1::4] = (x[1::4] * 4).round() / 4  # ties
    x[2] = 0
    x[3] = -0.0
    x[5, 1:] = 0
    x[7] = torch.finfo(dtype).tiny
    x[9] = torch.finfo(dtype).max * torch.sign(torch.randn(columns, generator=draw))
    return x.to(dtype).view(2, 24, columns)


def lacking(s: QuantSpec) -> str | None:
    how = grid(s)
    return None if isinstance(how, Grid) else how
