"""Accounting: what the config says is one parameter becomes one; every parameter and every tensor is answered for."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import nn

from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.models import hf
from fewbit.models.fill import Filler, Tensors, assign, owner
from fewbit.models.placement import Placement
from fewbit.modules.embedding import Embedding
from fewbit.modules.linear import Linear
from fewbit.quant.qtensor import Quantized
from fewbit.quant.spec import Format

SHOWN = 12  # names listed in one error


def finish(filler: Filler, places: Mapping[str, Placement | None], source: Tensors, skip: Collection[str] = ()) -> None:
    """Tie what shares memory, then account for every parameter and every tensor; all findings at once.

    skip: names of findings of verify to let pass: missing-tensor (zeros stand in), unknown-tensor (not read).
    """
    tie(filler)
    faults = [f"{', '.join(held)}: waits for tensors that did not come" for held in filler.waiting.values()]
    faults += list(unfilled(filler, skip))
    if "unknown-tensor" not in skip:
        faults += list(left_over(filler, places, source))
    if faults:
        shown = faults[:SHOWN] + ([f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else [])
        raise CheckpointError("\n".join(["the checkpoint does not fill the model:", *(f"  - {f}" for f in shown)]))
    zero_rest(filler)


def unfilled(filler: Filler, skip: Collection[str]) -> Iterator[str]:
    missing, _ = hf.optional(filler.model)
    for path, shape in filler.rules.parameters.items():
        got = filler.filled[path]
        if not got and not matches(missing, path) and "missing-tensor" not in skip:
            yield f"{path}: missing, the model holds {list(shape)}"
        elif got and got != size(shape):
            yield f"{path}: {got} of {size(shape)} values on disk"


def left_over(filler: Filler, places: Mapping[str, Placement | None], source: Tensors) -> Iterator[str]:
    _, surplus = hf.optional(filler.model)
    for name, place in places.items():
        if place is None and not matches(surplus, f"{name}.weight" if name in source.modules else name):
            yield f"{name}: the model has no place for it"


def matches(pattern: re.Pattern[str] | None, name: str) -> bool:
    return pattern is not None and pattern.search(name) is not None


def size(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


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


def zero_rest(filler: Filler) -> None:
    """What may be missing and is."""
    for path in [path for path in filler.rules.parameters if not filler.filled[path]]:
        module, leaf = owner(filler.model, path)
        held = module._parameters.get(leaf)
        held = module._buffers[leaf] if held is None else held
        assign(module, leaf, torch.zeros(held.shape, dtype=held.dtype, device=filler.device))
