"""Rounding to the values of an element, not to its codes: what loops over columns and over trial scales do most.

`nearest` agrees with decode of encode for every value, and stays in float32 all the way.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fewbit.quant import elements
from fewbit.quant.elements import Element
from fewbit.quant.spec import QuantSpec

Round = Callable[[Tensor, Tensor], Tensor]  # (x, out) -> out, which may be x


def middle(spec: QuantSpec) -> float:
    """Codes with integer zeros are rounded around the middle one, as quant.reference rounds them."""
    return float(2 ** (int(spec.element.bits) - 1)) if spec.zeros_in_codes else 0.0


@cache
def nearest(element: Element, shift: float = 0.0) -> Round:
    """-> a function that rounds to the values of the element, less `shift`."""
    if element.kind == "int":
        low, high = element.min - shift, element.max - shift
        return lambda x, out: torch.round(x, out=out).clamp_(low, high)
    if element.kind == "float":
        return _float(element)
    return lambda x, out: out.copy_(elements.decode(elements.encode(x, element), element))


def _float(element: Element) -> Round:
    """The step between neighbours is a power of two that the exponent of x gives, but below the normals it is fixed."""
    top, finest = element.top, 2.0 ** (1 - element.bias - element.mantissa)
    shift = element.mantissa << 23

    def to_float(x: Tensor, out: Tensor) -> Tensor:
        power = x.contiguous().view(torch.int32) & 0x7F800000
        step = (power - shift).clamp_(min=0).view(torch.float32).clamp_(min=finest)
        return torch.div(x, step, out=out).round_().mul_(step).clamp_(-top, top)

    return to_float
