"""Rounding to the values of an element, not to its codes: what loops over columns and over trial scales do most.

`nearest` agrees with decode of encode for every value, and stays in float32 all the way: few small operations on a CPU,
on a GPU even fewer, because there each one costs a launch.
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


def decoded(codes: Tensor, element: Element) -> Tensor:
    """elements.decode without its table, which would travel to a GPU at each call."""
    return codes.view(torch.float8_e4m3fn).float() if element.name == "e4m3" else elements.decode(codes, element)


def nearest(element: Element, device: torch.device, shift: float = 0.0) -> Round:
    """-> a function that rounds to the values of the element, less `shift`."""
    if element.kind == "int":
        low, high = element.min - shift, element.max - shift
        return lambda x, out: torch.round(x, out=out).clamp_(low, high)
    if element.kind == "float" and device.type == "cpu":
        return _by_steps(element)
    return _by_edges(*_edges(element, device))


def _by_edges(edges: Tensor, values: Tensor) -> Round:
    def to_value(x: Tensor, out: Tensor) -> Tensor:
        bins = torch.bucketize(x.contiguous().view(-1), edges, out_int32=True)
        if out.is_contiguous():
            torch.index_select(values, 0, bins, out=out.view(-1))
        else:
            out.copy_(values.index_select(0, bins).view(x.shape))
        return out

    return to_value


def _by_steps(element: Element) -> Round:
    """The step between neighbours is a power of two that the exponent of x gives, but below the normals it is fixed."""
    top, finest = element.top, 2.0 ** (1 - element.bias - element.mantissa)
    shift = element.mantissa << 23

    def to_float(x: Tensor, out: Tensor) -> Tensor:
        power = x.contiguous().view(torch.int32) & 0x7F800000
        step = (power - shift).clamp_(min=0).view(torch.float32).clamp_(min=finest)
        return torch.div(x, step, out=out).round_().mul_(step).clamp_(-top, top)

    return to_float


@cache
def _edges(element: Element, device: torch.device) -> tuple[Tensor, Tensor]:
    """-> the largest x that goes to each value but the last, and the values, in order."""
    values = elements.values(element)
    values = torch.unique(values[torch.isfinite(values)])
    middles = ((values[1:].double() + values[:-1].double()) / 2).float()
    upward = elements.decode(elements.encode(middles, element), element) == values[1:]
    edges = torch.where(upward, torch.nextafter(middles, torch.full_like(middles, -torch.inf)), middles)
    return edges.to(device), values.to(device)
