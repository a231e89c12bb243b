"""Exchanges over ranks that are near one another, within kernels: a program sends what it has and awaits the others'.

A number is its own flag: all bits set, which is a NaN, say that none has come, so nothing travels beside what is sent;
whoever has read one puts that back. The two halves of a place are used by turns, which every program counts for itself:
by the time a rank sends to a half again it has what the other sent after it had read that. Ranks run the same programs,
begun in their order, so that of all that wait the first waits for one that has begun. Whoever waits looks now and then
at a word of the host's, by which it is told to give up.

Programs of one launch that share a row exchange numbers in the same way, by mail: neighbours, so that those of the
first row that has not ended have all begun; and those of the next launch go on when all have ended.

near, in kernels: addresses of all ranks' rooms, of the own one, turns, the host's word, the rank (Near.given).
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbit.kernels.near import PLACES, ROWS, WIDTH, Near
from fewbit.kernels.triton_early import begin, early
from fewbit.kernels.triton_runtime import cdiv, power

SPREAD = 128  # programs that a sum is dealt out to, or what is joined, where there is so much of it
# Tries between two looks at the host's word, about a tenth of a second. Looks are slow where many programs take them at
# once: after 1024 tries, two ranks seem to have held up one another by them at every exchange of a step.
LOOK = tl.constexpr(1 << 17)
PLACES_, WIDTH_, ROWS_ = tl.constexpr(PLACES), tl.constexpr(WIDTH), tl.constexpr(ROWS)
PIECES, FEW = 8, 2  # programs that share a row, and rows, for which there is mail
FEW_, MAIL = tl.constexpr(FEW), tl.constexpr(PIECES * FEW * PIECES)


def near_by(near: Near | None) -> dict[str, Any]:
    """What a kernel is given that may exchange numbers."""
    return {"near": None, "RANKS": 0} if near is None else {"near": near.given, "RANKS": len(near.rooms)}


@triton.jit
def summed(x, at, inside, near, RANKS: tl.constexpr):
    """x: what this program has of a sum, `at` where within it, up to WIDTH bytes -> all ranks' sum, wide."""
    whole: tl.constexpr = _wide(x.dtype)
    parts = _of_ranks(x, at, inside, near, RANKS)
    total = tl.zeros(x.shape, whole)
    for r in tl.static_range(RANKS):
        total += parts[r].to(whole)
    return total


@triton.jit
def _of_ranks(x, at, inside, near, RANKS: tl.constexpr):
    """-> all ranks' x, by a place of the program's own."""
    pid = tl.program_id(0)
    turn = tl.load(near[2] + pid)
    start = ((turn & 1) * RANKS * PLACES_ + pid).to(tl.int64) * WIDTH_
    parts = _exchanged(x, start, at, inside, near, PLACES_ * WIDTH_, RANKS, 16)
    tl.store(near[2] + pid, turn + 1)
    return parts


@triton.jit
def largest(x, near, RANKS: tl.constexpr):
    """x: [1] float32 of this program -> the largest over all ranks."""
    pid = tl.program_id(0)
    at = tl.arange(0, 1)
    turn = tl.load(near[2] + PLACES_ + pid)
    start = 2 * RANKS * PLACES_ * WIDTH_ + ((turn & 1) * RANKS * ROWS_ + pid).to(tl.int64) * 4
    parts = _exchanged(x, start, at, at < 1, near, ROWS_ * 4, RANKS, 4)
    tl.store(near[2] + PLACES_ + pid, turn + 1)
    return _top(parts, RANKS)


@triton.jit
def largest_of_row(x, mail, row, piece, SHARE: tl.constexpr):
    """x: [1] float32 of this program -> the largest over all SHARE programs of a row."""
    at = tl.arange(0, 1)
    own = mail.to(tl.int64)
    boxes = ()
    for r in tl.static_range(SHARE):
        boxes = boxes + (own + r * (FEW_ * SHARE * 4),)  # noqa: RUF005
    each = boxes, own + piece * (FEW_ * SHARE * 4), None, mail + MAIL, piece
    return _top(_exchanged(x, row * (SHARE * 4), at, at < 1, each, 4, SHARE, 4), SHARE)


@triton.jit
def _top(parts, COUNT: tl.constexpr):
    top = parts[0]
    for r in tl.static_range(1, COUNT):
        top = tl.maximum(top, parts[r])
    return top


