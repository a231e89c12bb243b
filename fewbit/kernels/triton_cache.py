"""Writing keys and values into a cache on a GPU, narrowed as kernels.cache does: one launch for both."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbit.kernels.cache import CODES, FP8, Cache
from fewbit.kernels.triton_attention_parts import padded

TILE = 4096  # numbers of a program
EVEN = tl.constexpr(12582912.0)  # 1.5 x 2^23: what is added to it and taken away again is rounded, ties to even


def write(cache: Cache, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """key: [1, G, T, D], value: [1, G, T, Dv], any strides but the last; slots: [T]."""
    heads, tokens, size, value_size = key.shape[1], key.shape[2], key.shape[3], value.shape[3]
    pad = padded(max(size, value_size))
    block = min(triton.next_power_of_2(heads), max(1, TILE // pad))
    held = cache.key.dtype
    _write[(tokens, -(-heads // block), 2)](
        key, value, cache.key, cache.value, cache.key_scale, cache.value_scale, slots, heads, size, value_size,
        key.stride(2), key.stride(1), value.stride(2), value.stride(1), *cache.key.stride()[:2],
        *cache.value.stride()[:2], HEADS=block, PAD=pad, CODES=float(CODES), num_warps=1 if block * pad <= 1024 else 4,
        MOST=torch.finfo(held).max if held in FP8 else None,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _write(
    key, value, key_plane, value_plane, key_scale, value_scale, slots, heads, size, value_size, k_row, k_head, v_row,
    v_head, kp_slot, kp_head, vp_slot, vp_head, HEADS: tl.constexpr, PAD: tl.constexpr, CODES: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    slot = tl.load(slots + token)
    if tl.program_id(2) == 0:
        _rows(key + token * k_row, k_head, key_plane + slot * kp_slot, kp_head, key_scale, slot, head, heads, size,
              PAD, CODES, MOST)  # fmt: skip
    else:
        _rows(value + token * v_row, v_head, value_plane + slot * vp_slot, vp_head, value_scale, slot, head, heads,
              value_size, PAD, CODES, MOST)  # fmt: skip


@triton.jit
def _rows(
    given, g_head, plane, p_head, scales, slot, head, heads, size, PAD: tl.constexpr, CODES: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """All heads of one token."""
    d = tl.arange(0, PAD)
    there = (head < heads)[:, None] & (d < size)[None, :]
    x = tl.load(given + head[:, None] * g_head + d[None, :], mask=there, other=0.0)
    if scales is not None:
        wide = x.to(tl.float32)
        scale = tl.math.div_rn(tl.max(tl.abs(wide), 1), CODES)
        tl.store(scales + slot * heads + head, scale, mask=head < heads)
        unit = tl.broadcast_to(tl.where(scale > 0.0, scale, 1.0)[:, None], wide.shape)
        x = tl.math.div_rn(wide, unit) + EVEN - EVEN
    elif MOST is not None:
        x = tl.minimum(tl.maximum(x.to(tl.float32), -MOST), MOST)
    tl.store(plane + head[:, None] * p_head + d[None, :], x.to(plane.dtype.element_ty), mask=there)
