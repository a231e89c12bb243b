"""Attention over a paged cache: many requests of different lengths in one flat row of tokens.

What a step works on travels beside the model's own arguments, as the thread's current Step. Keys and values go to their
slots first; then each request reads its own slots back, and nothing else. A step with a Table goes to the kernels of a
GPU whole. Elsewhere few queries and prompts go to kernels where there are some; the others, and the oracle, are plain
torch. Registered with transformers without a mask.

What a module's keys and values are rounded to (modules.attention.KV) is how its cache holds them, where it can.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fewbit.errors import UnsupportedError
from fewbit.kernels import attend, triton_attention
from fewbit.kernels.cache import Cache, Rounding
from fewbit.kernels.cache_packed import PackedCache, room
from fewbit.kernels.table import New, Table
from fewbit.modules import rotary
from fewbit.modules.attention import INSIDE, KV, KV_TURN, WATCH_KV, Inside, in_runs, known_or_raise, rounded
from fewbit.modules.attention_sides import NOTHING, of

__all__ = ["NAME", "AnyCache", "Cache", "Span", "Step", "Table", "current", "forward", "stepping"]
AnyCache = Cache | PackedCache
NAME = "fewbit-paged"
How = tuple[float, int | None, float | None, Tensor | None, float]  # scaling, window, softcap, sinks, p of Sides
QUERIES = 64  # that are attended to at once where there are many: what none of them sees is left out
PLAIN = "what attention makes on the way is rounded or watched, which no kernel does"


@dataclass(slots=True)
class Span:
    """One request's part of a step: rows start to stop of the step's tokens are the last of `length` cached ones."""

    start: int
    stop: int
    length: int
    slots: Tensor  # [length] int64


@dataclass
class Step:
    """One forward. Caches grow as layers are met; a layer's heads are seen, not read from a config."""

    slots: Tensor  # [T] int64, or int32 beside a table: where each token goes
    make_spans: Callable[[], list[Span]]  # called only where no kernel on a GPU takes the step
    caches: dict[int, AnyCache]
    capacity: int  # slots of a new cache
    dtype: torch.dtype | None = None  # of a new cache that holds values; None: the model's
    table: Table | None = None  # what the spans say, for kernels on a GPU
    refused: str | None = None  # why those do not take the step: there before make_spans is called
    queries: attend.Queries | None = None  # what the spans say, where each is one query for the kernel of such
    late: bool = False  # attention turns queries and keys by their places: see modules.rotary.late
    masks: dict[tuple[int, int, int | None, torch.dtype], Tensor] = field(default_factory=dict)

    @cached_property
    def spans(self) -> list[Span]:
        return self.make_spans()

    @cached_property
    def few(self) -> attend.Queries | None:
        """Of spans short enough for the kernel of single queries."""
        if self.queries is not None:
            return self.queries
        short = [(s.start, s.stop, s.length, s.slots) for s in self.spans if s.stop - s.start <= attend.FEW]
        return attend.Queries.of(short) if short else None

    @cached_property
    def rest(self) -> list[Span]:
        return [] if self.queries is not None else [s for s in self.spans if s.stop - s.start > attend.FEW]

    @cached_property
    def many(self) -> attend.Queries:
        """Of the rest, for the kernel of prompts."""
        return attend.Queries.whole([(s.start, s.stop, s.length, s.slots) for s in self.rest])

    def cache(self, layer: int, key: Tensor, value: Tensor, kv: Rounding | None = None) -> AnyCache:
        if layer not in self.caches:
            self.caches[layer] = room(self.capacity, key, value, self.dtype, kv)
        return self.caches[layer]

    def mask(self, queries: int, length: int, window: int | None, like: Tensor) -> Tensor:
        """Additive [queries, length]: the last queries of a text see what is before them, no farther than window."""
        key = queries, length, window, like.dtype
        if key not in self.masks:
            at = torch.arange(length - queries, length, device=like.device)[:, None]
            gap = at - torch.arange(length, device=like.device)
            hidden = (gap < 0) if window is None else (gap < 0) | (gap >= window)
            zero = torch.zeros(queries, length, dtype=like.dtype, device=like.device)
            self.masks[key] = zero.masked_fill_(hidden, torch.finfo(like.dtype).min)
        return self.masks[key]


_current = threading.local()


def current() -> Step | None:
    """What attention of this thread works on."""
    found: Step | None = getattr(_current, "step", None)
    return found


