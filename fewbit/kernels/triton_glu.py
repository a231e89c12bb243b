"""act(gate) * (up + plus) in one launch. gate and up may be halves of one output; what is made has no gaps.

Both factors are rounded to the type of gate before they are multiplied, as models do that write the two apart.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbit.kernels.input_rounding import Wanted, offer
from fewbit.kernels.triton_early import begin, early
from fewbit.kernels.triton_quantize import flags, put_codes, room
from fewbit.kernels.triton_runtime import cdiv, power

ACTS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "sigmoid")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LONGEST = 1 << 15  # of a row that is rounded as it is made: what the registers of 16 warps hold
STEPS = (1, 2)  # along gate and up: halves side by side, or interleaved
FULL = 1 << 18  # values from which on every processor has work in large tiles


@triton.jit
def _act(x, alpha, ACT: tl.constexpr):
    if ACT == "silu":
        y = x * tl.sigmoid(x)
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":  # 0.5 * (1 + tanh(u)) = sigmoid(2 u)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "quick_gelu":
        y = x * tl.sigmoid(alpha * x)
    elif ACT == "sigmoid":
        y = tl.sigmoid(x)
    elif ACT == "relu":
        y = tl.maximum(x, 0.0)
    else:
        tl.static_assert(ACT == "relu2")
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    return y


@triton.jit(do_not_specialize=["blocks"])
def _act_mul(
    gate_at, up_at, y_at, n, blocks, gate_row, gate_step, up_row, up_step, alpha, limit, plus,
    ACT: tl.constexpr, BLOCK: tl.constexpr, codes, scales, ROUND: tl.constexpr, REACH: tl.constexpr,
    EMPTY: tl.constexpr, POWERS: tl.constexpr, INT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    at = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    dtype = y_at.dtype.element_ty
    gate = tl.load(gate_at + row * gate_row + at * gate_step, at < n).to(tl.float32)
    up = tl.load(up_at + row * up_row + at * up_step, at < n).to(tl.float32)
    gate = tl.where(gate > limit, limit, gate)  # NaN stays
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    a = _act(gate, alpha, ACT).to(dtype).to(tl.float32)
    y = (a * (up + plus).to(dtype).to(tl.float32)).to(dtype)
    tl.store(y_at + row * n + at, y, at < n)
    if ROUND:  # a program has a whole row
        values = tl.where(at < n, y.to(tl.float32), 0.0)[None, :]
        there = row + tl.arange(0, 1)
        put_codes(values, there, at, (at < n)[None, :], there >= 0, codes, scales, n, REACH, EMPTY, POWERS, INT)


def takes(gate: Tensor, up: Tensor) -> bool:
    """Whether the kernel runs on them."""
    alike = gate.shape == up.shape and gate.dtype == up.dtype and gate.dtype in FLOATS
    return alike and gate.dim() > 0 and gate.stride(-1) in STEPS and up.stride(-1) in STEPS


def act_mul(
    gate: Tensor, up: Tensor, act: str, alpha: float, limit: float, plus: float, wanted: Wanted | None = None
) -> Tensor:
    """gate, up: [..., N] -> [..., N]; as modules.glu.multiplied. wanted: of who reads it."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel() == 0:
        return y
    n = gate.shape[-1]
    gate, up = gate.reshape(-1, n), up.reshape(-1, n)
    how = wanted.how if wanted and n <= LONGEST else None
    codes = None if how is None else room(y, how)
    block = power(n) if how else 1024 if y.numel() >= FULL else 256
    blocks, warps = cdiv(n, block), max(1, min(16, block // (512 if how else 256)))
    _act_mul[(gate.shape[0] * blocks,)](
        gate, up, y, n, blocks, *gate.stride(), *up.stride(), alpha, limit, plus, act, block, *(codes or (y, y)),
        num_warps=warps, **flags(how), **early(gate.device),
    )  # fmt: skip
    return y if wanted is None else offer(y, wanted, codes)
