"""The largest of each row, and where it is: parts of a row side by side, and a second launch that joins them.

NaN is over all, and of equals the first counts, wherever a row stands: torch says neither which, nor that it is always
the same one, and takes as long for one row as for 64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbit.kernels.triton_choose import ordered
from fewbit.kernels.triton_early import begin, early
from fewbit.kernels.triton_runtime import cdiv, power

PART = 2048  # values of a program
LAST = tl.constexpr((1 << 31) - 1)
NEVER = tl.constexpr(-(1 << 63))


@triton.jit
def _parts(x, found, n, step, parts, PART: tl.constexpr, EARLY: tl.constexpr):
    """Leaves the largest of each part as a whole number: its value above, and below how far it is from LAST."""
    begin(EARLY)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * PART + tl.arange(0, PART)
    keys = ordered(tl.load(x + row * step + at, at < n, -float("inf")).to(tl.float32))
    most = tl.max(keys, 0)
    first = tl.min(tl.where(keys == most, at, LAST), 0)
    tl.store(found + row * parts + part, (most.to(tl.int64) << 32) | (LAST - first))


@triton.jit(do_not_specialize=["rows"])
def _join(x, found, best, rows, step, parts, ROOM: tl.constexpr, EARLY: tl.constexpr):
    begin(EARLY)
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, ROOM)
    most = tl.max(tl.load(found + row * parts + at, at < parts, NEVER), 0)
    token = LAST - (most & LAST)
    tl.store(best + row, token)
    value = tl.load(x + row * step + token).to(tl.float32).to(tl.float64)
    tl.store(best + rows + row, value.to(tl.int64, bitcast=True))


def argmax(x: Tensor) -> Tensor:
    """x: [B, V] float, rows without gaps -> [2, B] int64: where, and the bits of the values there in float64."""
    rows, n = x.shape
    parts = cdiv(n, PART)
    best = torch.empty(2, rows, dtype=torch.int64, device=x.device)
    if rows:
        found = torch.empty(rows, parts, dtype=torch.int64, device=x.device)
        _parts[(rows, parts)](x, found, n, x.stride(0), parts, PART, num_warps=4, **early(x.device))
        _join[(rows,)](x, found, best, rows, x.stride(0), parts, power(parts), num_warps=1, **early(x.device))
    return best
