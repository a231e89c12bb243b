"""Queries and keys of latent attention put together in one launch: a program makes some heads of one token.

The first channels of a head are copied, from the queries' product and from the expanded latent; the last are turned,
of keys those of the one vector that all heads share. Where heads share the latent itself, it is copied once, and the
first channels of queries are made by who calls.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbit.kernels.triton_early import await_last, early, let_next
from fewbit.kernels.triton_rotary import FLOATS, MANY, entries, steps, turned_heads
from fewbit.kernels.triton_runtime import cdiv, power


@triton.jit(do_not_specialize=["tokens"])
def _assemble(
    q_at, kv_at, k_at, cos_at, sin_at, q_out, k_out, tokens, heads, qb, qt, qh, vb, vt, vh, kb, kt, cb, ct, sb, st,
    ob, ot, oh, PLAIN: tl.constexpr, D: tl.constexpr, R: tl.constexpr, READS: tl.constexpr, WRITES: tl.constexpr,
    OWN: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr, DP: tl.constexpr, ROOM: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    let_next(EARLY)
    pid = tl.program_id(0).to(tl.int64)
    b, t = pid // tokens, pid % tokens
    c, s = entries(cos_at + b * cb + t * ct, sin_at + b * sb + t * st, DP, R, WRITES, OWN)
    await_last(EARLY)
    tile = tl.program_id(1)
    head = tile * HEADS + tl.arange(0, HEADS)
    q_at += b * qb + t * qt
    kv_at += b * vb + t * vt
    q_out += b * ob + t * ot
    k_out += b * ob + t * ot
    turned_heads(q_at + PLAIN, q_out + PLAIN, tile, heads, qh, oh, c, s, D, DP, R, READS, WRITES, WIDE, HEADS)
    turned_heads(k_at + b * kb + t * kt, k_out + PLAIN, tile, heads, 0, oh, c, s, D, DP, R, READS, WRITES, WIDE, HEADS)
    at = tl.arange(0, ROOM)[None, :]
    plain = (head < heads)[:, None] & (at < PLAIN)
    row = head[:, None]
    tl.store(q_out + row * oh + at, tl.load(q_at + row * qh + at, plain), plain)
    tl.store(k_out + row * oh + at, tl.load(kv_at + row * vh + at, plain), plain)


@triton.jit(do_not_specialize=["tokens"])
def _join(
    q_at, latent_at, k_at, cos_at, sin_at, q_out, k_out, tokens, heads, qb, qt, qh, lb, lt, kb, kt, cb, ct, sb, st,
    qob, qot, qoh, kob, kot, RANK: tl.constexpr, D: tl.constexpr, R: tl.constexpr, READS: tl.constexpr,
    WRITES: tl.constexpr, OWN: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr, DP: tl.constexpr,
    ROOM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next(EARLY)
    pid = tl.program_id(0).to(tl.int64)
    b, t = pid // tokens, pid % tokens
    c, s = entries(cos_at + b * cb + t * ct, sin_at + b * sb + t * st, DP, R, WRITES, OWN)
    await_last(EARLY)
    turned_heads(q_at + b * qb + t * qt, q_out + b * qob + t * qot + RANK, tl.program_id(1), heads, qh, qoh, c, s, D,
                 DP, R, READS, WRITES, WIDE, HEADS)  # fmt: skip
    if tl.program_id(1) == 0:
        k_out += b * kob + t * kot
        turned_heads(k_at + b * kb + t * kt, k_out + RANK, 0, 1, 0, 0, c, s, D, DP, R, READS, WRITES, WIDE, 1)
        at = tl.arange(0, ROOM)
        tl.store(k_out + at, tl.load(latent_at + b * lb + t * lt + at, at < RANK), at < RANK)


def takes(
    q: Tensor, kv: Tensor, turned: Tensor, cos: Tensor, sin: Tensor, width: int, heads: int | None = None
) -> bool:
    """Whether the kernels run on them. heads: of kv, None: as many as queries have."""
    if any(x.stride(-1) != 1 for x in (q, kv, turned, cos, sin)) or q.dtype not in FLOATS:
        return False
    if not (q.dtype == kv.dtype == turned.dtype) or cos.dtype != sin.dtype or cos.dtype not in (q.dtype, torch.float32):
        return False
    if (q.dim(), kv.dim(), turned.dim(), cos.dim()) != (4, 4, 3, 3) or cos.shape != sin.shape:
        return False
    b, t, d = q.shape[0], q.shape[1], turned.shape[2]
    same = kv.shape[:3] == (*q.shape[:2], heads or q.shape[2]) and turned.shape[:2] == (b, t) and d < q.shape[3]
    return same and cos.shape[0] in (1, b) and cos.shape[1] in (1, t) and width % 2 == 0 and 0 < width <= d


def assemble(
    q: Tensor, kv: Tensor, turned: Tensor, cos: Tensor, sin: Tensor, reads: bool, writes: bool, table: str, wide: bool
) -> tuple[Tensor, Tensor]:
    """As modules.latent.assembled. reads, writes: whether pairs are neighbours."""
    texts, tokens, heads, size = q.shape
    q_out, k_out = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    if q.numel():
        d, width = turned.shape[-1], cos.shape[-1] * (2 if table == "short" else 1)
        together = 16 if texts * tokens >= MANY else 4
        room = power(size - d)
        _assemble[(texts * tokens, cdiv(heads, together))](
            q, kv, turned, cos, sin, q_out, k_out, tokens, heads, *q.stride()[:3], *kv.stride()[:3],
            *turned.stride()[:2], *steps(cos), *steps(sin), *q_out.stride()[:3], size - d, d, width, reads, writes,
            table == "own", wide, together, power(d), room, num_warps=max(1, min(8, together * room // 256)),
            **early(q.device),
        )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


def join(
    q: Tensor, latent: Tensor, turned: Tensor, cos: Tensor, sin: Tensor, queries: Tensor, reads: bool, writes: bool,
    table: str, wide: bool,
) -> Tensor:  # fmt: skip
    """As modules.latent.joined: queries' last channels to their place -> the key that heads share."""
    texts, tokens, heads, _ = q.shape
    rank, d = latent.shape[-1], turned.shape[-1]
    key = torch.empty(texts, tokens, 1, rank + d, dtype=q.dtype, device=q.device)
    if q.numel():
        width = cos.shape[-1] * (2 if table == "short" else 1)
        together = 16 if texts * tokens >= MANY else 4
        last = q[..., q.shape[-1] - d :]
        _join[(texts * tokens, cdiv(heads, together))](
            last, latent, turned, cos, sin, queries, key, tokens, heads, *q.stride()[:3], *latent.stride()[:2],
            *turned.stride()[:2], *steps(cos), *steps(sin), *queries.stride()[:3], *key.stride()[:2], rank, d, width,
            reads, writes, table == "own", wide, together, power(d), power(rank),
            num_warps=max(1, min(4, together * power(d) // 128)), **early(q.device),
        )  # fmt: skip
    return key
