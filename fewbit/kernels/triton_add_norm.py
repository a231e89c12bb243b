"""A residual added and the norm of the sum in one launch; what is added may be a norm's own, and a sum over ranks.

Rows lie and are added up as in triton_norm, so that the bits are those of an addition and that kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbit.kernels.fused import NormParts
from fewbit.kernels.input_rounding import Wanted, offer
from fewbit.kernels.near import Near
from fewbit.kernels.triton_early import await_last, early, let_next
from fewbit.kernels.triton_near import near_by, summed
from fewbit.kernels.triton_norm import held, of_rows, takes, tile
from fewbit.kernels.triton_quantize import flags, put_codes, room
from fewbit.kernels.triton_runtime import cdiv

Scales = tuple[Tensor | None, Tensor | None]
NO_SCALES: Scales = (None, None)
NONE: NormParts = (None, None, 1.0, "wide", False)


@triton.jit(do_not_specialize=["rows"])
def _add_norm(
    x_at, r_at, s_at, y_at, w0_at, b0_at, w1_at, b1_at, rows, eps0, eps1, D: tl.constexpr,
    BEFORE: tl.constexpr, OFFSET0: tl.constexpr, LATE0: tl.constexpr, CENTRED0: tl.constexpr, WEIGHT0: tl.constexpr,
    BIAS0: tl.constexpr, AFTER: tl.constexpr, OFFSET1: tl.constexpr, LATE1: tl.constexpr, CENTRED1: tl.constexpr,
    WEIGHT1: tl.constexpr, BIAS1: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, codes, scales,
    ROUND: tl.constexpr, REACH: tl.constexpr, EMPTY: tl.constexpr, POWERS: tl.constexpr, INT: tl.constexpr,
    x_rows, x_columns, near, RANKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next(EARLY)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (at < D)[None, :]
    there = row[:, None] * D + at[None, :]
    out: tl.constexpr = s_at.dtype.element_ty
    w0, b0 = held(w0_at, at, D, BEFORE and WEIGHT0), held(b0_at, at, D, BEFORE and BIAS0)
    w1, b1 = held(w1_at, at, D, AFTER and WEIGHT1), held(b1_at, at, D, AFTER and BIAS1)
    await_last(EARLY)
    x = tl.load(x_at + there, inside, 0.0)
    wide = x
    if RANKS:
        wide = summed(x, at[None, :], inside, near, RANKS)
    x = scaled(wide, row, at, row < rows, at < D, x_rows, x_columns).to(x.dtype)
    residual = tl.load(r_at + there, inside, 0.0).to(tl.float32)
    if BEFORE:
        h = of_rows(x, inside, w0, b0, eps0, D, OFFSET0, LATE0, CENTRED0, WEIGHT0, BIAS0, out)
        x = tl.where(inside, h, 0.0).to(out)  # beyond a row a bias is added to zeros
    total = (residual + x.to(tl.float32)).to(out)
    tl.store(s_at + there, total, inside)
    if AFTER:
        h = of_rows(total, inside, w1, b1, eps1, D, OFFSET1, LATE1, CENTRED1, WEIGHT1, BIAS1, out)
        y = h.to(out)
        tl.store(y_at + there, y, inside)
        if ROUND:
            put_codes(y, row, at, inside, row < rows, codes, scales, D, REACH, EMPTY, POWERS, INT)


@triton.jit
def scaled(x, row, at, there, inside, rows, columns):
    """[ROWS, BLOCK], times scales where there are any: rounded to x's type once, as by a launch of their own."""
    if (rows is not None) | (columns is not None):
        wide = x.to(tl.float32)
        if columns is not None:
            wide *= tl.load(columns + at, inside, 0.0)[None, :]
        if rows is not None:
            wide *= tl.load(rows + row, there, 0.0)[:, None]
        x = wide.to(x.dtype)
    return x


def takes_sum(x: Tensor, residual: Tensor, before: NormParts | None, after: NormParts | None) -> bool:
    """Whether the kernel runs on it: all of one type and without gaps."""
    if before is not None and x.dtype == torch.float32:
        return False  # the first norm's last product and the addition would be rounded once
    held = (residual, *(t for parts in (before, after) if parts for t in parts[:2] if t is not None))
    there = x.shape == residual.shape and x.is_contiguous() and residual.is_contiguous()
    return there and takes(x) and all(t.dtype == x.dtype and t.stride(-1) == 1 for t in held)


def add_norm(
    x: Tensor, residual: Tensor, before: NormParts | None, after: NormParts | None, wanted: Wanted | None = None,
    scales: Scales = NO_SCALES, near: Near | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """x, residual: [..., D] -> their sum, and its norm; as modules.residual.add_norm. wanted: of who reads the norm.

    scales: what x is to be times, float32: [M, 1] of its rows, [D] of its columns. near: of ranks that have a part of x
    each, which are added up first.
    """
    total, y = torch.empty_like(x), None if after is None else torch.empty_like(x)
    d, rows = x.shape[-1], x.numel() // x.shape[-1]
    if rows == 0:
        return total, y
    several, block, warps = tile(d, rows)
    first, second = before or NONE, after or NONE
    how = wanted.alone if wanted and y is not None else None
    codes = None if how is None else room(x, how)
    _add_norm[(cdiv(rows, several),)](
        x, residual, total, total if y is None else y,
        *(x if t is None else t for t in (*first[:2], *second[:2])), rows, first[2], second[2], d,
        before is not None, *_flags(first), after is not None, *_flags(second), several, block,
        *(codes or (total, total)), num_warps=warps, **flags(how), x_rows=scales[0], x_columns=scales[1],
        **near_by(near), **early(x.device),
    )  # fmt: skip
    return total, y if y is None or wanted is None else offer(y, wanted, codes)


def _flags(parts: NormParts) -> tuple[float, bool, bool, bool, bool]:
    weight, bias, _, times, centred = parts
    return float(times == "plus"), times == "late", centred, weight is not None, bias is not None
