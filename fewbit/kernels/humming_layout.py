"""What a format is in the terms of humming-kernels: number types by its names, and where each scale is applied.

Scales of groups meet the weights inside the product, in the 16-bit type that is computed in; scales of rows and of the
whole tensor meet the sums after it. Inputs rounded to 8 bits have all of them meet float32 sums.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from fewbit.kernels.input_rounding import Rounding, rounding
from fewbit.quant.elements import E8M0, F32, Element
from fewbit.quant.spec import Format, QuantSpec, Scale

Kind = Literal["tensor", "channel", "group", "block"]
Zeros = Literal["", "codes", "values"]
FLOATS = {
    "e4m3": "float8e4m3", "e4m3-240": "float8e4m3", "e5m2": "float8e5m2", "e2m1": "float4e2m1", "e2m3": "float6e2m3",
    "e3m2": "float6e3m2",
}  # fmt: skip
PLAIN = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
STORED = {"bf16": "bfloat16", "f16": "float16"}
NARROW = {"e4m3": "float8e4m3", "e8m0": "float8e8m0"}
INPUTS = {"e4m3": "float8e4m3", "int8": "int8"}
BLOCK = (128, 128)


@dataclass(frozen=True, slots=True)
class Layout:
    """A format as humming holds it."""

    codes: str
    kind: Kind
    group: int  # columns of a group or block, 0 = all
    scale: str  # number type of scales of groups and blocks
    outer: bool  # float32 scales of the whole tensor or of rows, beside those of groups
    zeros: Zeros  # of groups: whole ones, or such as scales are, (code - zero) * scale as well
    input: Rounding | None

    @property
    def bits(self) -> int:
        return int("".join(c for c in self.codes.partition("e")[0] if c.isdigit()))


def layout(form: Format, dtype: torch.dtype, rounded: bool) -> Layout | str:
    """-> the layout, or why there is none. rounded: scales and zeros may lose bits to the type computed in."""
    spec = form.weight
    codes, placed = _codes(spec.element), _placed(spec, rounded and not form.act)
    how = rounding(form.act) if form.act else None
    if codes is None:
        return f"takes integers of 2 to 8 bits, e4m3, e5m2, e2m1, e2m3 and e3m2, not {spec.element.name}"
    for found in (placed, how):
        if isinstance(found, str):
            return found
    kind, group = placed
    outer = any(map(_is_outer, spec.scales[1:]))
    folded = len(spec.scales) == 2 and not outer
    scale = PLAIN[dtype] if folded else _scale(spec.scales[0].element, kind, dtype, how is not None, rounded)
    reason = (None if scale in KNOWN else scale) or _zeros(spec, rounded) or _meeting(spec, kind, group, how, dtype)
    zeros: Zeros = "" if not spec.zeros else "codes" if spec.zeros_in_codes else "values"
    return reason or Layout(codes, kind, group, scale, outer, zeros, how)


KNOWN = {*STORED.values(), *NARROW.values(), "float32"}


def _codes(element: Element) -> str | None:
    if element.kind == "int" and 2 <= element.bits <= 8:
        return f"uint{int(element.bits)}"
    return FLOATS.get(element.name)


def _placed(spec: QuantSpec, folds: bool) -> tuple[Kind, int] | str:
    """-> where scales are applied and how many columns share one. folds: two planes may become one."""
    inner, *outer = spec.scales or (None,)
    ours = all(_is_outer(scale) or (folds and scale.op == "mul") for scale in outer)
    if inner is None or inner.op != "mul" or len(outer) > 1 or not ours:
        return "takes one plane of scales that multiply, or two where the second is float32, of rows or of the tensor"
    rows, columns = inner.block
    kinds: dict[tuple[int, int], Kind] = {(0, 0): "tensor", (1, 0): "channel", BLOCK: "block"}
    kind = kinds.get(inner.block) or ("group" if rows == 1 and columns in (16, 32, 64, 128, 256, 512) else None)
    if kind is None or (outer and kind != "group"):
        return "takes scales of the tensor, of rows, of 128x128 blocks or of 16 to 512 columns (a power of two)"
    return kind, columns


def _is_outer(scale: Scale) -> bool:
    return scale.block in ((0, 0), (1, 0)) and scale.element is F32 and scale.op in ("mul", "div")


def _scale(element: Element, kind: Kind, dtype: torch.dtype, narrow_input: bool, rounded: bool) -> str:
    """-> the type that scales are held in, or the reason why not."""
    name, own = element.name, PLAIN[dtype]
    if kind in ("tensor", "channel"):
        return "float32" if element.kind == "native" else f"takes float scales of tensors and rows, not {name}"
    if name in NARROW and kind == "group":
        return NARROW[name]
    if kind == "block" and element.kind == "native" and (narrow_input or rounded):
        return "float32"
    if kind == "group" and name in STORED and (narrow_input or STORED[name] == own):
        return STORED[name]
    if element.kind == "native" and rounded:
        return own
    return f"scales in {name} would be rounded to {own}"


def _zeros(spec: QuantSpec, rounded: bool) -> str | None:
    if not spec.zeros:
        return None
    block = spec.scales[0].block
    same = spec.element.kind == "int" and spec.zeros[0].block == block and block != BLOCK
    if not spec.zeros_in_codes:
        between = same and rounded and block[0] == 1 and block[1] > 0 and not spec.element.signed
        return None if between else "zeros between codes would be rounded, or are in other blocks than the scales"
    return None if same and len(spec.zeros) == 1 else "takes integer zeros in the blocks of the scales"


def _meeting(spec: QuantSpec, kind: Kind, group: int, how: Rounding | None, dtype: torch.dtype) -> str | None:
    """Why these weights do not meet inputs rounded so."""
    if how is None:
        return None
    element = spec.element
    widest = 8 if how.element == "int8" else 4
    if spec.zeros or (element.kind == "int" and element.bits > widest) or group == 16:
        return f"beside {how.element} inputs takes integers of up to {widest} bits without zeros, groups of 32 or more"
    if element.kind != "int" and (how.element, element.bits) != ("e4m3", 8):
        return f"beside {how.element} inputs takes no {element.name}"
    if how.columns and how.columns != group:
        return f"takes inputs in runs of {how.columns} beside weights in groups or blocks of as many columns"
    if spec.scales[0].element is E8M0 and dtype is torch.float16:
        return "takes e8m0 scales beside rounded inputs in bfloat16 alone"
    return None
