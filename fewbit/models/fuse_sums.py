"""Sums: which additions of a decoder layer may wait for a norm, seen on a twin whose stream is a Later already.

They are passed on by all layers or by none: a layer that knows nothing of them would be given one.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from fewbit.models import twin
from fewbit.models.fuse_values import ALONE, Decision, Rewrite, Signature, Sums
from fewbit.models.observe_taps import first, layers_path
from fewbit.modules import residual
from fewbit.modules.linear import Linear
from fewbit.modules.norm import NormForm
from fewbit.modules.residual import Later

WHAT = "residual and norm"


@dataclass(slots=True)
class Seen:
    """readers: ids of what reads the stream; waiting: whether one read a sum that was not added yet.

    outputs: what modules gave, terms: what was added to something, given: what a module read; by id.
    """

    readers: set[int] = field(default_factory=set)
    waiting: bool = False
    outputs: dict[int, tuple[list[nn.Module], Tensor]] = field(default_factory=dict)
    terms: dict[int, Tensor] = field(default_factory=dict)
    given: dict[int, tuple[nn.Module, Tensor]] = field(default_factory=dict)

    def adds(self, module: nn.Module) -> bool:
        """Whether what it gave was added as it was."""
        return any(module in owners and key in self.terms for key, (owners, _) in self.outputs.items())

    def feeds(self, module: nn.Module, norms: Sequence[nn.Module]) -> bool:
        """Whether one of these read what it gave."""
        read = {key for key, (norm, _) in self.given.items() if norm in norms}
        return any(module in owners and key in read for key, (owners, _) in self.outputs.items())


def additions(model: Any, config: Any, known: Sequence[Rewrite]) -> Iterator[Rewrite | Decision]:
    """model: a twin that may be changed; known: what norms are proposed to become."""
    path = layers_path(model, torch.arange(10, 20)[None])
    layers = list(model.get_submodule(path)) if path else []
    kinds = list(dict.fromkeys(type(layer).__name__ for layer in layers))
    try:
        seen = watched(model, layers, config)
    except Exception as error:  # code that asks of hidden states what only a tensor has
        for name in kinds:
            yield Decision(name, "sums", WHAT, twin.told(error))
        return
    forms = [r for r in known if isinstance(r.form, NormForm)]
    norms = {id(m) for m in model.modules() if any(r.fits(m) for r in forms)}
    passes = seen.waiting and seen.readers <= norms
    by_target: dict[Signature, list[Sums]] = {}
    for layer in layers:
        held = {name: m for name, m in layer.named_modules() if id(m) in norms}
        added = {name: m for name, m in held.items() if seen.adds(m)}
        linears = {name: m for name, m in layer.named_modules() if type(m) is Linear}
        products = [n for n, m in linears.items() if seen.adds(m) or seen.feeds(m, list(added.values()))]
        form = Sums(tuple(added), passes, tuple(products) if passes else ())
        by_target.setdefault(Signature.of(layer, False), []).append(form)
    for target, each in by_target.items():
        if len(set(each)) > 1:
            yield Decision(target.name, "sums", WHAT, "not in every layer")
        elif passes or each[0].norms:
            yield Rewrite(target, each[0])
        else:
            yield Decision(target.name, "sums", WHAT, ALONE)


def watched(model: nn.Module, layers: Sequence[nn.Module], config: Any) -> Seen:
    seen, plainly = Seen(), residual.added

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = [value for value in (*args, *kwargs.values()) if isinstance(value, Later)]
        seen.readers |= {id(module) for _ in found}
        seen.waiting |= any(value.residual is not None for value in found)
        seen.given |= {id(value): (module, value) for value in args if isinstance(value, Tensor)}

    def after(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(y := first(output), Tensor):
            seen.outputs.setdefault(id(y), ([], y))[0].append(module)

    def noted(a: Any, b: Any) -> Any:
        seen.terms |= {id(t): t for t in (a, b) if isinstance(t, Tensor)}
        return plainly(a, b)

    inner = [m for m in model.modules() if m not in set(layers) and not isinstance(m, nn.ModuleList)]
    with ExitStack() as stack:
        stack.enter_context(patch.object(residual, "added", noted))
        for layer in layers:
            layer.forward = partial(residual.forward, layer)
        for module in inner:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        twin.logits(model, config)
    return seen
