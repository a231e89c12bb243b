"""Kernels in Triton over tiles of a weight: y = x W^T with W decoded in registers, and W decoded into memory.

A program of `times` makes one tile of y over its share of K. With experts, x is sorted by expert and only the device
knows how many rows each has: every program finds its rows by itself, and those beyond the last tile leave at once.
"""

import triton
import triton.language as tl

from fewbit.kernels.triton_decode import tile


@triton.jit
def owner(counts, E, at, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """-> expert, first row and end of its rows for tile `at`; the expert is E where there is no such tile."""
    e = tl.arange(0, EXPERTS)
    count = tl.load(counts + e, mask=e < E, other=0).to(tl.int32)
    tiles = (count + ROWS - 1) // ROWS
    before = tl.cumsum(tiles, 0) - tiles
    expert = tl.sum((before + tiles <= at).to(tl.int32), 0)
    start = tl.sum(tl.where(e < expert, count, 0), 0)
    own = e == expert
    first = start + (at - tl.sum(tl.where(own, before, 0), 0)) * ROWS
    return tl.minimum(expert, E), first, start + tl.sum(tl.where(own, count, 0), 0)


@triton.jit
def dense_tile(codes, n, k0, K, expert, COLS: tl.constexpr):
    """A tile of a stack of plain matrices; codes: pointer, and strides along experts, rows and columns."""
    k = k0 + tl.arange(0, COLS)[None, :]
    at = codes[0] + (expert * codes[1] + n.to(tl.int64)[:, None] * codes[2] + k.to(tl.int64) * codes[3])
    return tl.load(at, mask=k < K, other=0)


@triton.jit
def times(x, token, y, bias, counts, codes, scales, zeros, M, N, K, E,
          INDEXED: tl.constexpr, HAS_BIAS: tl.constexpr, EXPERTS: tl.constexpr, FORM: tl.constexpr,
          EVEN: tl.constexpr, EXACT: tl.constexpr, STEPS: tl.constexpr,
          BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """x: [M, K] -> y: [shares of K, M, N], STEPS * BK columns to each share. EXPERTS: 0, or a power of 2 >= E.

    INDEXED: x is [T, K], and token [M] says which of its rows each row is.
    FORM: coded.Coded.form, or None where the weight is a stack of plain matrices.
    """
    share = tl.program_id(2)
    first, stop, expert = tl.program_id(1) * BM, M, tl.cast(0, tl.int64)
    if EXPERTS:
        found, first, stop = owner(counts, E, tl.program_id(1), BM, EXPERTS)
        if found >= E:
            return
        expert = found.to(tl.int64)
    m = first + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    held = tl.minimum(n, N - 1)  # rows beyond the last repeat it, and are not stored
    row = m.to(tl.int64)
    if INDEXED:
        row = tl.load(token + m, mask=m < stop, other=0)
    rows = x + row[:, None] * K
    total = tl.zeros((BN, BM), tl.float32)  # y^T: its matrix units read W as decoded, column after column of a row
    for step in range(STEPS):
        k0 = (share * STEPS + step) * BK
        k = k0 + tl.arange(0, BK)
        if EVEN:
            a = tl.load(rows + k[None, :], mask=(m < stop)[:, None], other=0)
        else:
            a = tl.load(rows + k[None, :], mask=(m < stop)[:, None] & (k < K)[None, :], other=0)
        if FORM is None:
            w = dense_tile(codes, held, k0, K, expert, BK).to(a.dtype)
        else:
            w = tile(codes, scales, zeros, held, k0, K, expert, FORM, EVEN, a.dtype, BN, BK)
        if EXACT:
            total = tl.dot(w, tl.trans(a), total, input_precision="ieee")
        else:
            total = tl.dot(w, tl.trans(a), total)
    inside = (n < N)[:, None] & (m < stop)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[:, None]
    at = y + (share.to(tl.int64) * M + m)[None, :] * N + n[:, None]
    tl.store(at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gathered(parts, y, bias, size, N, SHARES: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """parts: [SHARES, size] float32 -> y: [size], summed in order; bias: [N]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for share in tl.static_range(SHARES):
        total += tl.load(parts + share * size + at, mask=at < size, other=0)
    if HAS_BIAS:
        total += tl.load(bias + at % N, mask=at < size, other=0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < size)


@triton.jit
def values(y, index, codes, scales, zeros, start, N, K, size,
           INDEXED: tl.constexpr, FORM: tl.constexpr, EVEN: tl.constexpr,
           BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """y: [size, K], the rows of W from `start` on, or those of index [size]: NaN where W has no such row."""
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    k0 = tl.program_id(1) * BK
    k = k0 + tl.arange(0, BK)
    if INDEXED:
        n = tl.load(index + i, mask=i < size, other=0)
    else:
        n = start + i
    held = tl.maximum(tl.minimum(n, N - 1), 0).to(tl.int32)
    w = tile(codes, scales, zeros, held, k0, K, tl.cast(0, tl.int64), FORM, EVEN, y.dtype.element_ty, BN, BK)
    at = y + i.to(tl.int64)[:, None] * K + k[None, :]
    w = tl.where((n == held)[:, None], w, float("nan"))
    tl.store(at, w, mask=(i < size)[:, None] & (k < K)[None, :])
