"""Residual: what a layer adds to the stream of hidden states, added by the norm that reads the sum.

A model's own code runs as it is, but on a stream that is a Later: adding to it only notes what is to be added. A norm
of ours that is given one adds and norms in one launch; whatever else is done with it finds the tensor, added by then.
A norm whose output is added may itself wait for that addition, and so may scales of a product and a sum over ranks.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.kernels import fused
from fewbit.kernels.rows import times
from fewbit.modules.linear import Linear
from fewbit.modules.norm import Norm, norm, normed
from fewbit.modules.parted import Ranks
from fewbit.modules.watched import watched

ADDS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
Pair = tuple[Tensor, Tensor | None]
Scales = tuple[Tensor | None, Tensor | None]  # float32: [M, 1] of rows, [D] of columns
NO_SCALES: Scales = (None, None)


def add_norm(
    x: Tensor, residual: Tensor, before: Norm | None, after: Norm | None, scales: Scales = NO_SCALES,
    ranks: Ranks | None = None,
) -> Pair:  # fmt: skip
    """x, residual: [..., D] -> residual + x, or + before(x); and after of that; the oracle.

    x is added up over ranks first, who have a part of it each, and multiplied by scales.
    """
    x = times(whole(x, ranks), *scales)
    total = residual + (x if before is None else norm(x, before.weight, before.bias, before.form))
    return total, None if after is None else norm(total, after.weight, after.bias, after.form)


def add_normed(
    x: Tensor, residual: Tensor, before: Norm | None, after: Norm | None, scales: Scales = NO_SCALES,
    ranks: Ranks | None = None,
) -> Pair:  # fmt: skip
    """The same by the kernel that takes it, to the bit what an addition and the norm's own kernel give."""
    if before is not None or after is not None:
        run: Any = kernel() if x.is_cuda else fused
        given = residual, before and before.norm_parts, after and after.norm_parts
        if run.takes_sum(x, *given):
            near = None if ranks is None or ranks.near is None or not ranks.near.takes_rows(x) else ranks.near
            x = x if near is not None else whole(x, ranks)
            more = (after and after.wanted, scales, near) if x.is_cuda else ()
            found: Pair = run.add_norm(x if more else times(x, *scales), *given, *more)
            return found
    x = times(whole(x, ranks), *scales)
    total = residual + (x if before is None else by(before, x))
    return total, None if after is None else by(after, total)


def whole(x: Tensor, ranks: Ranks | None) -> Tensor:
    return x if ranks is None else ranks.reduce(x)


def by(norm: Norm, x: Tensor) -> Tensor:
    return normed(x, norm.weight, norm.bias, norm.form, norm.wanted)


class Later:
    """[residual +] [norm of] x [times scales], computed when it is first asked for; or x alone, a stream's begin.

    ranks: who have a part of x each, which are added up.
    """

    __slots__ = ("norm", "ranks", "residual", "scales", "x")

    def __init__(
        self,
        x: Tensor,
        residual: "Tensor | Later | None" = None,
        norm: Norm | None = None,
        scales: Scales = NO_SCALES,
        ranks: Ranks | None = None,
    ):
        self.x, self.residual, self.norm, self.scales, self.ranks = x, residual, norm, scales, ranks

    @property
    def waits(self) -> bool:
        """For an addition, as it is no stream yet."""
        left = self.norm is not None or self.ranks is not None or any(part is not None for part in self.scales)
        return self.residual is None and left

    @property
    def tensor(self) -> Tensor:
        if self.residual is not None or self.waits:
            self._settle(None)
        return self.x

    def normed(self, after: Norm) -> Tensor:
        y = self._settle(after) if self.residual is not None else None
        return by(after, self.tensor) if y is None else y

    def _settle(self, after: Norm | None) -> Tensor | None:
        y = None
        if self.residual is not None:
            self.x, y = add_normed(self.x, plain(self.residual), self.norm, after, self.scales, self.ranks)
        else:
            x = times(whole(self.x, self.ranks), *self.scales)
            self.x = x if self.norm is None else by(self.norm, x)
        self.residual, self.norm, self.scales, self.ranks = None, None, NO_SCALES, None
        return y

    def __add__(self, other: Any) -> Any:
        return added(self, other)

    __radd__ = __add__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)

    def __getitem__(self, at: Any) -> Any:
        return self.tensor[at]

    def __mul__(self, other: Any) -> Any:
        return self.tensor * plain(other)

    __rmul__ = __mul__

    def __sub__(self, other: Any) -> Any:
        return self.tensor - plain(other)

    def __truediv__(self, other: Any) -> Any:
        return self.tensor / plain(other)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ADDS and len(args) == 2 and not kwargs:
            return added(*args)
        named = {name: plain(value) for name, value in (kwargs or {}).items()}
        return func(*(plain(value) for value in args), **named)


def plain(value: Any) -> Any:
    """Tensors in place of what is to be computed later."""
    if isinstance(value, Later):
        return value.tensor
    return type(value)(plain(v) for v in value) if type(value) in (tuple, list) else value


def streams(value: Any) -> bool:
    """Whether it is a stream, and nothing that waits to be added to one."""
    return isinstance(value, Later) and not value.waits


def added(a: Any, b: Any) -> Any:
    """a + b, later where one of them is a stream. What waits is added to a tensor now."""
    if streams(b) or (isinstance(a, Later) and not streams(a)):
        a, b = b, a
    if isinstance(b, Later) and not streams(b):
        if streams(a):
            return Later(b.x, a, b.norm, b.scales, b.ranks)
        if isinstance(a, Tensor):
            return add_normed(b.x, a, b.norm, None, b.scales, b.ranks)[0]
    if streams(a) and isinstance(b, Tensor):
        return Later(b, a)
    return plain(a) + plain(b)


def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A decoder layer's own, with its hidden states as a stream."""
    own: Callable[..., Any] = type(layer).forward
    if args:
        return own(layer, stream(args[0]), *args[1:], **kwargs)
    return own(layer, **kwargs | {"hidden_states": stream(kwargs["hidden_states"])})


def stream(hidden: Any) -> Any:
    return Later(hidden) if isinstance(hidden, Tensor) else hidden


def later(norm: Norm, x: Any) -> Later:
    """A norm's forward where what it gives is added to the stream."""
    if isinstance(x, Later) and x.waits and x.norm is None:
        return Later(x.x, norm=norm, scales=x.scales, ranks=x.ranks)
    return Later(plain(x), norm=norm)


def product(linear: Linear, x: Any) -> Any:
    """A linear's forward where what it gives is added to the stream, or goes to such a norm."""
    x = plain(x)
    if watched(linear):  # who watches is not to see what is no output yet
        return Linear.forward(linear, x)
    y, rows, columns = linear.unscaled(x)
    ranks = linear.parted.ranks if linear.parted is not None else None
    left = rows is not None or columns is not None or ranks is not None
    return Later(y, scales=(rows, columns), ranks=ranks) if left else y


@cache
def kernel() -> Any:
    from fewbit.kernels import triton_add_norm

    return triton_add_norm
