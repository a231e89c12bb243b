"""Looking at a twin at work: what each module was called with, and which linears of one module read one tensor."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from fewbit.models import twin
from fewbit.models.fill import is_stack
from fewbit.models.fuse_forms import gate_form, glu_form, norm_form, rotary_form
from fewbit.models.fuse_latent import is_latent, latent_form
from fewbit.models.fuse_mixture import mixture_form
from fewbit.models.fuse_route import is_router, route_form
from fewbit.models.fuse_values import Called, Decision, Kind, Rewrite, Siblings, Signature
from fewbit.modules.linear import Linear
from fewbit.modules.rotary import RotaryForm

ROTARY = ["q", "k", "cos", "sin"]  # what a function is called with that turns queries and keys
AXIS = "unsqueeze_dim"


@dataclass(slots=True)
class Seen:
    """One module's calls, as far as they have one tensor in and one out, or are a router's or latent attention's."""

    path: str
    module: nn.Module
    calls: int = 0
    plain: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    latent: dict[str, Any] | None = None  # a call of latent attention
    routed: tuple[list[Tensor], Tensor] | None = None  # a call of a router, and its logits


def look(model: nn.Module, config: Any) -> list[Seen]:
    """Run the twin and see."""
    seen = {id(m): Seen(path, m) for path, m in model.named_modules()}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found = seen[id(module)]
        found.calls += 1
        given = [value for value in (*args, *kwargs.values()) if value is not None]
        if len(given) == 1 and all(isinstance(t, Tensor) and t.is_floating_point() for t in (given[0], output)):
            found.plain.append((given[0], output))
        elif is_latent(module):
            found.latent = found.latent or kwargs
        elif is_router(given, output):
            found.routed = given, output[0]

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        twin.logits(model, config)
    return [found for found in seen.values() if found.calls]


def proposals(seen: list[Seen]) -> Iterator[Rewrite | Decision]:
    """What might be done, in the order in which it is to be tried, and what was looked at in vain."""
    yield from siblings(seen)
    at = {id(s.module): s for s in seen}
    known: set[tuple[Signature, str]] = set()
    looks: dict[Kind, Callable[[Seen], Rewrite | Decision | None]] = {
        "norm": norm, "glu": glu, "rotary": rotary, "latent": latent, "route": route,
        "mixture": lambda seen: mixture(seen, at),
    }  # fmt: skip
    for found in seen:
        for kind, look in looks.items():
            try:
                rewrite = look(found)
            except Exception as error:  # a model's own code, run on what it was not made for
                rewrite = Decision(type(found.module).__name__, kind, "anything", twin.told(error))
            if isinstance(rewrite, Rewrite) and (rewrite.target, rewrite.kind) not in known:
                known.add((rewrite.target, rewrite.kind))
                yield rewrite
            elif isinstance(rewrite, Decision):
                yield rewrite


def siblings(seen: list[Seen]) -> Iterator[Rewrite | Decision]:
    """Groups that are the same in all modules of a signature."""
    linears = {id(s.module): s for s in seen if isinstance(s.module, Linear)}
    groups: dict[Signature, list[set[tuple[str, ...]]]] = {}
    for found in seen:
        children = {n: linears[id(c)] for n, c in found.module.named_children() if id(c) in linears}
        if len(children) > 1:
            groups.setdefault(Signature.of(found.module, False), []).append(together(children))
    for target, each in groups.items():
        agreed = set.intersection(*each)
        for names in sorted(set.union(*each)):
            if names in agreed:
                yield Rewrite(target, Siblings(names))
            else:
                yield Decision(target.name, "merged", str(Siblings(names)), "not in every layer")


def together(children: dict[str, Seen]) -> set[tuple[str, ...]]:
    """Names of those that were each time called with one and the same tensor."""
    by_tensor: dict[int, list[str]] = {}
    for name, found in children.items():
        for x, _ in found.plain:
            by_tensor.setdefault(id(x), []).append(name)
    sets = {tuple(names) for names in by_tensor.values()}
    return {names for names in sets if len(names) > 1 and all(names == s or not set(names) & set(s) for s in sets)}


def norm(found: Seen) -> Rewrite | Decision | None:
    module = found.module
    weight = module._parameters.get("weight")
    if any(module.children()) or not set(module._parameters) <= {"weight", "bias"} or not found.plain:
        return None
    x, y = found.plain[0]
    if x.shape != y.shape or (weight is not None and weight.shape != x.shape[-1:]):
        return None
    form = norm_form(module, x.shape[-1])
    return form and rewrite(module, form, "norm")


def glu(found: Seen) -> Rewrite | Decision | None:
    if is_stack(found.module):
        return rewrite(found.module, gate_form(found.module), "glu") if found.module.has_gate else None
    names = [name for name, child in found.module.named_children() if isinstance(child, Linear)]
    if len(names) not in (2, 3) or not found.plain or any(True for _ in found.module.parameters(recurse=False)):
        return None
    form = glu_form(found.module, names, found.plain[0][0].shape[-1])
    return form and rewrite(found.module, form, "glu")


def rotary(found: Seen) -> Rewrite | Decision | None:
    forward = type(found.module).forward
    if not isinstance(forward, FunctionType):
        return None
    for name, form, heads in rotaries(forward):
        return rewrite(found.module, form if isinstance(form, str) else Called(name, form, heads), "rotary")
    return None


def rotaries(forward: FunctionType) -> Iterator[tuple[str, RotaryForm | str, int]]:
    """Functions that turn queries and keys, of those that some code can call: name, form or why none, axis of heads."""
    for name in forward.__code__.co_names:
        if not callable(function := forward.__globals__.get(name)) or isinstance(function, type):
            continue
        asked = inspect.signature(function).parameters
        if list(asked)[:4] == ROTARY:
            form = rotary_form(function, AXIS if AXIS in asked else "")
            yield name, form, asked[AXIS].default if AXIS in asked else 1


def latent(found: Seen) -> Rewrite | Decision | None:
    forward = type(found.module).forward
    if found.latent is None or not isinstance(forward, FunctionType):
        return None
    forms = [form for _, form, _ in rotaries(forward) if not isinstance(form, str)]
    form = latent_form(found.module, found.latent, forms)
    return form and rewrite(found.module, form, "latent")


def route(found: Seen) -> Rewrite | Decision | None:
    form = route_form(found.module, *found.routed) if found.routed else None
    return form and rewrite(found.module, form, "route")


def mixture(found: Seen, at: dict[int, Seen]) -> Rewrite | None:
    """at: what was seen of each module, by its id."""
    children = {name: at[id(child)] for name, child in found.module.named_children() if id(child) in at}
    routers = [name for name, child in children.items() if child.routed and len(child.routed[0]) == 1]
    stacks = [name for name, child in children.items() if is_stack(child.module)]
    others = [name for name, child in children.items() if child.plain]
    if not found.plain or not others or (len(routers), len(stacks)) != (1, 1):
        return None
    x, given = found.plain[0][0], children[routers[0]].routed
    flat = given is not None and given[0][0].dim() == 2
    form = mixture_form(found.module, routers[0], stacks[0], others, flat, x.shape[-1])
    return form and Rewrite(Signature.of(found.module, False), form)


def rewrite(module: nn.Module, form: Any, kind: Any) -> Rewrite | Decision:
    """form: or why there is none."""
    if isinstance(form, str):
        return Decision(type(module).__name__, kind, type(module).__name__, form)
    return Rewrite(Signature.of(module, kind in ("norm", "glu", "route")), form)
