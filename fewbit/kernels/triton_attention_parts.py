"""What the attention kernels share: walking along a text through its pages, and a softmax that grows as it goes.

Logits are kept in powers of two. `top` starts at a finite lowest, so that rows that have seen nothing yet need no care.
A sink is where `top` and `total` start: a logit that takes weight and brings no value.
"""

from functools import cache as once

import torch
import triton
import triton.language as tl

from fewbit.kernels.cache import Cache

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)
LEAST = tl.constexpr(2.0**-6)  # below it e4m3 has one step
SMALL = tl.constexpr(1.5 * 2.0**14)  # what is added to it and taken away again is rounded to multiples of 2^-9


@triton.jit
def opening(sinks, head, inside, ROWS: tl.constexpr):
    """-> top and total of rows before anything is seen; head: [ROWS], inside: of which rows the sink counts here."""
    if sinks is None:
        top = tl.full([ROWS], LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
    else:
        sink = tl.load(sinks + head, mask=inside, other=float("-inf")).to(tl.float32) * LOG2E
        top = tl.maximum(sink, LOWEST)
        total = tl.where(sink > LOWEST, 1.0, 0.0)
    return top, total


@triton.jit
def as_e4m3(x):
    """x: float32 from 0 to 448 -> the nearest that e4m3 holds, ties to even; on devices that lack the type too."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return tl.where(x < LEAST, x + SMALL - SMALL, normal)


@triton.jit
def walk(
    query, acc, total, top, first, last, length, at, window, pages, key, value, key_scale, value_scale, k_slot, v_slot,
    s_slot, scaling, softcap, MASKED: tl.constexpr, SIZE: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, PRECISION: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Tokens first to last for rows that stand at places `at`; MASKED where a row may not see all of them.

    P above 0: weights, as far as the largest seen so far is 1, are rounded to e4m3 after this factor. Products of e4m3
    are what they are in 16 bits.
    """
    d = tl.arange(0, DP)
    e = tl.arange(0, DVP)
    for start in range(first, last, TOKENS):
        n = start + tl.arange(0, TOKENS)
        inside = n < length
        if MASKED:
            page = tl.load(pages + n // SIZE, mask=inside, other=0)
        else:
            page = tl.load(pages + n // SIZE)
        slot = page.to(tl.int64) * SIZE + n % SIZE
        k_at = key + slot[None, :] * k_slot + d[:, None]
        if MASKED or D < DP:
            keys = tl.load(k_at, mask=inside[None, :] & (d < D)[:, None], other=0.0)
        else:
            keys = tl.load(k_at)
        scores = tl.dot(query, keys.to(query.dtype), input_precision=PRECISION)
        if key_scale is not None:
            scores *= tl.load(key_scale + slot * s_slot, mask=inside, other=0.0)[None, :]
        factor = scaling * LOG2E
        if softcap is not None:  # tanh from an exponential that may overflow: 2 / inf is 0
            scores = softcap - 2.0 * softcap / (tl.exp2(scores * (2.0 * factor / softcap)) + 1.0)
            factor = LOG2E
        if MASKED:
            seen = inside[None, :] & (n[None, :] <= at[:, None])
            if window is not None:
                seen = seen & (n[None, :] > at[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        peak = tl.maximum(top, tl.max(scores, 1) * factor)
        weights = tl.exp2(scores * factor - peak[:, None])
        fade = tl.exp2(top - peak)
        total = total * fade + tl.sum(weights, 1)
        top = peak
        if P > 0.0:
            weights = as_e4m3(weights * P)
        if value_scale is not None:
            weights *= tl.load(value_scale + slot * s_slot, mask=inside, other=0.0)[None, :]
        v_at = value + slot[:, None] * v_slot + e[None, :]
        if MASKED or DV < DVP:
            values = tl.load(v_at, mask=inside[:, None] & (e < DV)[None, :], other=0.0)
        else:
            values = tl.load(v_at)
        acc = tl.dot(weights.to(query.dtype), values.to(query.dtype), acc * fade[:, None], input_precision=PRECISION)
    return acc, total, top


def padded(size: int) -> int:
    """A size that tiles can have."""
    return max(16, triton.next_power_of_2(size))


def sizes(cache: Cache) -> dict[str, int]:
    size, value_size = cache.key.shape[2], cache.value.shape[2]
    return {"D": size, "DV": value_size, "DP": padded(size), "DVP": padded(value_size)}


def precision(dtype: torch.dtype) -> str:
    """float32 is for those who want all of it."""
    return "ieee" if dtype == torch.float32 else "tf32"


@once
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; the interpreter is as wide as a small one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@once
def shared_bytes(device: torch.device) -> int:
    """Of shared memory that one program can have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 1 << 20
