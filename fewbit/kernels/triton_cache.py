"""Writing keys and values into a cache on a GPU, rounded as kernels.cache does, in one launch.

Keys that are yet to be turned by their places are turned as they are written, and queries beside them. Keys that hold
their values are written alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbit.kernels import saturation
from fewbit.kernels.cache import Cache
from fewbit.kernels.table import New
from fewbit.kernels.triton_attention_parts import padded
from fewbit.kernels.triton_early import await_last, early, let_next
from fewbit.kernels.triton_rotary import MANY, constants, entries, steps, turned
from fewbit.kernels.triton_runtime import cdiv, power

TILE = {True: 4096, False: 512}  # numbers of a program, of many tokens and of few
EACH = {True: 512, False: 128}  # numbers of a warp, of a cache of numbers and of one of codes, which it divides
EVEN = tl.constexpr(12582912.0)  # 1.5 x 2^23: what is added to it and taken away again is rounded, ties to even


def write(cache: Cache, new: New, query: Tensor) -> Tensor:
    """query: [1, H, T, D]; any strides but the last. -> query, turned where it was yet to be."""
    key, value, rotary = new.key, new.value, new.rotary
    (heads, tokens, size), value_size = key.shape[1:], value.shape[3]
    pad, element = padded(max(size, value_size)), cache.element
    made = query if rotary is None else torch.empty_like(query)
    block = min(power(heads), max(1, TILE[tokens >= MANY] // pad))
    tiles = cdiv(heads, block) * (1 if cache.shared else 2)
    tables = () if rotary is None else (rotary.cos, rotary.sin)
    places = (None, None, 0, 0) if rotary is None else (*tables, *(steps(table)[1] for table in tables))
    _write[(tokens, tiles + (0 if rotary is None else cdiv(query.shape[1], block)))](
        key, value, query, made, cache.key, cache.value, cache.key_scale, cache.value_scale, cache.key_measured,
        cache.value_measured, None if cache.key_measured is None else saturation.count_of(key.device), new.slots,
        *places, heads, query.shape[1], size, value_size, key.stride(2), key.stride(1), value.stride(2),
        value.stride(1), query.stride(2), query.stride(1), made.stride(2), made.stride(1), *cache.key.stride()[:2],
        *cache.value.stride()[:2], SHARED=cache.shared, D=size, HEADS=block, PAD=pad,
        LEAST=None if element is None else element.min, MOST=None if element is None else element.max,
        WHOLE=not cache.key.is_floating_point(), num_warps=max(1, min(4, block * pad // EACH[element is None])),
        **constants(rotary), **early(key.device),
    )  # fmt: skip
    return made


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _write(
    key, value, query, made, key_plane, value_plane, key_scale, value_scale, key_measured, value_measured, cut, slots,
    cos, sin, cos_row, sin_row, heads, queries, size, value_size, k_row, k_head, v_row, v_head, q_row, q_head, m_row,
    m_head, kp_slot, kp_head, vp_slot, vp_head, SHARED: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
    PAD: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, WHOLE: tl.constexpr, R: tl.constexpr,
    READS: tl.constexpr, WRITES: tl.constexpr, OWN: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next(EARLY)
    token = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(heads, HEADS)
    tile = tl.program_id(1)
    d = tl.arange(0, PAD)
    if R > 0:
        cos += token * cos_row
        sin += token * sin_row
    c, s = entries(cos, sin, PAD, R, WRITES, OWN)
    slot = tl.load(slots + token).to(tl.int64)
    head = (tile % tiles) * HEADS + tl.arange(0, HEADS)
    there = head < heads
    unit = None
    if key_measured is not None:
        unit = tl.load(key_measured + head, there & (tile < tiles), 1.0)
        unit *= tl.load(value_measured + head, there & (tile >= tiles), 1.0)
    await_last(EARLY)
    first = tiles if SHARED else 2 * tiles  # of queries
    if tile >= first:
        head = (tile - first) * HEADS + tl.arange(0, HEADS)
        there = head < queries
        x = turned(query + token * q_row, head * q_head, there, c, s, D, PAD, R, READS, WRITES, WIDE)
        tl.store(made + token * m_row + (head * m_head)[:, None] + d[None, :], x, there[:, None] & (d < D)[None, :])
        return
    if tile < tiles:
        x = turned(key + token * k_row, head * k_head, there, c, s, D, PAD, R, READS, WRITES, WIDE)
        x = coded(x, head, there, key_scale, unit, cut, slot * heads, LEAST, MOST, WHOLE)
        tl.store(key_plane + slot * kp_slot + (head * kp_head)[:, None] + d[None, :],
                 x.to(key_plane.dtype.element_ty), there[:, None] & (d < size)[None, :])  # fmt: skip
    else:
        inside = there[:, None] & (d < value_size)[None, :]
        x = tl.load(value + token * v_row + (head * v_head)[:, None] + d[None, :], inside, other=0.0)
        x = coded(x, head, there, value_scale, unit, cut, slot * heads, LEAST, MOST, WHOLE)
        tl.store(value_plane + slot * vp_slot + (head * vp_head)[:, None] + d[None, :],
                 x.to(value_plane.dtype.element_ty), inside)  # fmt: skip


@triton.jit
def coded(x, head, there, scales, unit, cut, row, LEAST: tl.constexpr, MOST: tl.constexpr, WHOLE: tl.constexpr):
    """x: [heads, PAD] -> what a cast makes codes of; scales that are chosen here are written to scales + row.

    unit: measured scales, if any. cut: where values that they cut off are counted. Without codes x stays.
    """
    if MOST is not None:
        x = x.to(tl.float32)
        if unit is not None:
            x = tl.math.div_rn(x, tl.broadcast_to(unit[:, None], x.shape))
            many = tl.sum(((x > MOST) | (x < LEAST)).to(tl.int32), 1)
            tl.atomic_add(cut + head * 0, many.to(tl.int64), many > 0)
        else:
            scale = tl.math.div_rn(tl.max(tl.abs(x), 1), MOST)
            scale = tl.where(tl.sum((x != x).to(tl.int32), 1) > 0, float("nan"), scale)  # which tl.max overlooks
            tl.store(scales + row + head, scale, mask=there)
            unit = tl.where(scale > 0.0, scale, 1.0)
            x = tl.math.div_rn(x, tl.broadcast_to(unit[:, None], x.shape))
        if WHOLE:
            x = tl.where(x == x, x + EVEN - EVEN, 0.0)
        x = tl.maximum(x, LEAST, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, MOST, propagate_nan=tl.PropagateNan.ALL)
    return x
