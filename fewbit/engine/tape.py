"""Tape: all that a piece of code does on a CPU, recorded as it runs and done again without its Python.

Recorded are the operations of torch as its dispatcher sees them, and the calls of our own kernels. Each time they read
and write the same memory: what an operation gave is kept, and filled anew. Code that looks at values (a number read by
the host, a shape that depends on one) or draws at random cannot be done again so, and is refused.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fewbit.errors import UnsupportedError
from fewbit.kernels import fused
from fewbit.kernels.compiled import LISTENER

Again = Callable[[], Any]
LOOKS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}
NOTHING = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
ZEROS = ("zeros", "zeros_like", "new_zeros")


class Tape(TorchDispatchMode):
    """Records within `recording`; `replay` does it again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[Again] = []
        self._held: list[Any] = []  # what operations gave, and took: calls have its addresses

    @contextmanager
    def recording(self) -> Iterator[None]:
        token = LISTENER.set(self._calls.append)
        try:
            with self:
                yield
        finally:
            LISTENER.reset(token)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = func(*args, **kwargs)
        if LOOKS & set(func.tags) and not (isinstance(given, Tensor) and shares(given, args)):  # no dropout: its input
            raise UnsupportedError(f"{func} looks at values, or draws them")
        self._held.append((given, args))
        if (again := repeated(func, args, kwargs, given)) is not None:
            self._calls.append(again)
        return given

    def replay(self) -> None:
        with torch.inference_mode():
            for call in self._calls:
                call()


def repeated(func: Any, args: Any, kwargs: dict[str, Any], given: Any) -> Again | None:
    """What fills anew what an operation gave; None where that is a view, or nothing was in it."""
    schema = func._schema
    name = schema.name.partition("::")[2]
    if schema.is_mutable:
        return partial(func._op, *args, **kwargs)
    found = [given] if isinstance(given, Tensor) else list(given)
    if name in NOTHING or (found and all(shares(t, args) for t in found)):
        return None
    if name in ZEROS:
        return partial(given.zero_)
    if func is torch.ops.aten.add.Tensor and not kwargs and (ours := fused.adding(args[0], args[1], given)) is not None:
        return ours
    if name in ("_to_copy", "to"):
        return partial(given.copy_, args[0])
    if (into := writing(func)) is not None:
        outs = [a.name for a in into._schema.arguments if a.is_out]
        return partial(into._op, *args, **kwargs, **dict(zip(outs, found, strict=True)))

    def copied() -> None:
        fresh = func(*args, **kwargs)
        for old, new in zip(found, [fresh] if isinstance(fresh, Tensor) else fresh, strict=True):
            old.copy_(new)

    return copied


def shares(found: Tensor, args: Any) -> bool:
    """Whether it lies in the memory of one that was given."""
    place = found.untyped_storage().data_ptr()
    return any(isinstance(t, Tensor) and t.untyped_storage().data_ptr() == place for t in args)


@cache
def writing(func: Any) -> Any:
    """The same operation that writes into what it is given, or None."""

    def taken(overload: Any) -> list[tuple[str, str]]:
        return [(a.name, str(a.type)) for a in overload._schema.arguments if not a.is_out]

    for name in func.overloadpacket.overloads():
        other = getattr(func.overloadpacket, name)
        outs = sum(a.is_out for a in other._schema.arguments)
        if outs == len(func._schema.returns) > 0 and taken(other) == taken(func):
            return other
    return None
