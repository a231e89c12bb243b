"""Attention over a paged cache on a CPU: of a few queries each by itself, of prompts by blocks of queries and keys.

The work is in attend.cpp; its oracle is modules.paged.
"""

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fewbit.kernels.cache import Cache
from fewbit.kernels.cache_packed import PackedCache
from fewbit.kernels.compiled import call, left, library
from fewbit.quant import elements

FEW = 4  # queries of one request up to which each reads the cache for itself
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class Attend(ctypes.Structure):
    """attend.cpp's Attend."""

    _fields_ = (
        *(
            (n, ctypes.c_void_p)
            for n in (
                "query",
                "key",
                "value",
                "out",
                "rows",
                "slots",
                "lengths",
                "counts",
                "sinks",
                "codes",
                "key_scale",
                "value_scale",
            )
        ),
        *(
            (n, ctypes.c_int64)
            for n in ("count", "heads", "key_heads", "size", "value_size", "window", "scale_step", "value_step")
        ),
        *((n, ctypes.c_float) for n in ("scaling", "softcap")),
        ("narrow", ctypes.c_int32),
    )


@dataclass(slots=True)
class Queries:
    """Which tokens of a step are asked for, and the text that each sees; the same in every layer."""

    rows: Tensor
    slots: Tensor  # pointers
    lengths: Tensor
    held: list[Tensor] = field(repr=False)  # what they point to
    counts: Tensor | None = None  # queries of each, one after the other; None: one

    @classmethod
    def of(cls, spans: Sequence[tuple[int, int, int, Tensor]]) -> "Queries":
        """spans: (first token, last token + 1, length, slots) of each request."""
        each = [(row, text.data_ptr(), length - stop + row + 1) for start, stop, length, text in spans
                for row in range(start, stop)]  # fmt: skip
        rows, slots, lengths = (torch.tensor([e[i] for e in each], dtype=torch.int64) for i in range(3))
        return cls(rows, slots, lengths, [text for *_, text in spans])

    @classmethod
    def whole(cls, spans: Sequence[tuple[int, int, int, Tensor]]) -> "Queries":
        """The same for `prompts`: all queries of a request together."""
        each = [(start, text.data_ptr(), length, stop - start) for start, stop, length, text in spans]
        rows, slots, lengths, counts = (torch.tensor([e[i] for e in each], dtype=torch.int64) for i in range(4))
        return cls(rows, slots, lengths, [text for *_, text in spans], counts)


def refusal(query: Tensor, cache: Cache | PackedCache) -> str | None:
    """Why these cannot be attended to here."""
    if isinstance(cache, PackedCache):
        return "takes caches of values, or of codes of a byte each"
    alike = cache.element is not None or query.dtype == cache.key.dtype == cache.value.dtype
    if query.device.type != "cpu" or query.dtype not in DTYPES or not alike:
        return "takes float32 or bfloat16 on a CPU, a cache of values in the type of the queries"
    if left():
        return "left to torch"
    found = library("attend")
    return found if isinstance(found, str) else None


def prompts(query: Tensor, explicit: bool) -> bool:
    """Whether `attend` takes many queries at once, and had better. explicit: torch would write their scores out."""
    able = 0 if query.dtype != torch.bfloat16 or isinstance(library("attend"), str) else int(_native().many())
    return able == 1 or (able == 2 and explicit)  # 2: torch multiplies in tiles


def attend(
    query: Tensor,
    cache: Cache,
    out: Tensor,
    queries: Queries,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """query: [T, H, D], contiguous as the keys are -> rows of out: [T, H, Dv]. With counts in bfloat16 alone."""
    assert queries.counts is None or query.dtype == torch.bfloat16
    key, value = cache.key, cache.value
    held = None if sinks is None else sinks.detach().float().contiguous()
    codes = None if cache.element is None else elements.values(cache.element)
    scales = (cache.key_measured, cache.value_measured) if cache.key_scale is None else (
        cache.key_scale, cache.value_scale)  # fmt: skip
    call(_native().attend, ctypes.byref(Attend(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(), queries.rows.data_ptr(),
        queries.slots.data_ptr(), queries.lengths.data_ptr(), _at(queries.counts), _at(held), _at(codes),
        _at(scales[0]), _at(scales[1]), len(queries.rows), query.shape[1], key.shape[1], query.shape[2],
        value.shape[2], window or 0, 0 if cache.key_scale is None else key.shape[1], value.stride(1), scaling,
        softcap or 0.0, DTYPES[query.dtype],
    )))  # fmt: skip


KEEP = struct.Struct("5P8q")  # attend.cpp's Keep


def write(cache: Cache | PackedCache, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """As cache.write; of values that stay what they are in one call."""
    plain = isinstance(cache, Cache) and cache.element is None and cache.fits(slots, key, value)
    pairs = ((key, cache.key), (value, cache.value)) if plain and isinstance(cache, Cache) else ()
    taken = bool(pairs) and all(_alike(*pair) for pair in pairs) and not left()
    if not taken or isinstance(library("attend"), str):
        cache.write(slots, key, value)  # or torch's error, where they do not fit
        return
    sizes = [n * t.element_size() for t, _ in pairs for n in (t.shape[3], t.stride(2), t.stride(1))]
    if isinstance(cache, Cache) and cache.shared:  # keys bring their values along
        sizes[3] = 0
    call(_native().keep, KEEP.pack(
        *(t.data_ptr() for t, _ in pairs), *(plane.data_ptr() for _, plane in pairs), slots.contiguous().data_ptr(),
        key.shape[2], key.shape[1], *sizes,
    ))  # fmt: skip


def _alike(t: Tensor, plane: Tensor) -> bool:
    return t.is_cpu and t.dtype == plane.dtype and t.stride(3) == 1


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def _native() -> Any:
    found = library("attend")
    assert not isinstance(found, str), found
    found.attend.argtypes, found.keep.argtypes = [ctypes.c_void_p], [ctypes.c_char_p]
    found.attend.restype = found.keep.restype = None
    found.many.restype = ctypes.c_int
    return found