@triton.jit
def _exchanged(x, start, at, inside, near, EACH: tl.constexpr, RANKS: tl.constexpr, ALIGNED: tl.constexpr):
    """-> all ranks' x. start: where in a room the first rank's lies, EACH before the next one's."""
    kind: tl.constexpr = _bits(x.dtype)
    own = x.to(kind, bitcast=True)
    sent = tl.where(own == -1, own - 1, own)
    for r in tl.static_range(RANKS):
        there = tl.multiple_of((near[0][r] + start + near[4] * EACH).to(tl.pointer_type(kind)), ALIGNED) + at
        tl.store(there, sent, inside & (near[4] != r))
    start += near[1]
    bits = _polled(start, at, inside, near, EACH, RANKS, ALIGNED, kind)
    missing = _missing(bits, RANKS)
    tries = 0
    while missing != 0:
        bits = _polled(start, at, inside, near, EACH, RANKS, ALIGNED, kind)
        missing = _missing(bits, RANKS)
        tries += 1
        if tries % LOOK == 0:
            missing *= 1 - tl.load(near[3], volatile=True)
    tl.debug_barrier()  # until all threads have read
    found = ()
    for r in tl.static_range(RANKS):
        there = tl.multiple_of((start + r * EACH).to(tl.pointer_type(kind)), ALIGNED) + at
        tl.store(there, tl.full(own.shape, -1, kind), inside & (near[4] != r))
        found = found + (tl.where(near[4] == r, own, bits[r]).to(x.dtype, bitcast=True),)  # noqa: RUF005
    return found


@triton.jit
def _polled(
    start, at, inside, near, EACH: tl.constexpr, RANKS: tl.constexpr, ALIGNED: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """What each rank has sent by now; of this one 0."""
    found = ()
    for r in tl.static_range(RANKS):
        there = tl.multiple_of((start + r * EACH).to(tl.pointer_type(KIND)), ALIGNED) + at
        found = found + (tl.load(there, inside & (near[4] != r), 0, volatile=True),)  # noqa: RUF005
    return found


@triton.jit
def _missing(bits, RANKS: tl.constexpr):
    """Whether a number has not come."""
    missing = bits[0] == -1
    for r in tl.static_range(1, RANKS):
        missing = missing | (bits[r] == -1)
    return tl.max(missing.to(tl.int32))


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


def mail(device: torch.device) -> Tensor:
    """Where nothing has come, and a word that never says to give up."""
    made = torch.full((MAIL.value + 1,), -1, dtype=torch.int32, device=device)
    made[-1] = 0
    return made


def over_ranks(x: Tensor, near: Near) -> Tensor:
    """x: what `near` takes."""
    y, count = torch.empty_like(x), x.numel()
    block = min(max(power(cdiv(count, SPREAD)), 256), WIDTH // x.element_size())
    _sum[(cdiv(count, block),)](x, y, count, BLOCK=block, num_warps=min(16, max(1, block // 256)), **near_by(near),
                                **early(x.device))  # fmt: skip
    return y


@triton.jit
def _gather(x_at, y_at, own, most, width, sizes, near, RANKS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """A program has a block of one row of each rank's part."""
    begin(EARLY)
    pid = tl.program_id(0)
    blocks = tl.cdiv(most, BLOCK)
    row = (pid // blocks).to(tl.int64)
    at = tl.arange(0, BLOCK)
    place = pid % blocks * BLOCK + at
    mine = tl.load(x_at + row * own + place, place < own, 0)
    parts = _of_ranks(mine, at, place < most, near, RANKS)
    y_at += row * width
    for r in tl.static_range(RANKS):
        tl.store(y_at + place, parts[r], place < sizes[r])
        y_at += sizes[r]


def side_by_side(x: Tensor, sizes: Sequence[int], near: Near) -> Tensor:
    """x: [..., size of this rank's], which `near` takes -> [..., all of them]."""
    rows, most, width = x.numel() // x.shape[-1], max(sizes), sum(sizes)
    y = x.new_empty(*x.shape[:-1], width)
    block = min(max(power(cdiv(rows * most, SPREAD)), 256), WIDTH // x.element_size())
    _gather[(rows * cdiv(most, block),)](x, y, x.shape[-1], most, width, tuple(sizes), BLOCK=block,
                                         num_warps=min(16, max(1, block // 256)), **near_by(near),
                                         **early(x.device))  # fmt: skip
    return y
