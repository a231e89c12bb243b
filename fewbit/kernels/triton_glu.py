"""act(gate) * (up + plus) in one launch. gate and up may be halves of one output; what is made has no gaps.

Both factors are rounded to the type of gate before they are multiplied, as models do that write the two apart.
"""

from math import inf
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbit.kernels.input_rounding import Wanted, nothing, offer
from fewbit.kernels.triton_early import begin, early
from fewbit.kernels.triton_near import FEW, PIECES, largest, largest_of_row, mail, near_by
from fewbit.kernels.triton_quantize import MANY, agreed, codes_by, codes_of, room, scale_of
from fewbit.kernels.triton_runtime import cdiv, power

ACTS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "sigmoid")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PIECE = 2048  # values of a program that shares a row with others; for 8 rows that is slower than a program for each
LONGEST = 1 << 15  # of a row that is rounded as it is made: what the registers of 16 warps hold
STEPS = (1, 2)  # along gate and up: halves side by side, or interleaved
FULL = 1 << 18  # values from which on every processor has work in large tiles


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)): where that overflows a root needs no care, and a quotient does."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def _act(x, alpha, ACT: tl.constexpr):
    if ACT == "silu":
        y = x * _sigmoid(x)
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":  # 0.5 * (1 + tanh(u)) = sigmoid(2 u)
        y = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "quick_gelu":
        y = x * _sigmoid(alpha * x)
    elif ACT == "sigmoid":
        y = _sigmoid(x)
    elif ACT == "relu":
        y = tl.maximum(x, 0.0)
    else:
        tl.static_assert(ACT == "relu2")
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    return y


@triton.jit
def _half(
    x_at, at, inside, columns, step, row_scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OUT: tl.constexpr
):  # fmt: skip
    """gate or up: as stored, or times the scales of its row and columns and rounded, as triton_scale does."""
    x = tl.load(x_at + at * step, inside, 0.0)
    if COLUMNS:
        x = x.to(tl.float32) * tl.load(columns + at * step, inside, 0.0)
    if ROWS:
        x = x.to(tl.float32) * row_scale
    return x.to(OUT)


@triton.jit
def _product(
    gate, up, alpha, limit, plus, ACT: tl.constexpr, LIMITED: tl.constexpr, PLUS: tl.constexpr, OUT: tl.constexpr
):  # fmt: skip
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    if LIMITED:  # NaN stays
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    if PLUS:
        up = (up + plus).to(OUT).to(tl.float32)
    return (_act(gate, alpha, ACT).to(OUT).to(tl.float32) * up).to(OUT)


