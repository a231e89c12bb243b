"""Writing keys and values into a cache on a GPU, rounded as kernels.cache does: one launch for both.

Keys that hold their values are written alone.
"""

import triton
import triton.language as tl
from torch import Tensor

from fewbit.kernels import saturation
from fewbit.kernels.cache import Cache
from fewbit.kernels.triton_attention_parts import padded
from fewbit.kernels.triton_early import begin, early
from fewbit.kernels.triton_runtime import power

TILE = 4096  # numbers of a program
EVEN = tl.constexpr(12582912.0)  # 1.5 x 2^23: what is added to it and taken away again is rounded, ties to even


def write(cache: Cache, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """key: [1, G, T, D], value: [1, G, T, Dv], any strides but the last; slots: [T]."""
    heads, tokens, size, value_size = key.shape[1], key.shape[2], key.shape[3], value.shape[3]
    pad, element = padded(max(size, value_size)), cache.element
    block = min(power(heads), max(1, TILE // pad))
    _write[(tokens, -(-heads // block), 1 if cache.shared else 2)](
        key, value, cache.key, cache.value, cache.key_scale, cache.value_scale, cache.key_measured,
        cache.value_measured, None if cache.key_measured is None else saturation.count_of(key.device), slots, heads,
        size, value_size, key.stride(2), key.stride(1), value.stride(2), value.stride(1), *cache.key.stride()[:2],
        *cache.value.stride()[:2], HEADS=block, PAD=pad, LEAST=None if element is None else element.min,
        MOST=None if element is None else element.max, WHOLE=not cache.key.is_floating_point(),
        num_warps=1 if block * pad <= 1024 else 4, **early(key.device),
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _write(
    key, value, key_plane, value_plane, key_scale, value_scale, key_measured, value_measured, cut, slots, heads, size,
    value_size, k_row, k_head, v_row, v_head, kp_slot, kp_head, vp_slot, vp_head, HEADS: tl.constexpr,
    PAD: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, WHOLE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    slot = tl.load(slots + token)
    if tl.program_id(2) == 0:
        _rows(key + token * k_row, k_head, key_plane + slot * kp_slot, kp_head, key_scale, key_measured, cut, slot,
              head, heads, size, PAD, LEAST, MOST, WHOLE)  # fmt: skip
    else:
        _rows(value + token * v_row, v_head, value_plane + slot * vp_slot, vp_head, value_scale, value_measured, cut,
              slot, head, heads, value_size, PAD, LEAST, MOST, WHOLE)  # fmt: skip


@triton.jit
def _rows(
    given, g_head, plane, p_head, scales, measured, cut, slot, head, heads, size, PAD: tl.constexpr,
    LEAST: tl.constexpr, MOST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """All heads of one token. cut: where values that a measured scale cuts off are counted."""
    d = tl.arange(0, PAD)
    there = (head < heads)[:, None] & (d < size)[None, :]
    x = tl.load(given + head[:, None] * g_head + d[None, :], mask=there, other=0.0)
    if MOST is not None:
        x = x.to(tl.float32)
        if measured is not None:
            unit = tl.load(measured + head, mask=head < heads, other=1.0)
            x = tl.math.div_rn(x, tl.broadcast_to(unit[:, None], x.shape))
            many = tl.sum(tl.sum(((x > MOST) | (x < LEAST)).to(tl.int64), 1), 0)
            if many > 0:
                tl.atomic_add(cut, many)
        else:
            scale = tl.math.div_rn(tl.max(tl.abs(x), 1), MOST)
            scale = tl.where(tl.sum((x != x).to(tl.int32), 1) > 0, float("nan"), scale)  # which tl.max overlooks
            tl.store(scales + slot * heads + head, scale, mask=head < heads)
            unit = tl.where(scale > 0.0, scale, 1.0)
            x = tl.math.div_rn(x, tl.broadcast_to(unit[:, None], x.shape))
        if WHOLE:
            x = tl.where(x == x, x + EVEN - EVEN, 0.0)
        x = tl.maximum(x, LEAST, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, MOST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(plane + head[:, None] * p_head + d[None, :], x.to(plane.dtype.element_ty), mask=there)
