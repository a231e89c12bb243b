"""Attention over a paged cache on a GPU: what it takes, and the way to its kernels. Its oracle is modules.paged.

Requests with one row go to triton_attention_decode, which splits long texts among programs; the others go to
triton_attention_prefill. A table with blocks says on the device which are whose. Nothing here waits for the device or
reads from it, so that a CUDA graph can hold all of it.

A step's own keys and values are written before, by the launch that turns them and the queries by their places.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fewbit.kernels.cache import HELD, Cache
from fewbit.kernels.cache_packed import PackedCache
from fewbit.kernels.table import New, Table
from fewbit.kernels.triton_runtime import lacking

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 512  # numbers of a key, or of a value: beyond it tiles of both do not fit side by side


def refusal(query: Tensor, cache: Cache | PackedCache) -> str | None:
    """Why these cannot be attended to here."""
    if (why := lacking(query.device)) is not None:
        return why
    if isinstance(cache, PackedCache):
        return "takes caches of values, or of codes of a byte each"
    held = cache.key.dtype
    if query.dtype not in FLOATS or held not in (*FLOATS, *HELD.values()):
        return f"takes queries of 16 or 32 bits and caches of 8 to 32, not {query.dtype} over {held}"
    if (widest := max(split(cache))) > WIDEST:
        return f"takes heads of up to {WIDEST}, not of {widest}"
    return None


def split(cache: Cache) -> tuple[int, int, int]:
    """Numbers of a value, of a key as far as it is one tile, and of the rest: what follows a value that it holds."""
    size, value_size = cache.key.shape[2], cache.value.shape[2]
    return (value_size, value_size, size - value_size) if cache.shared else (value_size, size, 0)


def write(cache: Cache, new: New, query: Tensor) -> Tensor:
    """query: [1, H, T, D] -> the same, turned where it was yet to be, as what is written is."""
    from fewbit.kernels import triton_cache

    if not cache.fits(new.slots, new.key, new.value):
        cache.write(new.slots, new.key, new.value)  # torch's error
    held = replace(new, key=_dense_heads(new.key), value=_dense_heads(new.value))
    return triton_cache.write(cache, held, _dense_heads(query))


def attend(
    query: Tensor,
    cache: Cache,
    out: Tensor,
    table: Table,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    p: float = 0.0,
    new: New | None = None,
) -> None:
    """query: [1, H, T, D], as it lies -> out: [T, H, Dv]: the rows of all requests, 0 for those of length 0.

    p: see modules.attention_sides.Sides. new: what is written first.
    """
    from fewbit.kernels import triton_attention_decode, triton_attention_prefill

    query = _dense_heads(query if new is None else write(cache, new, query))
    if table.ones:
        triton_attention_decode.run(query, cache, out, table, scaling, window, softcap, sinks, p)
    if table.blocks is not None or len(table.lengths) > table.ones:
        triton_attention_prefill.run(query, cache, out, table, scaling, window, softcap, sinks, p)


def _dense_heads(x: Tensor) -> Tensor:
    """The kernels take any strides but that of the numbers of one head."""
    return x if x.stride(-1) == 1 else x.contiguous()
