"""A mixture of experts beside a shared one: what stands for the forward of a module that adds up the two.

Where experts stay on the device, the sum is made where each token's experts are added up; their own code does all else.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fewbit.modules import experts
from fewbit.modules.watched import watched


@dataclass(frozen=True, slots=True)
class MixtureForm:
    """Names of children. flat: the router is called with [T, H]."""

    router: str
    stack: str
    shared: str
    flat: bool

    def __str__(self) -> str:
        return f"{self.stack} by {self.router} + {self.shared}"


def forward(module: Any, form: MixtureForm, hidden: Tensor) -> Tensor:
    """hidden: [..., H] -> [..., H]"""
    host, flat = getattr(module, form.stack), hidden.reshape(-1, hidden.shape[-1])
    _, weights, index = getattr(module, form.router)(flat if form.flat else hidden)
    shared: Tensor = getattr(module, form.shared)(hidden)
    if watched(host) or not experts.stays_on_device(host, flat):
        y: Tensor = host(flat, index, weights).view(hidden.shape) + shared
        return y
    return experts.by_device(host, flat, index, weights, shared.reshape(flat.shape)).view(hidden.shape)