@contextmanager
def stepping(step: Step) -> Iterator[None]:
    """Within: attention of this thread works on this step."""
    _current.step = step
    try:
        with rotary.late() if step.late else nullcontext():
            yield
    finally:
        _current.step = None


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query: [1, H, T, D], key: [1, G, T, D], value: [1, G, T, Dv] -> [1, T, H, Dv]."""
    step = current()
    if step is None or attention_mask is not None or query.shape[0] != 1:
        raise UnsupportedError(f"{type(module).__name__}: its attention does not run on a paged cache")
    known_or_raise(module, others)
    turning = rotary.claimed(query, key)
    if turning is not None and not turns(module):
        (query, key), turning = turning.attended(), None
    if (watch := getattr(module, WATCH_KV, None)) is not None:
        watch(key, value)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    how = scaling, sliding_window, softcap, s_aux, of(module).p
    if (turn := getattr(module, KV_TURN, None)) is None:
        return _attended(module, query, key, value, step, how, turning)[None], None
    out = _attended(module, turn(query), turn(key), turn(value), step, how, turning)
    return turn(out, back=True)[None], None


def turns(module: nn.Module) -> bool:
    """Whether nothing is done to a module's queries and keys between turning them and the cache."""
    others = any(getattr(module, name, None) is not None for name in (WATCH_KV, KV_TURN, INSIDE))
    return not others and of(module) is NOTHING


def _attended(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, step: Step, how: How, turning: rotary.Turning | None
) -> Tensor:
    """turning: what queries and keys still wait for. -> [T, H, Dv]"""
    kv: Rounding | None = getattr(module, KV, None)
    inside: Inside | None = getattr(module, INSIDE, None)
    query, key, value = of(module)(query, key, value)
    cache = step.cache(int(getattr(module, "layer_idx")), key, value, kv)  # noqa: B009
    if step.table is not None:
        step.refused = triton_attention.refusal(query, cache) if inside is None else PLAIN
    by_table = step.table is not None and step.refused is None
    rounds = kv is not None and not cache.rounds
    if turning is not None and (rounds or not by_table or not turning.fits_kernel):
        (query, key), turning = turning.attended(), None
    if kv is not None and rounds:
        key, value = rounded(key, value, *kv)
    if by_table:
        assert isinstance(cache, Cache) and step.table is not None
        new = New(key, value, step.slots, None if turning is None else turning.rotary)
        return _by_table(query, new, cache, step.table, how)
    attend.write(cache, step.slots, key, value)
    return _by_spans(query, cache, value.shape[3], step, how, inside)


def _by_table(query: Tensor, new: New, cache: Cache, table: Table, how: How) -> Tensor:
    """Rows of no request stay finite; without a list of blocks there are no such rows."""
    room = query.new_empty if table.blocks is None else query.new_zeros
    out = room(query.shape[2], query.shape[1], new.value.shape[3])
    triton_attention.attend(query, cache, out, table, *how, new)
    return out


def _by_spans(query: Tensor, cache: AnyCache, value_size: int, step: Step, how: How, inside: Inside | None) -> Tensor:
    out = query.new_zeros(query.shape[2], query.shape[1], value_size)  # rows of no request stay finite
    *plain, p = how
    asked: list[attend.Queries] = []
    if p or inside is not None or attend.refusal(query, cache) is not None:
        rest = step.spans
    else:
        many = bool(step.rest) and attend.prompts(query, explicit=plain[2] is not None or plain[3] is not None)
        asked, rest = [*filter(None, (step.few, step.many if many else None))], [] if many else step.rest
    if asked:
        assert isinstance(cache, Cache)
        rows = query[0].transpose(0, 1).contiguous()
        for each in asked:
            attend.attend(rows, cache, out, each, *plain)
    for span in rest:
        out[span.start : span.stop] = _attend(query[:, :, span.start : span.stop], cache, span, step, *how, inside)
    return out


def _attend(
    query: Tensor,
    cache: AnyCache,
    span: Span,
    step: Step,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    p: float,
    inside: Inside | None,
) -> Tensor:
    """One request: [1, H, Q, D] -> [Q, H, Dv]."""
    count, length, slots = query.shape[2], span.length, span.slots
    if window is not None and length - count + 1 > window:  # nothing before this is seen by any of the queries
        slots = slots[length - count + 1 - window :]
        length = len(slots)
    window = window if window is not None and length > window else None
    key, value = cache.read(slots, query.dtype)
    if p or inside is not None:  # which look at all scores together
        mask = None if count == 1 and window is None else step.mask(count, length, window, query)
        return in_runs(query, key, value, mask, scaling, softcap, sinks, p, inside)[0].transpose(0, 1)
    explicit = softcap is not None or sinks is not None
    taken = key if isinstance(cache, Cache) and cache.shared else value  # of one size with keys they are fast
    out = query.new_empty(count, query.shape[1], value.shape[3])
    for first in range(0, count, QUERIES):
        last = min(first + QUERIES, count)
        rows, stop = last - first, length - count + last
        start = 0 if window is None else max(0, stop - rows + 1 - window)  # what is before none of them sees
        narrow = window if window is not None and stop - start > window else None
        causal = narrow is None and rows == stop - start > 1 and not explicit
        mask = None if causal or rows == 1 else step.mask(rows, stop - start, narrow, query)
        q, k, v = query[:, :, first:last], key[:, :, start:stop], (value if explicit else taken)[:, :, start:stop]
        if explicit:
            found = in_runs(q, k, v, mask, scaling, softcap, sinks)
        else:
            gqa = key.shape[1] != query.shape[1]
            found = scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scaling, enable_gqa=gqa)
        out[first:last] = found[0, ..., : value.shape[3]].transpose(0, 1)
    return out
