"""Gated MLP: down(act(gate(x)) * up(x)), gate and up two linears or the halves of one; act * up is one kernel.

An activation is a row of ACTIVATIONS: a function of torch, and the name under which the kernel knows it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewbit.kernels import fused

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True, slots=True)
class GluForm:
    """Names of the linears in the module. up "": gate is the first half of what `gate` gives, or the last half."""

    act: str
    gate: str
    up: str
    down: str
    last: bool = False

    def __str__(self) -> str:
        packed = f"{'last' if self.last else 'first'} half of {self.gate}"
        return f"{self.down}({self.act}({self.gate if self.up else packed}) * {self.up or 'the other'})"


def forward(module: nn.Module, form: GluForm, x: Tensor) -> Tensor:
    """What stands for a gated MLP's own forward. x: [..., K] -> [..., K]."""
    gate = getattr(module, form.gate)(x)
    if form.up:
        up = getattr(module, form.up)(x)
    else:
        gate, up = gate.chunk(2, -1)[:: -1 if form.last else 1]
    y: Tensor = getattr(module, form.down)(act_mul(gate, up, form.act))
    return y


def act_mul(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """gate, up: [..., N], also strided -> act(gate) * up."""
    if gate.is_cuda and (run := kernel()).takes(gate, up):
        y: Tensor = run.act_mul(gate, up, act)
        return y
    if fused.takes_gate(gate, up, act):
        return fused.act_mul(gate, up, act)
    return ACTIVATIONS[act](gate) * up


@cache
def kernel() -> Any:
    from fewbit.kernels import triton_glu

    return triton_glu
