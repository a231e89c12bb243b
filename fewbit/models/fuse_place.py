"""Placing: rewrites carried out on a model, module by module. Nothing of another model changes."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial, update_wrapper
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from fewbit.errors import UnsupportedError
from fewbit.models.fill import is_stack
from fewbit.models.fuse_values import Called, Decision, Form, Rewrite, Siblings
from fewbit.modules import experts, glu
from fewbit.modules.glu import GluForm
from fewbit.modules.merged import merge
from fewbit.modules.norm import Norm, NormForm
from fewbit.modules.rotary import Rotate


def place(model: nn.Module, rewrites: Sequence[Rewrite]) -> Iterator[Decision]:
    """Carry them out, and say of each module what became of it."""
    found = [(path, module, r) for path, module in model.named_modules() for r in rewrites if r.fits(module)]
    holders = Counter(id(child) for module in model.modules() for child in module.children())
    functions: dict[tuple[type, str], FunctionType] = {}
    for path, module, rewrite in found:
        try:
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
    if module._forward_hooks or module._forward_pre_hooks:
        raise UnsupportedError("something is done before or after it")
    if holders[id(module)] > 1:
        raise UnsupportedError("it stands in several places")
    made = Norm(module._parameters.get("weight"), module._parameters.get("bias"), form)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, made)


def rebound(forward: Any, form: Called) -> FunctionType:
    """The same code, which finds our function under the name of the model's own."""
    ours = Rotate(forward.__globals__[form.name], form.form, form.heads)
    names = {**forward.__globals__, form.name: ours}
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return update_wrapper(made, forward)
