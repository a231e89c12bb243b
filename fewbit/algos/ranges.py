"""Ranges: the planes of a format from the extremes of its blocks alone, so that another range costs next to nothing.

A spec's rule looks at a block only by its lowest and highest value, so it is asked about pairs of them instead of whole
blocks. Weights are seen as blocks [R, rows, C, cols] (quant.blocks), values of blocks as [R, C].
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from fewbit.quant import elements
from fewbit.quant.blocks import Block, blocked, per_block
from fewbit.quant.elements import Element
from fewbit.quant.qtensor import Planes, QTensor, grid, store
from fewbit.quant.reference import choose, scale_values, zero_values
from fewbit.quant.spec import QuantSpec, Scale

PAIR = (1, 2)  # a block of a low and a high
RULES = ("amax", "range", "mx-ceil", "mx-floor", "mx-round", "four-over-six")


@dataclass(frozen=True, slots=True)
class Ranges:
    """The extremes of every block of one weight, and the outer scale that is not to move."""

    spec: QuantSpec
    low: Tensor  # [R, C]
    high: Tensor
    given: Planes


def block_of(spec: QuantSpec) -> Block:
    return spec.scales[0].block if spec.scales else (0, 0)


def movable(spec: QuantSpec) -> bool:
    """True when the rule of the spec sees extremes only."""
    zeros = all(zero.block == block_of(spec) for zero in spec.zeros) and len(spec.zeros) <= 1
    outer = all(scale.block == (0, 0) and scale.op != "add" for scale in spec.scales[1:])
    return spec.rule in RULES and len(spec.scales) in (1, 2) and zeros and outer


def ranges(w: Tensor, spec: QuantSpec, given: Planes) -> Ranges:
    """w: [N, K]. The outer scale of a two-level spec is the given one, else what the rule chooses for w."""
    x = blocked(w, block_of(spec))
    if len(spec.scales) == 2:
        given = {"scale1": given["scale1"] if "scale1" in given else choose(w, spec, {})["scale1"]}
    return Ranges(spec, x.amin((-3, -1)), x.amax((-3, -1)), given)


def signed(spec: QuantSpec) -> bool:
    """True when scales may be below 0: a symmetric integer holds a positive extreme best on its lowest code."""
    scale = spec.scales[0]
    return spec.element.kind == "int" and not spec.zeros and scale.element.kind == "native" and scale.block[0] == 1


def planes(r: Ranges, low: Tensor, high: Tensor, sign: Tensor | None = None) -> Planes:
    """Unpacked planes for blocks that reach from low to high [R, C]; sign: +-1 of each scale."""
    rule = "amax" if r.spec.rule == "four-over-six" else r.spec.rule
    chain = tuple(replace(s, block=PAIR if i == 0 else s.block) for i, s in enumerate(r.spec.scales))
    zeros = tuple(Scale(zero.element, PAIR, zero.op) for zero in r.spec.zeros)
    small = replace(r.spec, scales=chain, zeros=zeros, rule=rule)
    chosen = choose(torch.stack((low, high), -1).flatten(-2), small, r.given)
    if sign is None or not signed(r.spec):
        return chosen
    return chosen | {"scale0": chosen["scale0"] * sign.to(chosen["scale0"].dtype)}


def values(chosen: Planes, spec: QuantSpec, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """The multiplier and the offset of each block, ready to meet a blocked weight: [R, 1, C, 1]."""
    stored = {}
    for name, plane in chosen.items():
        scale = (spec.scales if name.startswith("scale") else spec.zeros)[int(name[-1])]
        stored[name] = store(plane.expand(grid(shape, scale.block)), scale.element)
    q = QTensor(spec, shape, stored)
    zero = zero_values(q)
    return per_block(scale_values(q)), None if zero is None else per_block(zero)


def in_codes(x: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    """Values of blocks -> what rounds to codes, in memory of its own."""
    if zero is None:
        return x / scale
    return (x / scale).add_(zero) if spec.zeros_in_codes else (x + zero).div_(scale)


def from_codes(x: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    """The inverse, in place; the same arithmetic as reference.decode, so that equal codes are equal values."""
    if zero is None:
        return x.mul_(scale)
    return x.sub_(zero).mul_(scale) if spec.zeros_in_codes else x.mul_(scale).sub_(zero)


def spacing(x: Tensor, element: Element) -> Tensor | float:
    """How far apart the two values of the element are that x lies between."""
    if element.kind in ("int", "native"):
        return 1.0 if element.kind == "int" else 0.0  # a value of 16 bits or more is left to round by itself
    table = _sorted(element).to(x.device)
    above = torch.bucketize(x, table).clamp_(1, len(table) - 1)
    return table.diff()[above - 1]


@cache
def _sorted(element: Element) -> Tensor:
    table = elements.values(element)
    found: Tensor = torch.unique(table[table.isfinite()])
    return found
