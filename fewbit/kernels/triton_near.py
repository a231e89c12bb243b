"""Exchanges over ranks that are near one another, within kernels: a program sends what it has and awaits the others'.

A number is its own flag: all bits set, which is a NaN, say that none has come, so nothing travels beside what is sent;
whoever has read one puts that back. The two halves of a place are used by turns, which every program counts for itself:
by the time a rank sends to a half again it has what the other sent after it had read that. Ranks run the same programs,
begun in their order, so that of all that wait the first waits for one that has begun. Whoever waits looks now and then
at a word of the host's, by which it is told to give up.

near, in kernels: addresses of all ranks' rooms, of the own one, turns, the host's word, the rank (Near.given).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbit.kernels.near import PLACES, ROWS, WIDTH, Near
from fewbit.kernels.triton_early import begin, early
from fewbit.kernels.triton_runtime import cdiv, power

SPREAD = 128  # programs that a sum is dealt out to, where there is so much of it
LOOK = tl.constexpr(1024)  # tries between two looks at the host's word
PLACES_, WIDTH_, ROWS_ = tl.constexpr(PLACES), tl.constexpr(WIDTH), tl.constexpr(ROWS)


def near_by(near: Near | None) -> dict[str, Any]:
    """What a kernel is given that may exchange numbers."""
    return {"near": None, "RANKS": 0} if near is None else {"near": near.given, "RANKS": len(near.rooms)}


@triton.jit
def summed(x, at, inside, near, RANKS: tl.constexpr):
    """x: what this program has of a sum, `at` where within it, up to WIDTH bytes -> all ranks' sum, wide."""
    pid = tl.program_id(0)
    whole: tl.constexpr = _wide(x.dtype)
    turn = tl.load(near[2] + pid)
    start = ((turn & 1) * RANKS * PLACES_ + pid).to(tl.int64) * WIDTH_
    _send(x, start + near[4] * (PLACES_ * WIDTH_), at, inside, near, RANKS, 16)
    total = tl.zeros(x.shape, whole)
    for r in tl.static_range(RANKS):
        part = x
        if r != near[4]:
            part = _await(start + r * (PLACES_ * WIDTH_), at, inside, near, x.dtype, 16)
        total += part.to(whole)
    tl.store(near[2] + pid, turn + 1)
    return total


@triton.jit
def largest(x, near, RANKS: tl.constexpr):
    """x: [1] float32 of this program -> the largest over all ranks."""
    pid = tl.program_id(0)
    at = tl.arange(0, 1)
    inside = at < 1
    turn = tl.load(near[2] + PLACES_ + pid)
    start = 2 * RANKS * PLACES_ * WIDTH_ + ((turn & 1) * RANKS * ROWS_ + pid).to(tl.int64) * 4
    _send(x, start + near[4] * (ROWS_ * 4), at, inside, near, RANKS, 4)
    top = x
    for r in tl.static_range(RANKS):
        if r != near[4]:
            top = tl.maximum(top, _await(start + r * (ROWS_ * 4), at, inside, near, x.dtype, 4))
    tl.store(near[2] + PLACES_ + pid, turn + 1)
    return top


@triton.jit
def _send(x, start, at, inside, near, RANKS: tl.constexpr, ALIGNED: tl.constexpr):
    """To the same place in every other rank's room."""
    kind: tl.constexpr = _bits(x.dtype)
    bits = x.to(kind, bitcast=True)
    bits = tl.where(bits == -1, bits - 1, bits)
    for r in tl.static_range(RANKS):
        if r != near[4]:
            tl.store(tl.multiple_of((near[0][r] + start).to(tl.pointer_type(kind)), ALIGNED) + at, bits, inside)


@triton.jit
def _await(start, at, inside, near, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """What a rank has sent there."""
    kind: tl.constexpr = _bits(DTYPE)
    there = tl.multiple_of((near[1] + start).to(tl.pointer_type(kind)), ALIGNED) + at
    bits = tl.load(there, inside, 0, volatile=True)
    missing = tl.max((bits == -1).to(tl.int32))
    tries = 0
    while missing != 0:
        bits = tl.load(there, inside, 0, volatile=True)
        missing = tl.max((bits == -1).to(tl.int32))
        tries += 1
        if tries % LOOK == 0:
            missing *= 1 - tl.load(near[3], volatile=True)
    tl.debug_barrier()  # until all threads have read
    tl.store(there, tl.full(bits.shape, -1, kind), inside)
    return bits.to(DTYPE, bitcast=True)


@triton.constexpr_function
def _bits(dtype: Any) -> Any:
    return tl.dtype(f"int{dtype.primitive_bitwidth}")


@triton.constexpr_function
def _wide(dtype: Any) -> Any:
    return tl.int64 if dtype.is_int() else tl.float32


@triton.jit
def _sum(x_at, y_at, count, near, RANKS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    begin(EARLY)
    at = tl.arange(0, BLOCK)
    there = tl.program_id(0) * BLOCK + at
    x = tl.load(x_at + there, there < count, 0)
    total = summed(x, at, there < count, near, RANKS)
    tl.store(y_at + there, total.to(x.dtype), there < count)


def over_ranks(x: Tensor, near: Near) -> Tensor:
    """x: what `near` takes."""
    y, count = torch.empty_like(x), x.numel()
    block = min(max(power(cdiv(count, SPREAD)), 256), WIDTH // x.element_size())
    _sum[(cdiv(count, block),)](x, y, count, BLOCK=block, num_warps=min(16, max(1, block // 256)), **near_by(near),
                                **early(x.device))  # fmt: skip
    return y
