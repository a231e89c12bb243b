"""Rotary embedding of queries and keys in the forms that models write it in, both in one call of a kernel.

A pair (a, b) of channels becomes (a cos - b sin, b cos + a sin). Forms differ in which channels are pairs, where the
pair goes, and which entries of the tables are its own.

Attention's kernels turn what they read: there Rotate hands on what it was given (`late`), and who attends claims it.
What comes to attention as something else has been in other hands on the way, and is an error.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from fewbit.errors import UnsupportedError
from fewbit.kernels import fused
from fewbit.kernels.table import Rotary

Pairs = Literal["halves", "neighbours"]  # channels (j, j + R/2), or (2j, 2j + 1)
Table = Literal["own", "first", "short"]  # each channel's entry; the first half serves both; there is but that half


@dataclass(frozen=True, slots=True)
class RotaryForm:
    """reads, writes: the pairs of the input and of the output. wide: computed in float32 and cast at the end.

    partial: the first channels may be turned alone. mixed: tables may be float32 where q and k have 16 bits, and all is
    computed in float32 then.
    """

    reads: Pairs = "halves"
    writes: Pairs = "halves"
    table: Table = "own"
    wide: bool = False
    partial: bool = True
    mixed: bool = True

    def __str__(self) -> str:
        moved = self.reads if self.reads == self.writes else f"{self.reads} to {self.writes}"
        return f"pairs of {moved}, {self.table} entries{', in float32' if self.wide else ''}"

    def width(self, cos: Tensor) -> int:
        """How many channels are turned."""
        return cos.shape[-1] * (2 if self.table == "short" else 1)

    def with_tables(self, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Rotary:
        """dtype: of queries and keys."""
        reads, writes = self.reads == "neighbours", self.writes == "neighbours"
        return Rotary(cos, sin, reads, writes, self.table, self.wide or cos.dtype != dtype)


FORMS = tuple(RotaryForm(reads, writes, table, wide)
              for reads, writes in (("halves", "halves"), ("neighbours", "neighbours"), ("neighbours", "halves"))
              for table in ("own", "first", "short") for wide in (False, True))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rotate:
    """Stands under the name of a model's own function, which takes what this does not. heads: its axis by default."""

    original: Callable[..., Any]
    form: RotaryForm
    heads: int

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        heads = named.get("unsqueeze_dim", self.heads)
        if rest or len(named) > ("unsqueeze_dim" in named) or not fits(q, k, cos, sin, self.form, heads):
            return self.original(q, k, cos, sin, *rest, **named)
        turning = Turning(q, k, cos, sin, self.form, heads)
        return (q, k) if left(turning) else turning.done()


@dataclass(frozen=True, slots=True)
class Turning:
    """A call of Rotate."""

    q: Tensor
    k: Tensor
    cos: Tensor
    sin: Tensor
    form: RotaryForm
    heads: int

    def done(self) -> tuple[Tensor, Tensor]:
        return rotate(self.q, self.k, self.cos, self.sin, self.form, self.heads)

    def attended(self) -> tuple[Tensor, Tensor]:
        """The same, [B, H, T, D]."""
        q, k = self.done()
        return (q, k) if self.heads == 1 else (q.transpose(1, 2), k.transpose(1, 2))

    @property
    def rotary(self) -> Rotary:
        return self.form.with_tables(self.cos, self.sin, self.q.dtype)

    @property
    def fits_kernel(self) -> bool:
        """Whether the kernels of a GPU take it."""
        return bool(kernel().takes(self.q, self.k, self.cos, self.sin, self.form.width(self.cos), self.heads))

    def gave(self, query: Tensor, key: Tensor) -> bool:
        """Whether these are what it handed on, [B, H, T, D]."""
        held = (self.q, self.k) if self.heads == 1 else (self.q.transpose(1, 2), self.k.transpose(1, 2))
        return all(place(a) == place(b) for a, b in zip(held, (query, key), strict=True))


