"""What stands between the linears of a layer, on a CPU: norm, gated activation and rotary embedding, a call each.

The work is in fused.cpp; the oracles are modules.norm, modules.glu and modules.rotary. Each `takes_` says whether it is
for us. A call may not be gone back through, so nothing is taken that asks for gradients.
"""

import ctypes
import struct
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fewbit.kernels.compiled import call, left, library
from fewbit.kernels.rows import leading
from fewbit.kernels.table import Rotary

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ACTS = ("silu", "gelu_tanh", "quick_gelu", "relu", "relu2", "sigmoid")  # in fused.cpp's order
STEPS = (1, 2)  # along gate and up: halves side by side, or interleaved


# fused.cpp's structs, in the types and the alignment of C
FORMS = "4P12q2f3i0q", "3P2qi0q", "3P5q3f2i0q", "2P2P7q2P7q6q4q6i0q"
NORM, SUM, GATE, ROTARY = (struct.Struct(form) for form in FORMS)
ROWS = (1,) * 10  # of a norm whose rows lie without gaps and are known
NormParts = tuple[Tensor | None, Tensor | None, float, str, bool]  # of a norm: weight, bias, eps, times, centred


def _ours(*tensors: Tensor | None, step: int = 1) -> bool:
    """Plain tensors of one type on a CPU that nobody goes back through, whose last axis has this stride."""
    if left():
        return False
    learning, dtype = torch.is_grad_enabled(), None
    for t in tensors:
        if t is None:
            continue
        dtype = dtype or t.dtype
        if t.dtype != dtype or not t.is_cpu or t.stride(-1) != step or (learning and t.requires_grad):
            return False
    return dtype in DTYPES and _native() is not None


def takes_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    return x.numel() > 0 and 1 <= x.dim() <= 4 and _ours(x, weight, bias)


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, times: str, centred: bool) -> Tensor:
    """x: [..., D], weight and bias: [D] -> [..., D]; as modules.norm.norm."""
    y = torch.empty_like(x)
    (_, n1, n2), strides, made = leading(x, y)
    call(_native().fused_norm, _packed(x, y, (n1, n2, *strides, n1, n2, *made), (weight, bias, eps, times, centred)))
    return y


def _packed(x: Tensor, y: Tensor, rows: tuple[int, ...], parts: NormParts) -> bytes:
    weight, bias, eps, times, centred = parts
    d = x.shape[-1]
    return NORM.pack(
        x.data_ptr(), 0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(),
        *rows, x.numel() // d, d, eps, times == "plus", DTYPES[x.dtype], times == "late", centred,
    )  # fmt: skip


def takes_sum(x: Tensor, residual: Tensor, before: NormParts | None, after: NormParts | None) -> bool:
    if x.shape != residual.shape or not (x.is_contiguous() and residual.is_contiguous()):
        return False
    held = (t for parts in (before, after) if parts for t in parts[:2])
    return x.numel() > 0 and x.dim() > 0 and _ours(x, residual, *held)


def add_norm(
    x: Tensor, residual: Tensor, before: NormParts | None, after: NormParts | None
) -> tuple[Tensor, Tensor | None]:
    """x, residual: [..., D] -> their sum, and its norm; as modules.residual.add_norm."""
    total, y = torch.empty_like(x), None if after is None else torch.empty_like(x)
    d = x.shape[-1]
    call(
        _native().fused_add_norm,
        SUM.pack(x.data_ptr(), residual.data_ptr(), total.data_ptr(), x.numel() // d, d, DTYPES[x.dtype]),
        None if before is None else _packed(x, total, ROWS, before),
        None if after is None or y is None else _packed(total, y, ROWS, after),
    )
    return total, y


def takes_gate(gate: Tensor, up: Tensor, act: str) -> bool:
    if act not in ACTS or gate.shape != up.shape or gate.numel() == 0:
        return False
    return (step := gate.stride(-1)) in STEPS and _ours(gate, up, step=step)


def act_mul(gate: Tensor, up: Tensor, act: str, alpha: float, limit: float, plus: float) -> Tensor:
    """gate, up: [..., N] -> [..., N]; as modules.glu.multiplied."""
    y = torch.empty(gate.shape, dtype=gate.dtype)
    n = gate.shape[-1]
    gate, up = gate.reshape(-1, n), up.reshape(-1, n)
    call(_native().fused_gate, GATE.pack(
        gate.data_ptr(), up.data_ptr(), y.data_ptr(), len(gate), n, gate.stride(0), up.stride(0), gate.stride(1), alpha,
        limit, plus, DTYPES[gate.dtype], ACTS.index(act),
    ))  # fmt: skip
    return y


def adding(a: Tensor, b: Any, y: Tensor) -> Callable[[], None] | None:
    """What adds into y as torch does, for who does so again and again; None: not for us."""
    if not isinstance(b, Tensor) or not a.shape == b.shape == y.shape or not _ours(a, b, y):
        return None
    if not (a.is_contiguous() and b.is_contiguous() and y.is_contiguous()):
        return None
    return partial(_native().fused_add, a.data_ptr(), b.data_ptr(), y.data_ptr(), y.numel(), DTYPES[y.dtype])


def takes_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, width: int, heads: int) -> bool:
    """Four axes and three, tables of q's type or float32: what modules.rotary.fits has found."""
    b, t = q.shape[0], q.shape[3 - heads]
    same = k.shape[0] == b and k.shape[3 - heads] == t and cos.shape[0] in (1, b) and cos.shape[1] in (1, t)
    there = q.numel() > 0 and k.numel() > 0 and width % 2 == 0
    return same and there and _ours(q, k) and _ours(cos, sin)


def rotate(q: Tensor, k: Tensor, rotary: Rotary, heads: int) -> tuple[Tensor, Tensor]:
    """q, k: [B, H, T, D] (heads 1) or [B, T, H, D] (heads 2); tables of all texts or of each."""
    token, cos, sin = 3 - heads, rotary.cos, rotary.sin
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)

    def turned(x: Tensor, y: Tensor) -> tuple[int, ...]:
        a, b = x.stride(), y.stride()
        return x.data_ptr(), y.data_ptr(), a[0], a[token], a[heads], b[0], b[token], b[heads], x.shape[heads]

    def steps(x: Tensor) -> tuple[int, int, int]:
        return x.stride(0) * (x.shape[0] > 1), x.stride(1) * (x.shape[1] > 1), 0

    call(_native().fused_rotary, ROTARY.pack(
        cos.data_ptr(), sin.data_ptr(), *turned(q, q_out), *turned(k, k_out), *steps(cos), *steps(sin), q.shape[0],
        q.shape[token], q.shape[3], rotary.width, DTYPES[q.dtype], DTYPES[cos.dtype], rotary.reads, rotary.writes,
        rotary.table == "own", rotary.wide,
    ))  # fmt: skip
    return q_out, k_out


@cache
def _native() -> Any:
    """The library, or None."""
    found = library("fused")
    if isinstance(found, str):
        return None
    for run in (found.fused_norm, found.fused_gate, found.fused_rotary):
        run.argtypes, run.restype = [ctypes.c_char_p], None
    found.fused_add_norm.argtypes, found.fused_add_norm.restype = [ctypes.c_char_p] * 3, None
    pointer = ctypes.c_void_p
    found.fused_add.argtypes = [pointer, pointer, pointer, ctypes.c_int64, ctypes.c_int32]
    found.fused_add.restype = None
    return found
