"""Rotary embedding of queries and keys in one launch: a program turns some heads of one token.

q and k may be strided views of a merged projection; what is made has their order of axes. Channels beyond those that
are turned are copied.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbit.kernels.table import Rotary
from fewbit.kernels.triton_early import await_last, early, let_next
from fewbit.kernels.triton_runtime import cdiv, power

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MANY = 1024  # tokens from which on a program takes more heads


@triton.jit
def places(d, R: tl.constexpr, WRITES: tl.constexpr):
    """Of channels that are written: their pair, and whether they are its second."""
    if WRITES:
        j = d // 2
        second = d % 2
    else:
        second = (d >= R // 2).to(tl.int32)
        j = d - second * (R // 2)
    return j, second


@triton.jit
def entries(
    cos_at, sin_at, DP: tl.constexpr, R: tl.constexpr, WRITES: tl.constexpr, OWN: tl.constexpr
):  # fmt: skip
    """-> [DP] each, of a token's tables: read before others are waited for. R: 0 where nothing is turned."""
    d = tl.arange(0, DP)
    c = d.to(tl.float32)
    s = c
    if R > 0:
        j, _ = places(d, R, WRITES)
        e = j
        if OWN:
            e = d
        c = tl.load(cos_at + e, d < R, other=1.0).to(tl.float32)
        s = tl.load(sin_at + e, d < R, other=0.0).to(tl.float32)
    return c, s


@triton.jit
def turned(
    x_at, rows, there, c, s, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, READS: tl.constexpr,
    WRITES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Heads of one token, at x_at + rows where they are there; c, s: its `entries` -> [rows, DP], 0 beyond D."""
    d = tl.arange(0, DP)
    inside = there[:, None] & (d < D)[None, :]
    at = x_at + rows[:, None]
    if R == 0:
        x = tl.load(at + d[None, :], inside, other=0.0)
    else:
        turns = d < R
        j, second = places(d, R, WRITES)
        if READS:
            own = 2 * j + second
            other = 2 * j + 1 - second
        else:
            own = j + second * (R // 2)
            other = j + (1 - second) * (R // 2)
        raw = tl.load(at + tl.where(turns, own, d)[None, :], inside, other=0.0)
        ys = tl.load(at + other[None, :], inside & turns[None, :], other=0.0).to(tl.float32) * s[None, :]
        xc = raw.to(tl.float32) * c[None, :]
        if not WIDE:  # models round each product
            xc = xc.to(raw.dtype).to(tl.float32)
            ys = ys.to(raw.dtype).to(tl.float32)
        x = (xc + tl.where((second == 1)[None, :], ys, -ys)).to(raw.dtype)
    return x


@triton.jit
def turned_heads(
    x_at, y_at, tile, heads, x_head, y_head, c, s, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr,
    READS: tl.constexpr, WRITES: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    head = tile * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, DP)
    made = turned(x_at, head * x_head, head < heads, c, s, D, DP, R, READS, WRITES, WIDE)
    tl.store(y_at + (head * y_head)[:, None] + d[None, :], made, (head < heads)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _rotate(
    q_at, k_at, cos_at, sin_at, q_out, k_out, tokens, q_heads, k_heads,
    qb, qt, qh, kb, kt, kh, cb, ct, sb, st, qob, qot, qoh, kob, kot, koh, D: tl.constexpr, DP: tl.constexpr,
    R: tl.constexpr, READS: tl.constexpr, WRITES: tl.constexpr, OWN: tl.constexpr, WIDE: tl.constexpr,
    HEADS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next(EARLY)
    pid = tl.program_id(0).to(tl.int64)
    b, t = pid // tokens, pid % tokens
    c, s = entries(cos_at + b * cb + t * ct, sin_at + b * sb + t * st, DP, R, WRITES, OWN)
    await_last(EARLY)
    tile = tl.program_id(1)
    q_tiles = tl.cdiv(q_heads, HEADS)
    if tile < q_tiles:
        turned_heads(q_at + b * qb + t * qt, q_out + b * qob + t * qot, tile, q_heads, qh, qoh, c, s, D, DP, R, READS,
                     WRITES, WIDE, HEADS)  # fmt: skip
    else:
        turned_heads(k_at + b * kb + t * kt, k_out + b * kob + t * kot, tile - q_tiles, k_heads, kh, koh, c, s, D, DP,
                     R, READS, WRITES, WIDE, HEADS)  # fmt: skip


def takes(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, width: int, heads: int) -> bool:
    """Whether the kernel runs on them."""
    if any(not x.is_cuda or x.stride(-1) != 1 for x in (q, k, cos, sin)) or q.dtype not in FLOATS:
        return False
    if k.dtype != q.dtype or cos.dtype != sin.dtype or cos.dtype not in (q.dtype, torch.float32):
        return False
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape or heads not in (1, 2):
        return False
    b, t, d = q.shape[0], q.shape[3 - heads], q.shape[3]
    same = k.shape[0] == b and k.shape[3 - heads] == t and k.shape[3] == d
    return same and cos.shape[0] in (1, b) and cos.shape[1] in (1, t) and width % 2 == 0 and 0 < width <= d


def steps(x: Tensor) -> tuple[int, int]:
    """Strides of what may be the same for all texts, or for all tokens."""
    return x.stride(0) * (x.shape[0] > 1), x.stride(1) * (x.shape[1] > 1)


def constants(rotary: Rotary | None) -> dict[str, int | bool]:
    """What `turned` is compiled for."""
    if rotary is None:
        return {"R": 0, "READS": False, "WRITES": False, "OWN": False, "WIDE": False}
    return {
        "R": rotary.width,
        "READS": rotary.reads,
        "WRITES": rotary.writes,
        "OWN": rotary.table == "own",
        "WIDE": rotary.wide,
    }


def rotate(q: Tensor, k: Tensor, rotary: Rotary, heads: int) -> tuple[Tensor, Tensor]:
    """q, k: [B, H, T, D] (heads 1) or [B, T, H, D] (heads 2); tables of all texts or of each."""
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    if q.numel() == 0 or k.numel() == 0:
        return q_out.copy_(q), k_out.copy_(k)
    tokens, size = q.shape[3 - heads], power(q.shape[3])
    together = 16 if q.shape[0] * tokens >= MANY else 4
    tiles = cdiv(q.shape[heads], together) + cdiv(k.shape[heads], together)

    def strides(x: Tensor) -> tuple[int, int, int]:
        return x.stride(0), x.stride(3 - heads), x.stride(heads)

    _rotate[(q.shape[0] * tokens, tiles)](
        q, k, rotary.cos, rotary.sin, q_out, k_out, tokens, q.shape[heads], k.shape[heads], *strides(q), *strides(k),
        *steps(rotary.cos), *steps(rotary.sin), *strides(q_out), *strides(k_out), q.shape[3], size, HEADS=together,
        num_warps=max(1, min(8, together * size // 512)), **constants(rotary), **early(q.device),
    )  # fmt: skip
    return q_out, k_out