@triton.jit(do_not_specialize=["blocks"])
def _act_mul(
    gate_at, up_at, y_at, n, blocks, gate_row, gate_step, up_row, up_step, alpha, limit, plus, rows, gate_columns,
    up_columns, ACT: tl.constexpr, LIMITED: tl.constexpr, PLUS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    at = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    row_scale = 1.0
    if ROWS:
        row_scale = tl.load(rows + row)
    out = y_at.dtype.element_ty
    gate = _half(gate_at + row * gate_row, at, at < n, gate_columns, gate_step, row_scale, ROWS, COLUMNS, out)
    up = _half(up_at + row * up_row, at, at < n, up_columns, up_step, row_scale, ROWS, COLUMNS, out)
    y = _product(gate, up, alpha, limit, plus, ACT, LIMITED, PLUS, out)
    tl.store(y_at + row * n + at, y, at < n)


@triton.jit
def _act_mul_round(
    gate_at, up_at, y_at, codes, scales, gate_row, gate_step, up_row, up_step, alpha, limit, plus, rows, gate_columns,
    up_columns, N: tl.constexpr, ACT: tl.constexpr, LIMITED: tl.constexpr, PLUS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    REACH: tl.constexpr, EMPTY: tl.constexpr, POWERS: tl.constexpr, INT: tl.constexpr, KEEP: tl.constexpr, post,
    SHARE: tl.constexpr, near, RANKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program has one of SHARE pieces of a row, or this rank's part of one. KEEP: also what is rounded is written."""
    begin(EARLY)
    row, piece = (tl.program_id(0) // SHARE).to(tl.int64), tl.program_id(0) % SHARE
    start = piece * (STEPS * BLOCK)
    lane = tl.arange(0, BLOCK)
    out = y_at.dtype.element_ty
    row_scale = 1.0
    if ROWS:
        row_scale = tl.load(rows + row)
    made, top = (), tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(STEPS):
        at = start + i * BLOCK + lane
        gate = _half(gate_at + row * gate_row, at, at < N, gate_columns, gate_step, row_scale, ROWS, COLUMNS, out)
        up = _half(up_at + row * up_row, at, at < N, up_columns, up_step, row_scale, ROWS, COLUMNS, out)
        y = _product(gate, up, alpha, limit, plus, ACT, LIMITED, PLUS, out)
        made = made + (y,)  # noqa: RUF005 - Triton unpacks no tuple
        top = tl.maximum(top, tl.where(at < N, tl.abs(y.to(tl.float32)), 0.0))
    top = tl.max(top, 0, keep_dims=True)
    if SHARE > 1:
        top = largest_of_row(top, post, row, piece, SHARE)
    elif RANKS:
        top = largest(top, near, RANKS)
    scale = scale_of(top, REACH, EMPTY, POWERS)
    tl.store(scales + row + tl.arange(0, 1), scale, piece == 0)
    for i in tl.static_range(STEPS):
        at = start + i * BLOCK + lane
        if KEEP:
            tl.store(y_at + row * N + at, made[i], at < N)
        tl.store(codes + row * N + at, codes_of(made[i].to(tl.float32), scale, False, POWERS, INT), at < N)


def takes(gate: Tensor, up: Tensor) -> bool:
    """Whether the kernel runs on them."""
    alike = gate.shape == up.shape and gate.dtype == up.dtype and gate.dtype in FLOATS
    return alike and gate.dim() > 0 and gate.stride(-1) in STEPS and up.stride(-1) in STEPS


def act_mul(
    gate: Tensor, up: Tensor, act: str, alpha: float, limit: float, plus: float, wanted: Wanted | None = None,
    scales: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
) -> Tensor:  # fmt: skip
    """gate, up: [..., N] -> [..., N]; as modules.glu.multiplied. wanted: of who reads it.

    scales: [M, 1] of rows, [N] of columns of gate and of up, float32, those of columns as far apart as the columns are.
    """
    shape, n, codes = gate.shape, gate.shape[-1], None
    if gate.numel() == 0:
        return torch.empty_like(gate)
    gate, up = gate.reshape(-1, n), up.reshape(-1, n)
    rows = gate.shape[0]
    how, near = agreed(wanted.how, rows) if wanted and wanted.how and n <= LONGEST else (None, None)
    keep = how is None or wanted is None or not wanted.codes_only
    y = gate.new_empty(shape) if keep else nothing(gate.dtype, gate.device).expand(shape)
    by_row, *by_column = scales or (None, None, None)
    of = alpha, limit, plus, by_row, *by_column
    fixed: dict[str, Any] = {"ACT": act, "LIMITED": limit < inf, "PLUS": plus != 0, "ROWS": by_row is not None,
                             "COLUMNS": by_column[0] is not None, **early(gate.device)}  # fmt: skip
    if how is None:
        block, warps = (1024, 4) if y.numel() >= FULL else (256, 1)
        blocks = cdiv(n, block)
        _act_mul[(rows * blocks,)](
            gate, up, y, n, blocks, *gate.stride(), *up.stride(), *of, BLOCK=block, num_warps=warps, **fixed
        )
    else:
        codes = room(y, how)
        assert wanted is not None
        if wanted.mail is None and gate.is_cuda and not torch.cuda.is_current_stream_capturing():
            wanted.mail = mail(gate.device)  # in a graph it would be made anew each time
        share = min(PIECES, cdiv(n, PIECE)) if rows <= FEW and wanted.mail is not None and near is None else 1
        block, steps, warps = _shape(cdiv(n, share), rows)
        _act_mul_round[(rows * share,)](
            gate, up, y, *codes, *gate.stride(), *up.stride(), *of, n, BLOCK=block, STEPS=steps, KEEP=keep,
            post=wanted.mail if share > 1 else None, SHARE=share, num_warps=warps, **codes_by(how), **near_by(near),
            **fixed,
        )  # fmt: skip
    return y if wanted is None else offer(y, wanted, codes)


def _shape(n: int, rows: int) -> tuple[int, int, int]:
    """Of a program with a row, or a piece of one: values of a step, steps, warps."""
    block = min(power(n), 2048 if rows >= MANY and n <= 16384 else 4096)  # up to 64 values of a thread in registers
    return block, cdiv(n, block), max(1, block // 256)
