"""Norm: RMSNorm and LayerNorm in the few forms that models write them in, one call of a kernel.

The forms differ in where they round, which 16-bit types notice: the weight comes after the cast back from float32, or
before it. In plain torch each is the order of operations that models have.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewbit.kernels import fused
from fewbit.kernels.input_rounding import Wanted
from fewbit.modules.watched import watched

Times = Literal["late", "wide", "plus"]
TIMES: dict[Times, str] = {"late": "w after the cast", "wide": "w", "plus": "1 + w"}


@dataclass(frozen=True, slots=True)
class NormForm:
    """times: what the normalised input is multiplied by. centred: the mean is taken out first."""

    eps: float
    times: Times = "wide"
    centred: bool = False

    def __str__(self) -> str:
        kind = "layer norm" if self.centred else "RMS norm"
        return f"{kind} times {TIMES[self.times]}, eps {self.eps:g}"


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, form: NormForm) -> Tensor:
    """x: [..., D], weight and bias: [D] -> [..., D]; the oracle."""
    h = x.float()
    if form.centred:
        h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + form.eps)
    if form.times == "late":
        h = h.to(x.dtype)
        h = h if weight is None else weight * h
        return h if bias is None else h + bias
    if weight is not None:
        h = h * (1.0 + weight.float() if form.times == "plus" else weight.float())
    return (h if bias is None else h + bias.float()).to(x.dtype)


def normed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, form: NormForm, wanted: Wanted | None = None
) -> Tensor:
    """The same by the kernel that takes it. wanted: how its reader rounds it, where a kernel does that at once."""
    run: Any = None
    if x.is_cuda:
        run = kernel() if kernel().takes(x) else None
    elif fused.takes_norm(x, weight, bias):
        run = fused
    if run is None:
        return norm(x, weight, bias, form)
    more = (wanted,) if x.is_cuda else ()
    y: Tensor = run.norm(x, weight, bias, form.eps, form.times, form.centred, *more)
    return y


def pair(a: nn.Module, b: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """a(x) and b(y), in one launch where both are ours, alike, and nobody looks on."""
    if not (isinstance(a, Norm) and isinstance(b, Norm) and a.weight is not None and b.weight is not None):
        return a(x), b(y)
    bare = a.bias is None and b.bias is None and replace(a.form, eps=b.form.eps) == b.form
    if not bare or watched(a, b):
        return a(x), b(y)
    return normed_pair(x, a.weight, a.form, y, b.weight, b.form)


def normed_pair(
    x: Tensor, weight: Tensor, form: NormForm, y: Tensor, other: Tensor, of_other: NormForm
) -> tuple[Tensor, Tensor]:
    """Forms differ in eps alone."""
    if x.is_cuda and kernel().takes_pair(x, y):
        found: tuple[Tensor, Tensor] = kernel().pair(
            x, weight, form.eps, y, other, of_other.eps, form.times, form.centred
        )
        return found
    return normed(x, weight, None, form), normed(y, other, None, of_other)


class Norm(nn.Module):
    """Stands where a model's own norm stood, its parameters shared."""

    def __init__(self, weight: nn.Parameter | None, bias: nn.Parameter | None, form: NormForm):
        super().__init__()
        self.form, self.wanted = form, Wanted()
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)

    @property
    def norm_parts(self) -> fused.NormParts:
        """As kernels are given them."""
        held, form = self._parameters, self.form
        return held["weight"], held["bias"], form.eps, form.times, form.centred

    def forward(self, x: Tensor) -> Tensor:
        """x: or a Later, which may add as it norms: see modules.residual."""
        if not isinstance(x, Tensor):
            y: Tensor = x.normed(self)
            return y
        return normed(x, self.weight, self.bias, self.form, self.wanted)

    def extra_repr(self) -> str:
        return str(self.form)


@cache
def kernel() -> Any:
    from fewbit.kernels import triton_norm

    return triton_norm
