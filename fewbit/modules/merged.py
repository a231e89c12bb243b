"""Merged linears: those that read one tensor become one multiplication, and each gives its slice of what comes of it.

The first that is called multiplies for all. What it made is kept for the others under the very tensor it read, and let
go with the last of them; one that is called with another tensor, or with one that was changed in place since,
multiplies anew, which is right and slow.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import SpecError, UnsupportedError
from fewbit.kernels.input_rounding import version
from fewbit.kernels.select import select
from fewbit.modules.linear import Linear, as_run
from fewbit.modules.watched import watched
from fewbit.quant.join import join
from fewbit.quant.qtensor import Quantized


class Merged:
    """What the slices of one linear share."""

    def __init__(self, linear: Linear, sizes: Sequence[int]):
        self.linear, self.sizes = linear, list(sizes)
        self.x: Tensor | None = None
        self.version = 0
        self.waiting: list[Tensor | None] = []

    def run(self, index: int, x: Tensor) -> Tensor:
        if x is not self.x or version(x) != self.version or self.waiting[index] is None:
            self.x, self.version, self.waiting = x, version(x), list(self.linear(x).split(self.sizes, -1))
        y, self.waiting[index] = self.waiting[index], None
        if all(left is None for left in self.waiting):
            self.x, self.waiting = None, []
        assert y is not None
        return y

    def rows(self, index: int, tensor: Tensor) -> Tensor:
        start = sum(self.sizes[:index])
        return tensor[start : start + self.sizes[index]]


class Slice(Linear):
    """One of the linears that were merged. Its weight and bias are views of the whole ones."""

    def __init__(self, merged: Merged, index: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = merged.linear.in_features, merged.sizes[index]
        self.merged, self.index = merged, index
        self.parts = self.pending = ()
        self.options = merged.linear.options
        if index == 0:
            self.whole = merged.linear  # in the tree once, so that it moves with the model

    def forward(self, x: Tensor) -> Tensor:
        return self.merged.run(self.index, x)

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias") and "merged" in self.__dict__:
            whole = getattr(self.merged.linear, name)
            return None if whole is None else self.merged.rows(self.index, whole)
        return nn.Module.__getattr__(self, name)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, merged"


def merge(linears: Sequence[Linear]) -> list[Slice]:
    """Slices to stand in their places; UnsupportedError says why they cannot be merged, and leaves them as they are."""
    if reason := refusal(linears):
        raise UnsupportedError(reason)
    first, sizes = linears[0], [linear.out_features for linear in linears]
    held = joined_pending(linears) if first.pending else None
    weight = joined(linears, "weight") if held is None else None
    whole = Linear(first.in_features, sum(sizes), weight, joined(linears, "bias") if first.bias is not None else None)
    if held is not None:
        whole.bind((held,), first.options)
    merged = Merged(whole, sizes)
    return [Slice(merged, i) for i in range(len(linears))]


def refusal(linears: Sequence[Linear]) -> str:
    """Why they cannot be merged, "" where nothing seen so far says so."""
    if any(type(linear) is not Linear or len({id(m) for m in linears}) < len(linears) for linear in linears):
        return "not each a linear of its own"
    if watched(*linears) or any(linear.parted for linear in linears):
        return "something is done before or after one of them"
    if len({linear.in_features for linear in linears}) > 1:
        return "they read different widths"
    if len({(linear.bias is None, bool(linear.pending), bool(linear.__dict__.get("parts"))) for linear in linears}) > 1:
        return "some have a bias or are quantized, and some are not"
    if linears[0].__dict__.get("parts"):
        return "their weights are in the layout of a kernel"
    held = [p for linear in linears for p in linear._parameters.values() if p is not None]
    return "" if len({(p.dtype, p.device) for p in held}) <= 1 else "their parameters differ in type or place"


def joined(linears: Sequence[Linear], name: str) -> nn.Parameter:
    """Their weights or biases below one another."""
    return nn.Parameter(torch.cat([linear._parameters[name].data for linear in linears]), requires_grad=False)


def joined_pending(linears: Sequence[Linear]) -> Quantized:
    """What waits in each, as one that the same kernel runs."""
    options = linears[0].options
    parts = [as_run(q, options) for linear in linears for q in linear.pending]
    try:
        found = join(parts)
    except SpecError as error:
        raise UnsupportedError(str(error)) from error
    if found.format != parts[0].format:
        device = found.weight.device
        kernels = [
            select("linear", f, device, options.dtype, options.kernels)[0] for f in (parts[0].format, found.format)
        ]
        if kernels[0] is not kernels[1]:
            raise UnsupportedError(f"a scale for each row leaves {kernels[0].name} for {kernels[1].name}")
    return found


__all__ = ["Merged", "Slice", "merge"]
