"""Proof: a change of weights that should change nothing, tried on the twin."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.models import twin
from fewbit.models.fill import assign, owner
from fewbit.models.observe_roles import turned
from fewbit.models.observe_taps import first
from fewbit.models.observe_values import Group, Refused, bias_of, parameter
from fewbit.models.rewrite import fold, scaled, tied, turn_columns, turn_rows

LIMIT = 1e-5  # of a layer's output
BEYOND = 1e-4  # of what comes after it
EFFECT = 1e-3  # what one side of a change alone must do


class Bench:
    """A twin and what it gives."""

    def __init__(self, model: nn.Module, path: str, ids: Tensor):
        self.model, self.path, self.ids = model, path, ids
        self.wanted = self.outputs()

    def outputs(self) -> list[Tensor]:
        """What each layer gives, then the logits."""
        found: list[Tensor] = []

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found.append(first(output).detach().clone())

        handles = [layer.register_forward_hook(hook) for layer in self.model.get_submodule(self.path)]
        try:
            with torch.no_grad():
                logits = self.model(input_ids=self.ids, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return [*found, logits]

    def weights(self, prefix: str) -> dict[str, Tensor]:
        """Parameters of a submodule by path, matrices as [.., N, K]."""
        module = self.model.get_submodule(prefix)
        return {
            p: value.mT if turned(module, p) else value for p, value in module.named_parameters(remove_duplicate=False)
        }

    @contextmanager
    def changed(self, prefix: str, new: Mapping[str, Tensor]) -> Iterator[None]:
        module = self.model.get_submodule(prefix)
        places = {p: owner(module, p) for p in new}
        old = {p: host._parameters[leaf] for p, (host, leaf) in places.items()}
        try:
            for p, (host, leaf) in places.items():
                assign(host, leaf, new[p].mT if turned(module, p) else new[p])
            yield
        finally:
            for p, (host, leaf) in places.items():
                host._parameters[leaf] = old[p]

    def errors(self, prefix: str, new: Mapping[str, Tensor]) -> list[float]:
        """What each output becomes with other weights, relative to what it was."""
        with self.changed(prefix, new):
            got = self.outputs()
        if len(got) != len(self.wanted):
            return [inf]
        return [twin.relative(a, b) for a, b in zip(got, self.wanted, strict=True)]


def proven(bench: Bench, index: int, prefix: str, group: Group) -> Group | Refused:
    """The group with its source as it was proven, or why it was not. index: of the layer; -1: it is in none."""
    assert group.source is not None
    refusals = []
    for offset in (0, 1) if group.source.kind == "norm" else (0,):
        tried = replace(group, source=replace(group.source, offset=offset))
        refused = attempt(bench, index, prefix, tried)
        if refused is None:
            return tried
        refusals.append(refused)
    return min(refusals, key=lambda refused: inf if refused.error is None else refused.error)


def attempt(bench: Bench, index: int, prefix: str, group: Group) -> Refused | None:
    """None: a random scaling goes in and out without a trace, and either half of it alone leaves one."""
    source, what = group.source, f"{prefix}: {', '.join(group.linears)}"
    assert source is not None
    weights = bench.weights(prefix)
    s = scaling(weights, group)
    errors = bench.errors(prefix, fold(weights, group, s))
    refused = judged(f"{what} <- {source.path}", errors, index)
    if refused is None and max(bench.errors(prefix, scaled(weights, group, s))) < EFFECT:
        return Refused(f"{what} <- {source.path}", "scaling them alone changes nothing, which proves nothing")
    return refused


def judged(what: str, errors: Sequence[float], index: int) -> Refused | None:
    own = errors[index] if 0 <= index < len(errors) else 0.0
    if own > LIMIT:
        return Refused(what, f"the layer's output changes, allowed {LIMIT:.0e}", own)
    if max(errors) > BEYOND:
        return Refused(what, f"what comes after the layer changes, allowed {BEYOND:.0e}", max(errors))
    return None


def scaling(weights: Mapping[str, Tensor], group: Group) -> Tensor:
    """Random: [K], or [E, K] from stack to stack. Between a half and two for a norm, which 1 + w holds exactly enough;

    for a linear wide, so that a function between the two which only looks linear near zero (a clamp) is found out.
    """
    held = weights[parameter(weights, group.linears[0])]
    stacked = group.source is not None and group.source.kind == "linear" and held.dim() == 3
    shape = (held.shape[0], held.shape[-1]) if stacked else held.shape[-1:]
    wide = 1 if group.source is None or group.source.kind == "norm" else 8
    exponents = torch.rand(shape, generator=torch.Generator().manual_seed(4)) * 2 - 1
    return tied(torch.exp2(exponents * wide), group.source)


def turns(bench: Bench, index: int, prefix: str, group: Group, size: int) -> bool:
    """True when channels in runs of `size` may be turned among themselves: rows one way, columns the other."""
    source = group.source
    if source is None or source.kind != "linear" or len(group.readers) != 1 or source.block not in (0, size):
        return False
    weights = bench.weights(prefix)
    reader, maker = (parameter(weights, p) for p in (group.linears[0], source.path))
    if weights[reader].dim() != 2 or weights[reader].shape[-1] % size:
        return False
    q = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(5)))[0]
    rows = source.heads(weights[maker].shape[0], weights[reader].shape[1], size)
    new = {reader: turn_columns(weights[reader], q)}
    new |= {name: turn_rows(weights[name], rows, q) for name in (maker, bias_of(maker)) if name in weights}
    return judged("", bench.errors(prefix, new), index) is None
