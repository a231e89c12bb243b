"""Placing: rewrites carried out on a model, module by module. Nothing of another model changes."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, update_wrapper
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from fewbit.errors import UnsupportedError
from fewbit.models.fill import is_stack
from fewbit.models.fuse_values import Called, Decision, Form, Kind, Rewrite, Siblings, Sums
from fewbit.modules import experts, glu, latent, mixture, residual, router
from fewbit.modules.glu import GluForm
from fewbit.modules.latent import LatentForm
from fewbit.modules.linear import Linear
from fewbit.modules.merged import merge
from fewbit.modules.mixture import MixtureForm
from fewbit.modules.norm import Norm, NormForm
from fewbit.modules.rotary import Rotate
from fewbit.modules.router import RouteForm
from fewbit.modules.watched import watched

OWN = "own"  # where a Norm holds what stood in its place


def place(model: nn.Module, rewrites: Sequence[Rewrite]) -> Iterator[Decision]:
    """Carry them out, and say of each module what became of it."""
    found = [(path, module, r) for path, module in model.named_modules() for r in rewrites if r.fits(module)]
    found.sort(key=lambda one: one[2].kind == "sums")  # norms stand in their places by then
    alike = {path for path, _, r in found if isinstance(r.form, Sums) and r.form.passes}
    holders = Counter(id(child) for module in model.modules() for child in module.children())
    functions: dict[tuple[type, str], FunctionType] = {}
    for path, module, rewrite in found:
        try:
            if path in alike and not surrounded(model, path, alike):
                raise UnsupportedError("not every layer passes sums on")
            put(model, path, module, rewrite.form, holders, functions)
            reason = ""
        except UnsupportedError as error:
            reason = str(error)
        yield Decision(path, rewrite.kind, str(rewrite.form), reason)


def put(model: nn.Module, path: str, module: nn.Module, form: Form, holders: Counter[int], functions: Any) -> None:
    if isinstance(form, Siblings):
        siblings(module, form, holders)
    elif isinstance(form, NormForm):
        norm(model, path, module, form, holders)
    elif isinstance(form, GluForm) and is_stack(module):
        setattr(module, experts.GATE, form)
    elif isinstance(form, GluForm):
        module.forward = partial(glu.forward, module, form)
    elif isinstance(form, RouteForm):
        module.forward = partial(router.forward, module, form)
    elif isinstance(form, MixtureForm):
        module.forward = partial(mixture.forward, module, form)
    elif isinstance(form, LatentForm):
        latent.ready(module, form)
        module.forward = partial(latent.forward, module, form, module.forward)
    elif isinstance(form, Sums):
        sums(module, form)
    else:
        key = type(module), form.name
        if key not in functions:
            functions[key] = rebound(type(module).forward, form)
        module.forward = MethodType(functions[key], module)


def siblings(parent: nn.Module, form: Siblings, holders: Counter[int]) -> None:
    linears: list[Any] = [parent.get_submodule(name) for name in form.names]
    if any(holders[id(linear)] > 1 for linear in linears):
        raise UnsupportedError("one of them stands in several places")
    for name, slice in zip(form.names, merge(linears), strict=True):
        setattr(parent, name, slice)


def norm(model: nn.Module, path: str, module: nn.Module, form: NormForm, holders: Counter[int]) -> None:
    if watched(module):
        raise UnsupportedError("something is done before or after it")
    if holders[id(module)] > 1:
        raise UnsupportedError("it stands in several places")
    made = Norm(module._parameters.get("weight"), module._parameters.get("bias"), form)
    vars(made)[OWN] = module  # no child: its parameters are those
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, made)


def surrounded(model: nn.Module, path: str, alike: Collection[str]) -> bool:
    """Whether all layers of a layer's list are among these."""
    parent = path.rpartition(".")[0]
    return all(f"{parent}.{name}" in alike for name, _ in model.get_submodule(parent).named_children())


def sums(layer: nn.Module, form: Sums) -> None:
    waiting = [norm for name in form.norms if isinstance(norm := layer.get_submodule(name), Norm)]
    if not waiting and not form.passes:
        raise UnsupportedError("its norms are as the model has them")
    if "forward" in vars(layer):
        raise UnsupportedError("its forward is no longer its own")
    for norm in waiting:
        norm.forward = partial(residual.later, norm)  # type: ignore[method-assign]
    for linear in (layer.get_submodule(name) for name in form.products):
        if type(linear) is Linear and "forward" not in vars(linear):
            linear.forward = partial(residual.product, linear)  # type: ignore[method-assign]
    if form.passes:
        layer.forward = partial(residual.forward, layer)


def rebound(forward: Any, form: Called) -> FunctionType:
    """The same code, which finds our function under the name of the model's own."""
    ours = Rotate(forward.__globals__[form.name], form.form, form.heads)
    names = {**forward.__globals__, form.name: ours}
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return update_wrapper(made, forward)


@dataclass(frozen=True, slots=True)
class Back:
    """A module that is transformers' own again, and what fuses it as before."""

    module: nn.Module
    kind: Kind
    again: Callable[[], None]


def put_back(model: nn.Module, kinds: Collection[Kind]) -> list[Back]:
    """Leave to transformers' code what was fused of some kinds. Merged linears stay: what they were made of is gone."""
    found: list[Back] = []
    for path, module in list(model.named_modules()):
        held = vars(module)
        if isinstance(module, Norm) and "norm" in kinds:
            parent, _, name = path.rpartition(".")
            holder = model.get_submodule(parent)
            found.append(Back(held[OWN], "norm", partial(setattr, holder, name, module)))
            setattr(holder, name, held[OWN])
        there = {name: kind for name in ("forward", experts.GATE) if (kind := kind_of(module, held.get(name)))}
        for name, kind in there.items():
            if kind in kinds:
                fused = held.pop(name)
                found.append(Back(module, kind, partial(setattr, module, name, fused)))
                if (before := below(module, fused)) is not None and "rotary" not in kinds:
                    setattr(module, name, before)
    return found


def below(module: nn.Module, held: Any) -> Any:
    """The turning that was fused first where latent attention stands on it, or None."""
    before = held.args[2] if kind_of(module, held) == "latent" else None
    return before if kind_of(module, before) == "rotary" else None


FORWARDS: dict[Any, Kind] = {glu.forward: "glu", router.forward: "route", latent.forward: "latent",
                             mixture.forward: "mixture", residual.forward: "sums", residual.later: "sums",
                             residual.product: "sums"}  # fmt: skip


def kind_of(module: nn.Module, held: Any) -> Kind | None:
    """Of what stands in a module in place of its class's own."""
    if isinstance(held, GluForm):
        return "glu"
    if isinstance(held, partial):
        return FORWARDS.get(held.func)
    rotary = isinstance(held, MethodType) and getattr(held, "__wrapped__", None) is type(module).forward
    return "rotary" if rotary else None
