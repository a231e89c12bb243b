"""RMSNorm and LayerNorm in one launch: a program holds whole rows in registers, one long row or several short ones.

x may be a strided view of up to four axes, as the heads of a merged projection are; y has x's order of axes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbit.kernels.input_rounding import Wanted, offer
from fewbit.kernels.rows import leading, widest
from fewbit.kernels.triton_early import await_last, early, let_next
from fewbit.kernels.triton_quantize import flags, put_codes, room
from fewbit.kernels.triton_runtime import cdiv, power

LONGEST = 1 << 15  # of a row: what the registers of 16 warps hold
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHORT, MANY = 512, 2048  # rows up to this long are taken several at a time, where there are so many


@triton.jit
def held(start, at, D: tl.constexpr, THERE: tl.constexpr):
    """A weight or a bias in float32, if there is one: read before others are waited for."""
    found = at.to(tl.float32)
    if THERE:
        found = tl.load(start + at, at < D, 0.0).to(tl.float32)
    return found


@triton.jit
def of_rows(
    raw, inside, w, b, eps, D: tl.constexpr, OFFSET: tl.constexpr, LATE: tl.constexpr, CENTRED: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """raw: whole rows in registers; w, b: `held` -> their norm in float32, to be stored as OUT."""
    h = raw.to(tl.float32)
    if CENTRED:
        h = tl.where(inside, h - (tl.sum(h, 1) / D)[:, None], 0.0)
    h = h * tl.rsqrt(tl.sum(h * h, 1) / D + eps)[:, None]
    if LATE:
        h = h.to(raw.dtype).to(tl.float32)
    if WEIGHT:
        h = h * (w + OFFSET)[None, :]
    if BIAS:
        if LATE and WEIGHT:
            h = h.to(OUT).to(tl.float32)
        h = h + b[None, :]
    return h


@triton.jit(do_not_specialize=["rows", "n1", "n2"])
def _norm(
    x_at, w_at, b_at, y_at, rows, n1, n2, xs0, xs1, xs2, ys0, ys1, ys2, eps, D: tl.constexpr,
    OFFSET: tl.constexpr, LATE: tl.constexpr, CENTRED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, codes, scales, ROUND: tl.constexpr, REACH: tl.constexpr,
    EMPTY: tl.constexpr, POWERS: tl.constexpr, INT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next(EARLY)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (at < D)[None, :]
    w, b = held(w_at, at, D, WEIGHT), held(b_at, at, D, BIAS)
    await_last(EARLY)
    i2, i1, i0 = row % n2, row // n2 % n1, row // n2 // n1
    x_rows = i0 * xs0 + i1 * xs1 + i2 * xs2
    y_rows = i0 * ys0 + i1 * ys1 + i2 * ys2
    raw = tl.load(x_at + x_rows[:, None] + at[None, :], inside, 0.0)
    h = of_rows(raw, inside, w, b, eps, D, OFFSET, LATE, CENTRED, WEIGHT, BIAS, y_at.dtype.element_ty)
    y = h.to(y_at.dtype.element_ty)
    tl.store(y_at + y_rows[:, None] + at[None, :], y, inside)
    if ROUND:
        put_codes(y, row, at, inside, row < rows, codes, scales, D, REACH, EMPTY, POWERS, INT)


@triton.jit
def _row(
    x_at, w_at, y_at, row, step, eps, D: tl.constexpr, OFFSET: tl.constexpr, LATE: tl.constexpr,
    CENTRED: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next(EARLY)
    at = tl.arange(0, BLOCK)
    inside = (at < D)[None, :]
    w = held(w_at, at, D, True)
    await_last(EARLY)
    raw = tl.load(x_at + row * step + at[None, :], inside, 0.0)
    out: tl.constexpr = y_at.dtype.element_ty
    h = of_rows(raw, inside, w, w, eps, D, OFFSET, LATE, CENTRED, True, False, out)
    tl.store(y_at + row * D + at[None, :], h.to(out), inside)


@triton.jit
def _pair(
    x_at, w_at, y_at, other_at, v_at, z_at, step, other_step, eps, other_eps, D: tl.constexpr, E: tl.constexpr,
    OFFSET: tl.constexpr, LATE: tl.constexpr, CENTRED: tl.constexpr, BLOCK: tl.constexpr, OTHER: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Programs of the first axis take a row, those of the second one of the two."""
    row = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        _row(x_at, w_at, y_at, row, step, eps, D, OFFSET, LATE, CENTRED, BLOCK, EARLY)
    else:
        _row(other_at, v_at, z_at, row, other_step, other_eps, E, OFFSET, LATE, CENTRED, OTHER, EARLY)


def tile(d: int, rows: int) -> tuple[int, int, int]:
    """Rows of a program, numbers of a row, warps."""
    block = power(d)
    several = 8 if d <= SHORT and rows >= MANY else 1
    return several, block, min(16, max(1, several * block // 512))


def takes(x: Tensor) -> bool:
    """Whether the kernel runs on it."""
    return x.dtype in FLOATS and 1 <= x.dim() <= 4 and x.stride(-1) == 1 and 0 < x.shape[-1] <= LONGEST


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, times: str, centred: bool = False,
    wanted: Wanted | None = None,
) -> Tensor:  # fmt: skip
    """x: [..., D], weight and bias: [D] -> [..., D]; as modules.norm.norm. wanted: of who reads it."""
    late = times == "late"
    y = torch.empty_like(x, dtype=widest(x, weight, bias) if late else x.dtype)
    d, rows = x.shape[-1], x.numel() // x.shape[-1]
    if rows == 0:
        return y
    (_, n1, n2), xs, ys = leading(x, y)
    several, block, warps = tile(d, rows)
    how = wanted.alone if wanted and y.is_contiguous() else None
    codes = None if how is None else room(y, how)
    _norm[(cdiv(rows, several),)](
        x, weight if weight is not None else x, bias if bias is not None else x, y, rows, n1, n2, *xs, *ys, eps, d,
        float(times == "plus"), late, centred, weight is not None, bias is not None, several, block,
        *(codes or (y, y)), num_warps=warps, **flags(how), **early(x.device),
    )  # fmt: skip
    return y if wanted is None else offer(y, wanted, codes)


def takes_pair(x: Tensor, other: Tensor) -> bool:
    """Whether the kernel runs on both: as many rows, each at the same distance from the last."""
    return takes(x) and takes(other) and x.shape[:-1] == other.shape[:-1] and _even(x) and _even(other)


def pair(
    x: Tensor, weight: Tensor, eps: float, other: Tensor, of_other: Tensor, other_eps: float, times: str, centred: bool
) -> tuple[Tensor, Tensor]:
    """`norm` of x and of another [..., E] in one launch, with weights and without a bias."""
    late = times == "late"
    y, z = (torch.empty(t.shape, dtype=widest(t, w) if late else t.dtype, device=t.device)
            for t, w in ((x, weight), (other, of_other)))  # fmt: skip
    rows, d, e = x.numel() // x.shape[-1], x.shape[-1], other.shape[-1]
    if rows:
        blocks = power(d), power(e)
        _pair[(rows, 2)](
            x, weight, y, other, of_other, z, x.stride(-2), other.stride(-2), eps, other_eps, d, e,
            float(times == "plus"), late, centred, *blocks, num_warps=min(16, max(1, max(blocks) // 512)),
            **early(x.device),
        )  # fmt: skip
    return y, z


def _even(x: Tensor) -> bool:
    return x.dim() == 2 or (x.dim() == 3 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)))
