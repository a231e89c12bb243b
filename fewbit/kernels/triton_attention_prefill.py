"""Many queries per request: a program takes a block of them on one head, and walks along what they see.

Rows stand at the end of their text: what the cache had before is seen by all of them, their own by those behind. The
tokens that every row of a block sees are walked without masks. Blocks that see most are started first.

The grid is over the blocks of the longest request, or over those that the table lists: then a CUDA graph can hold it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbit.kernels.cache import Cache
from fewbit.kernels.table import BLOCK, Table
from fewbit.kernels.triton_attention_parts import (
    opening,
    padded,
    paged,
    precision,
    scaled,
    shared_bytes,
    sizes,
    tiled,
    walk,
)


@dataclass(frozen=True, slots=True)
class Tile:
    rows: int
    tokens: int
    warps: int
    stages: int


LADDER = (
    Tile(64, 64, 4, 3),
    Tile(128, 64, 8, 2),
    Tile(64, 32, 8, 3),
    Tile(64, 32, 8, 2),
    Tile(16, 64, 4, 3),
    Tile(16, 32, 4, 3),
    Tile(16, 16, 4, 3),
)  # measured for heads of 128: docs/log.md
WHOLE = (Tile(32, 16, 8, 2), Tile(16, 16, 8, 2))  # float32 has no matrix units: larger tiles spill
REGISTERS = 128  # of a thread, for what it gathers


def tile(query: Tensor, cache: Cache, longest: int) -> Tile:
    """The first that is not half empty, and has room."""
    size, value_size, held = tiled(cache), padded(cache.value.shape[2]), query.element_size()
    rows = size if cache.shared else padded(cache.key.shape[2])
    room = shared_bytes(query.device) - 2048
    ladder = WHOLE if query.dtype == torch.float32 else LADDER

    def fits(t: Tile) -> bool:
        needs = (t.rows * rows + t.stages * t.tokens * size) * held
        return t.rows < 2 * longest and needs <= room and t.rows * value_size <= REGISTERS * 32 * t.warps

    return next((t for t in ladder if fits(t)), ladder[-1])


def run(
    query: Tensor,
    cache: Cache,
    out: Tensor,
    table: Table,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    p: float = 0.0,
) -> None:
    """The requests behind the first table.ones, or the blocks of the table; see triton_attention.attend."""
    cut, heads = tile(query, cache, table.longest), query.shape[1]
    if table.blocks is None:
        grid = -(-table.longest // cut.rows), heads, len(table.lengths) - table.ones
    else:
        grid = len(table.blocks) * (BLOCK // cut.rows), heads, 1
    _block[grid](
        query, cache.key, cache.value, cache.key_scale, cache.value_scale, cache.key_measured, cache.value_measured,
        out, table.pages, table.lengths, table.starts, table.blocks, sinks, table.ones, scaling, window, softcap,
        query.stride(2), query.stride(1), *cache.key.stride()[:2], *cache.value.stride()[:2], *out.stride()[:2],
        table.pages.stride(0), cache.key.shape[1], GROUP=heads // cache.key.shape[1], ROWS=cut.rows, TOKENS=cut.tokens,
        SIZE=table.size, EACH=BLOCK // cut.rows, PRECISION=precision(query.dtype), P=p, **sizes(cache),
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip


UNALIGNED = ["pages", "lengths", "starts", "blocks"]


@triton.jit(do_not_specialize=["ones", "p_row"], do_not_specialize_on_alignment=UNALIGNED)
def _block(
    query, key, value, key_scale, value_scale, key_measured, value_measured, out, pages, lengths, starts, blocks, sinks,
    ones, scaling, window, softcap, q_row, q_head, k_slot: tl.constexpr, k_head, v_slot: tl.constexpr, v_head, o_row,
    o_head, p_row, key_heads,
    GROUP: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, SIZE: tl.constexpr, EACH: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DR: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    DRP: tl.constexpr, SHARED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    if blocks is None:
        request = ones + tl.program_id(2)
        before = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    else:  # EACH programs for a line
        line = blocks + tl.program_id(0) // EACH * 2
        request = tl.load(line)
        before = tl.load(line + 1) + (EACH - 1 - tl.program_id(0) % EACH) * ROWS
    if request < 0:
        return
    head = tl.program_id(1)
    kin = head // GROUP
    begin = tl.load(starts + request)
    count = tl.load(starts + request + 1) - begin
    if (before >= count) | ((count == 1) & (request < ones)):  # the latter is decoding's
        return
    length = tl.load(lengths + request)
    row = before + tl.arange(0, ROWS)
    inside = row < count
    at = length - count + row
    d = tl.arange(0, DP)
    e = tl.arange(0, DVP)
    far = (begin + row).to(tl.int64)
    q = tl.load(query + far[:, None] * q_row + head * q_head + d[None, :],
                mask=inside[:, None] & (d < D)[None, :], other=0.0)  # fmt: skip
    rest = None
    if DR > 0:
        r = tl.arange(0, DRP)
        rest = tl.load(query + far[:, None] * q_row + head * q_head + D + r[None, :],
                       mask=inside[:, None] & (r < DR)[None, :], other=0.0)  # fmt: skip
    lowest = tl.maximum(length - count + before, 0)  # place of the first row, of the one behind the last
    highest = tl.minimum(lowest + ROWS, length)
    common = (lowest + 1) // TOKENS * TOKENS  # up to here all rows see all, as far as a window does not hide it
    first = 0
    middle = 0
    if window is not None:
        first = tl.maximum(lowest + 1 - window, 0) // TOKENS * TOKENS
        middle = tl.minimum(tl.cdiv(tl.maximum(highest - window, 0), TOKENS) * TOKENS, common)
    top, total = opening(sinks, head + row * 0, inside, ROWS)
    acc = tl.zeros([ROWS, DVP], tl.float32)
    if key_scale is not None:
        key_scale += kin
        value_scale += kin
    scaling = scaled(scaling, key_measured, kin)
    pages += request.to(tl.int64) * p_row
    key += kin * k_head
    value += kin * v_head
    if window is not None:
        page = paged(pages, first, middle, SIZE, TOKENS)
        acc, total, top = walk(
            q, rest, acc, total, top, first, middle, length, at, window, pages, page, key, value, key_scale,
            value_scale, k_slot, v_slot, key_heads, scaling, softcap, True, SIZE, TOKENS, D, DV, DR, DP, DVP, DRP,
            SHARED, PRECISION, P, "",
        )  # fmt: skip
    page = paged(pages, middle, common, SIZE, TOKENS)
    acc, total, top = walk(
        q, rest, acc, total, top, middle, common, length, at, window, pages, page, key, value, key_scale, value_scale,
        k_slot, v_slot, key_heads, scaling, softcap, False, SIZE, TOKENS, D, DV, DR, DP, DVP, DRP, SHARED, PRECISION,
        P, "",
    )  # fmt: skip
    page = paged(pages, common, highest, SIZE, TOKENS)
    acc, total, top = walk(
        q, rest, acc, total, top, common, highest, length, at, window, pages, page, key, value, key_scale, value_scale,
        k_slot, v_slot, key_heads, scaling, softcap, True, SIZE, TOKENS, D, DV, DR, DP, DVP, DRP, SHARED, PRECISION,
        P, "",
    )  # fmt: skip
    if P > 0.0:
        acc = acc / P
    acc = scaled(acc, value_measured, kin) / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out + far[:, None] * o_row + head * o_head + e[None, :], acc.to(out.dtype.element_ty),
             mask=inside[:, None] & (e < DV)[None, :])  # fmt: skip
