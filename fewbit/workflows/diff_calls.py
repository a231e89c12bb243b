"""What the modules of a loaded unit were given and gave: every module that holds weights and no other module."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fewbit.models.fill import is_stack
from fewbit.modules.embedding import Embedding
from fewbit.modules.experts import WATCH, project
from fewbit.modules.linear import Linear


@dataclass(slots=True)
class Call:
    """One call of a module; of experts, one projection of all of them, whose rows are sorted by expert."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Tensor | None = None  # None = not kept, it can be had again
    projection: str = ""

    def again(self, module: nn.Module) -> Tensor | None:
        """What a module gives for the inputs of this call."""
        if self.projection:
            return project(module, self.projection, *self.args)
        return floating(module.forward(*self.args, **self.kwargs))


@dataclass(slots=True)
class Spy:
    """Sits in an experts module, which tells it the inputs of its projections."""

    path: str
    calls: list[Call]
    every: tuple[int, ...] = ()

    def routed(self, rows: Sequence[int]) -> None:
        pass

    def __call__(self, projection: str, x: Tensor, rows: Sequence[int]) -> None:
        self.calls.append(Call(f"{self.path}.{projection}", (x, list(rows)), projection=projection))


@contextmanager
def taped(root: nn.Module, prefix: str, without: str = "") -> Iterator[list[Call]]:
    """Record the calls in a module, named by their paths in the model; `without`: a path in root to leave out."""
    calls: list[Call] = []
    stacks, handles = [], []
    for path, module in leaves(root, without):
        full = joined(prefix, path)
        if is_stack(module):
            setattr(module, WATCH, Spy(full, calls))
            stacks.append(module)
        else:
            handles.append(module.register_forward_hook(recorder(full, calls), with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
        for module in stacks:
            delattr(module, WATCH)


def recorder(path: str, calls: list[Call]) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append(Call(path, args, kwargs, floating(output)))

    return hook


def leaves(root: nn.Module, without: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Linears, embeddings, stacks of experts, and whatever else holds parameters and no modules."""
    taken = [without] if without else []
    for path, module in root.named_modules():
        if inside(path, taken):
            continue
        whole = is_stack(module) or isinstance(module, Linear | Embedding)
        if whole or (own(module) and not list(module.children())):
            taken.append(path)
            yield path, module


def loose(root: nn.Module, without: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules with parameters of their own beside modules: their weights can be compared, not their outputs."""
    taken = [without] if without else []
    for path, module in root.named_modules():
        if inside(path, taken):
            continue
        if is_stack(module) or isinstance(module, Linear | Embedding):
            taken.append(path)
        elif own(module) and list(module.children()):
            yield path, module


def inside(path: str, taken: list[str]) -> bool:
    return any(path == held or path.startswith(f"{held}.") for held in taken)


def own(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters(recurse=False) if not p.is_meta]


def joined(prefix: str, path: str) -> str:
    return ".".join(part for part in (prefix, path) if part)


def floating(output: Any) -> Tensor | None:
    """The first tensor of floats among what a module returns."""
    held = output if isinstance(output, tuple | list) else (output,)
    return next((t for t in held if isinstance(t, Tensor) and t.is_floating_point()), None)
