"""Gated MLP: down(act(gate(x)) * up(x)), gate and up two linears or the halves of one; act * up is one kernel.

An activation is a row of ACTIVATIONS: a function of torch, and the name under which the kernel knows it. Some models
hold gate and up within a limit before that, and add a number to up: a Gating says all of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewbit.kernels import fused
from fewbit.kernels.input_rounding import Wanted
from fewbit.kernels.rows import times
from fewbit.modules.linear import Linear
from fewbit.modules.merged import Slice
from fewbit.modules.watched import watched

ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "silu": lambda x, _: functional.silu(x),
    "gelu": lambda x, _: functional.gelu(x),
    "gelu_tanh": lambda x, _: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x, alpha: x * torch.sigmoid(alpha * x),
    "relu": lambda x, _: functional.relu(x),
    "relu2": lambda x, _: functional.relu(x).square(),
    "sigmoid": lambda x, _: torch.sigmoid(x),
}
ALPHA = {"quick_gelu": 1.702}  # the number of those that have one, as their name alone means it
Half = Literal["first", "last", "even"]
Scales = tuple[Tensor | None, Tensor | None, Tensor | None]  # of rows, of gate's columns, of up's
HALVES: dict[Half, Callable[[Tensor], tuple[Tensor, ...]]] = {  # -> gate, up
    "first": lambda x: x.chunk(2, -1),
    "last": lambda x: x.chunk(2, -1)[::-1],
    "even": lambda x: (x[..., ::2], x[..., 1::2]),
}


@dataclass(frozen=True, slots=True)
class Gating:
    """act(gate) * (up + plus), of a gate of at most `limit` and an up within it on both sides."""

    act: str
    alpha: float = 1.0  # of those that have one
    limit: float = inf
    plus: float = 0.0

    def __str__(self) -> str:
        """Of the activation alone."""
        alpha = f" {self.alpha:g}" if self.alpha != ALPHA.get(self.act, 1.0) else ""
        return self.act + alpha


@dataclass(frozen=True, slots=True)
class GluForm:
    """Names of the linears in the module. up "": gate is one half of what `gate` gives."""

    gating: Gating
    gate: str
    up: str
    down: str
    half: Half = "first"

    def __str__(self) -> str:
        by, gate = self.gating, self.gate if self.up else f"{self.half} half of {self.gate}"
        up = self.up or "the other"
        up = f"({up} + {by.plus:g})" if by.plus else up
        return f"{self.down}({by}({gate}) * {up}{f', both within {by.limit:g}' if by.limit < inf else ''})"


def forward(module: nn.Module, form: GluForm, x: Tensor) -> Tensor:
    """What stands for a gated MLP's own forward. x: [..., K] -> [..., K]."""
    gate, up, *scales = halves(module, form, x)
    down: nn.Module = getattr(module, form.down)
    wanted = module.__dict__.setdefault("fewbit_wanted", Wanted())
    wanted.codes_only = type(down) is Linear and len(down.parts) == 1 and not watched(down)
    y: Tensor = down(act_mul(gate, up, form.gating, wanted, *scales))
    return y


def halves(module: nn.Module, form: GluForm, x: Tensor) -> tuple[Any, ...]:
    """gate, up, and their Scales where those are left to the kernel, which is the only one to read them."""
    first, second = getattr(module, form.gate), getattr(module, form.up) if form.up else None
    if x.is_cuda and (whole := maker(first, second)) is not None:
        order = form.half if second is None else "first" if first.index == 0 else "last"
        y, rows, columns = whole.unscaled(x)
        scales = () if rows is None and columns is None else (
            (rows, *(HALVES[order](columns) if columns is not None else (None, None))),)  # fmt: skip
        return *HALVES[order](y), *scales
    made = first(x)
    return (made, second(x)) if second is not None else HALVES[form.half](made)


def maker(first: nn.Module, second: nn.Module | None) -> Linear | None:
    """The one linear that makes both and nothing else, unless somebody watches what they make."""
    whole = first
    if second is not None:
        if not (isinstance(first, Slice) and isinstance(second, Slice) and first.merged is second.merged):
            return None
        whole = first.merged.linear
        if len(first.merged.sizes) > 2:
            return None
    return whole if type(whole) is Linear and not watched(first, second, whole) else None


def act_mul(gate: Tensor, up: Tensor, by: Gating, wanted: Wanted | None = None, scales: Scales | None = None) -> Tensor:
    """gate, up: [..., N], also strided -> [..., N], by the kernel that takes them. wanted: of who reads it."""
    run: Any = None
    if gate.is_cuda:
        run = kernel() if kernel().takes(gate, up) else None
    elif fused.takes_gate(gate, up, by.act):
        run = fused
    if run is None:
        return multiplied(*scaled(gate, up, scales), by)
    more = (wanted, scales) if gate.is_cuda else ()
    y: Tensor = run.act_mul(gate, up, by.act, by.alpha, by.limit, by.plus, *more)
    return y


def scaled(gate: Tensor, up: Tensor, scales: Scales | None) -> tuple[Tensor, Tensor]:
    """The two times their scales, rounded."""
    if scales is None:
        return gate, up
    rows, *columns = scales
    return times(gate, rows, columns[0]), times(up, rows, columns[1])


def multiplied(gate: Tensor, up: Tensor, by: Gating) -> Tensor:
    """The same in the operations that models write; the oracle."""
    if by.limit < inf:
        gate, up = gate.clamp(max=by.limit), up.clamp(-by.limit, by.limit)
    return ACTIVATIONS[by.act](gate, by.alpha) * (up + by.plus if by.plus else up)


@cache
def kernel() -> Any:
    from fewbit.kernels import triton_glu

    return triton_glu
