"""Groups of quantized weights: those that read one input and that engines fuse (q, k, v; gate, up)."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fewbit.compat.insert import matrix, weights
from fewbit.compat.quantizer import Quantizer
from fewbit.models.values import sibling_groups


@dataclass(slots=True)
class Weight:
    """One quantized parameter. path: of its module, of a stack with the projection; members: its [N, K] matrices."""

    path: str
    name: str
    module: Any
    quantizer: Quantizer
    input: Quantizer

    @property
    def members(self) -> tuple[Tensor, ...]:
        w = matrix(self.module, self.name).detach().float()
        return tuple(w) if w.dim() == 3 else (w,)


Group: TypeAlias = list[Weight]  # they read the same input


def grouped(model: nn.Module) -> list[Group]:
    """Quantized weights, those that engines fuse together."""
    found = {}
    for path, name, module, quantizer, inputs in weights(model):
        held = Weight(path if name == "weight" else f"{path}.{name}", name, module, quantizer, inputs)
        if quantizer.enabled or inputs.enabled:
            found[held.path] = held
    groups = [[found[name] for name in names] for names in sibling_groups(found).values()]
    groups = [part for group in groups for part in alike(group)]
    taken = {w.path for group in groups for w in group}
    return groups + [[w] for path, w in found.items() if path not in taken]


def alike(group: Group) -> list[Group]:
    """Siblings that are quantized in one way; the others stand alone."""
    by: dict[Any, Group] = defaultdict(list)
    for w in group:
        by[w.quantizer.spec if w.quantizer.enabled else None, w.input.spec if w.input.enabled else None].append(w)
    return list(by.values())


def share(group: Group) -> None:
    seen = [w.input.amax for w in group if w.input.amax is not None]
    for w in group if seen else ():
        w.input.amax = torch.stack(seen).amax(0)


def share_weights(group: Group) -> None:
    """The outer scale of two is the largest of the siblings'; one that stands alone is each one's own."""
    held = [s for w in group if (s := w.quantizer._scale1) is not None and s.shape == (1, 1)]
    if len(held) == len(group) > 1:
        for w in group:
            w.quantizer._scale1 = torch.stack(held).amax(0)
