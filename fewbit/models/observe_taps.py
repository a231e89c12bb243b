"""One run of a small model that sees what reads what.

Every module with weights of its own is tapped: its input is cut off from what came before, its output is multiplied by
ones and has zeros added to it. Derivatives of an input by those ones and zeros say which outputs it is made of.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewbit.models.fill import is_stack
from fewbit.modules.linear import Linear

Kind = Literal["linear", "experts", "norm", "embedding", "other"]


@dataclass(slots=True)
class Tap:
    """What one module saw and gave. inputs: each with its graph back to the nearest taps."""

    path: str
    module: nn.Module
    kind: Kind
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)  # [N] of ones, one for each call
    shifts: list[Tensor] = field(default_factory=list)  # zeros like the output


@dataclass(slots=True)
class Passage:
    """The hidden states around one decoder layer. came and gave have a graph; start and end are where one begins."""

    came: Tensor
    start: Tensor
    gave: Tensor | None = None
    end: Tensor | None = None


@dataclass(slots=True)
class Seen:
    taps: dict[str, Tap]
    layers: list[list[Passage]]
    last: Tensor  # logits


def layers_path(model: nn.Module, ids: Tensor) -> str:
    """The path of the list of decoder layers: of the lists of modules that text runs through, the largest."""
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    called: set[str] = set()
    with ExitStack() as stack, torch.no_grad():
        for path, held in lists.items():
            hook = held[-1].register_forward_hook(lambda module, args, output, path=path: called.add(path))
            stack.callback(hook.remove)
        model(input_ids=ids, use_cache=False)
    return max(called, key=lambda path: (sum(p.numel() for p in lists[path].parameters()), path), default="")


def watch(model: nn.Module, path: str, ids: Tensor) -> Seen:
    """Run the model over ids [B, T] with taps everywhere; path: of its list of layers."""
    taps = {name: Tap(name, m, sort) for name, m in model.named_modules() if (sort := sort_of(m)) is not None}
    layers: list[list[Passage]] = [[] for _ in model.get_submodule(path)]
    model.requires_grad_(False)
    with ExitStack() as stack:
        for tap in taps.values():
            stack.enter_context(hooked(tap.module, _before(tap), _after(tap)))
        for passages, layer in zip(layers, model.get_submodule(path), strict=True):
            stack.enter_context(hooked(layer, _entering(passages), _leaving(passages)))
        stack.enter_context(torch.enable_grad())
        logits = model(input_ids=ids, use_cache=False).logits
    return Seen(taps, layers, logits)


def sort_of(module: nn.Module) -> Kind | None:
    """What kind of tap a module gets; None: it has no weights of its own, or its parts are tapped."""
    if isinstance(module, Linear):
        return "linear"
    if is_stack(module):
        return "experts"
    if isinstance(module, nn.Embedding):
        return "embedding"
    own = [p for p in module._parameters.values() if p is not None]
    weight = module._parameters.get("weight")
    if not own or (weight is None and any(True for child in module.children() for _ in child.parameters())):
        return None
    return "norm" if weight is not None and weight.dim() == 1 else "other"


@contextmanager
def hooked(module: nn.Module, before: Any, after: Any) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(tap: Tap) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_tensor(args, kwargs)
        if x is None or not x.is_floating_point():
            return None
        tap.inputs.append(x)
        return instead(args, kwargs, x, x.detach())

    return hook


def _after(tap: Tap) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        y = first(output)
        if not isinstance(y, Tensor) or not y.is_floating_point():
            return None
        scale = torch.ones(y.shape[-1], requires_grad=True)
        shift = torch.zeros_like(y, requires_grad=True)
        new = y * scale.to(y.dtype) + shift
        tap.scales.append(scale)
        tap.shifts.append(shift)
        tap.outputs.append(y.detach())
        return with_first(output, new)

    return hook


def _entering(passages: list[Passage]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_tensor(args, kwargs)
        if x is None:
            return None
        passages.append(Passage(x, x.detach().requires_grad_()))
        return instead(args, kwargs, x, passages[-1].start)

    return hook


def _leaving(passages: list[Passage]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        y = first(output)
        if not passages or not isinstance(y, Tensor):
            return None
        passages[-1].gave, passages[-1].end = y, y.detach().requires_grad_()
        return with_first(output, passages[-1].end)

    return hook


def first(output: Any) -> Any:
    """The hidden states among what a module returns."""
    return output[0] if isinstance(output, tuple | list) and output else output


def with_first(output: Any, new: Tensor) -> Any:
    return type(output)([new, *output[1:]]) if isinstance(output, tuple | list) else new


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"]
    return next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)


def instead(args: tuple[Any, ...], kwargs: dict[str, Any], old: Tensor, new: Tensor) -> Any:
    swapped = {name: new if value is old else value for name, value in kwargs.items()}
    return tuple(new if a is old else a for a in args), swapped


def reader(path: str, tap: Tap) -> str:
    """What reads a tap's input: a linear, or the first projection of a stack."""
    if tap.kind != "experts":
        return path
    return f"{path}.{'gate_up_proj' if tap.module.has_gate else 'up_proj'}"


def writer(path: str, tap: Tap) -> str:
    """What makes a tap's output: a linear, or the second projection of a stack."""
    return f"{path}.down_proj" if tap.kind == "experts" else path


def tap_of(taps: Mapping[str, Tap], path: str) -> Tap:
    """The tap of a linear, or of the stack that a parameter is in."""
    return taps[path] if path in taps else taps[path.rpartition(".")[0]]


def same_input(a: Tap, b: Tap) -> bool:
    """True when both were called as often, each time with the same values."""
    if len(a.inputs) != len(b.inputs) or not a.inputs:
        return False
    return all(
        x.shape[-1] == y.shape[-1]
        and x.numel() == y.numel()
        and torch.equal(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))
        for x, y in zip(a.inputs, b.inputs, strict=True)
    )