class Astray(UnsupportedError):
    """What Rotate handed on did not come to attention as it was."""


class _Late(threading.local):
    may = False
    waits: Turning | None = None


_late = _Late()


@contextmanager
def late() -> Iterator[None]:
    """Within, on this thread, Rotate leaves turning to attention."""
    _late.may, _late.waits = True, None
    try:
        yield
        if _late.waits is not None:
            raise Astray("queries and keys that are yet to be turned came to no attention of ours")
    finally:
        _late.may, _late.waits = False, None


def left(turning: Turning) -> bool:
    """Whether it was left to attention."""
    if not _late.may:
        return False
    if _late.waits is not None:
        raise Astray("queries and keys are to be turned while others still wait for it")
    _late.waits = turning
    return True


def claimed(query: Tensor, key: Tensor) -> Turning | None:
    """What is yet to be done to those that attention was given: [B, H, T, D]."""
    turning, _late.waits = _late.waits, None
    if turning is not None and not turning.gave(query, key):
        raise Astray("queries and keys that are yet to be turned came to attention as something else")
    return turning


def place(x: Tensor) -> tuple[Any, ...]:
    """Where in memory it lies, and how."""
    return x.data_ptr(), x.shape, x.stride(), x.dtype


def fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: RotaryForm, heads: int) -> bool:
    """Whether these are what the form is about: four axes and three, of one type, as many channels as it turns."""
    if heads not in (1, 2) or (q.dim(), k.dim(), cos.dim(), sin.dim()) != (4, 4, 3, 3):
        return False
    width, d = form.width(cos), q.shape[-1]
    tables = (q.dtype, torch.float32) if form.mixed else (q.dtype,)
    alike = q.dtype == k.dtype and cos.dtype == sin.dtype and cos.dtype in tables
    alike = alike and cos.shape == sin.shape and k.shape[-1] == d
    return alike and (width == d or (form.partial and width < d))


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: RotaryForm, heads: int = 1) -> tuple[Tensor, Tensor]:
    """q, k: four axes, of which `heads` counts heads; cos, sin: the same without it, [.., R] -> q and k turned."""
    run: Any = None
    if q.is_cuda:
        run = kernel() if kernel().takes(q, k, cos, sin, form.width(cos), heads) else None
    elif fused.takes_rotary(q, k, cos, sin, form.width(cos), heads):
        run = fused
    if run is not None:
        found: tuple[Tensor, Tensor] = run.rotate(q, k, form.with_tables(cos, sin, q.dtype), heads)
        return found
    cos, sin = cos.unsqueeze(heads), sin.unsqueeze(heads)
    return turned(q, cos, sin, form), turned(k, cos, sin, form)


def turned(x: Tensor, cos: Tensor, sin: Tensor, form: RotaryForm) -> Tensor:
    """x: [..., D], cos and sin: [..., R] that broadcast to it; the oracle. y has x's order of axes."""
    width, y = form.width(cos), torch.empty_like(x)
    half = width // 2
    part, c, s = (t.float() if form.wide or cos.dtype != x.dtype else t for t in (x[..., :width], cos, sin))
    a, b = pair(part, form.reads, half)
    (c0, c1), (s0, s1) = (pair(t, form.writes, half) if form.table == "own" else (t[..., :half],) * 2 for t in (c, s))
    out = y[..., :width]
    first, second = pair(out, form.writes, half)
    first.copy_(a * c0 - b * s0)
    second.copy_(b * c1 + a * s1)
    y[..., width:] = x[..., width:]
    return y


def pair(x: Tensor, pairs: Pairs, half: int) -> tuple[Tensor, Tensor]:
    """Views of the first and of the second channel of each pair."""
    return (x[..., :half], x[..., half : 2 * half]) if pairs == "halves" else (x[..., 0::2], x[..., 1::2])


@cache
def kernel() -> Any:
    from fewbit.kernels import triton_rotary

    return triton_rotary
