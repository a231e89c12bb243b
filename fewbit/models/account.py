"""Accounting: what the config says is one parameter becomes one; every parameter and every tensor is answered for."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.models import hf
from fewbit.models.fill import Filler, Tensors, owner
from fewbit.models.placement import Placement
from fewbit.modules.embedding import Embedding
from fewbit.modules.linear import Linear
from fewbit.quant.qtensor import Quantized
from fewbit.quant.spec import Format

SHOWN = 12  # names listed in one error


def finish(filler: Filler, places: Mapping[str, Placement | None], source: Tensors) -> None:
    """Tie what shares memory, then account for every parameter and every tensor; all findings at once."""
    tie(filler)
    missing, surplus = hf.optional(filler.model)
    faults = [
        f"{path}: {filled_text(filler, path, shape)}"
        for path, shape in filler.rules.parameters.items()
        if filler.filled[path] != size(shape) and not (matches(missing, path) and not filler.filled[path])
    ]
    asked = {name: f"{name}.weight" if name in source.modules else name for name, p in places.items() if p is None}
    faults += [f"{n}: the model has no place for it" for n, query in asked.items() if not matches(surplus, query)]
    faults += [f"{', '.join(held)}: waits for tensors that did not come" for held in filler.waiting.values()]
    if faults:
        shown = faults[:SHOWN] + ([f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else [])
        raise CheckpointError("\n".join(["the checkpoint does not fill the model:", *(f"  - {f}" for f in shown)]))
    initialize_rest(filler)


def matches(pattern: re.Pattern[str] | None, name: str) -> bool:
    return pattern is not None and pattern.search(name) is not None


def size(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def filled_text(filler: Filler, path: str, shape: Sequence[int]) -> str:
    got = filler.filled[path]
    return f"missing, the model holds {list(shape)}" if not got else f"{got} of {size(shape)} values on disk"


def tie(filler: Filler) -> None:
    """Parameters that the config says are one: whichever was on disk serves both; two different ones stay two."""
    model = filler.model
    for target, origin in hf.ties(model).items():
        has_target, has_origin = bool(filler.filled[target]), bool(filler.filled[origin])
        if has_target and has_origin:
            if same(model, target, origin):
                share(filler, origin, target)
        elif has_origin:
            share(filler, origin, target)
        elif has_target:
            share(filler, target, origin)


def same(model: nn.Module, target: str, origin: str) -> bool:
    found = [module._parameters.get(leaf) for module, leaf in (owner(model, target), owner(model, origin))]
    return all(p is not None for p in found) and torch.equal(*found)


def share(filler: Filler, origin: str, target: str) -> None:
    """Let target be origin: a parameter, or the codes of a quantized embedding under the head."""
    module, leaf = owner(filler.model, origin)
    other, other_leaf = owner(filler.model, target)
    filler.filled[target] = size(filler.rules.parameters[target])
    if isinstance(module, Embedding) and isinstance(other, Linear):
        other.bind((Quantized(Format(module.table.spec), module.table),), filler.options)
    elif leaf in module._parameters:
        other._parameters[other_leaf] = module._parameters[leaf]
    elif leaf in module._buffers:
        other._buffers[other_leaf] = module._buffers[leaf]
    else:
        raise UnsupportedError(f"{target} shares memory with {origin}, which is quantized in a way it cannot use")


def initialize_rest(filler: Filler) -> None:
    """Parameters that may be missing and are: transformers' own starting value."""
    rest = [path for path in filler.rules.parameters if not filler.filled[path]]
    for path in rest:
        module, leaf = owner(filler.model, path)
        held = module._parameters if leaf in module._parameters else module._buffers
        value = torch.zeros(held[leaf].shape, dtype=held[leaf].dtype, device=filler.device)
        held[leaf] = nn.Parameter(value, requires_grad=False) if held is module._parameters else value
