"""One query per request: a program takes one key head with the queries on it, and a part of the text.

A text is cut into as many parts as the device has room for and as are worth it, so that one long text fills it. The
last of its programs to end joins what they found; a second kernel does where that is too much for one, as of many heads
with wide values that lie in their keys. How many parts there may be, and how short, is a matter of the step's size
alone, how many there are of the text itself: a request has the same bits beside any others as long as that size stays.
Requests of none or many rows are left alone.
"""

from dataclasses import dataclass
from math import inf

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbit.kernels.cache import Cache
from fewbit.kernels.table import Table
from fewbit.kernels.triton_attention_parts import (
    LOWEST,
    opening,
    padded,
    paged,
    pairs,
    precision,
    processors,
    scaled,
    shared_bytes,
    sizes,
    tiled,
    walk,
)
from fewbit.kernels.triton_early import await_last, early, let_next
from fewbit.kernels.triton_runtime import power


@dataclass(frozen=True, slots=True)
class KeyTile:
    """Keys that a program reads at once."""

    numbers: int
    tokens: int  # at most
    stages: int  # tiles of 16 bits on their way are one less
    programs: int  # that share a multiprocessor


PROGRAMS = 4  # that are aimed at, per multiprocessor
JOINED = 8192  # numbers that four warps join at once
FEW_PARTS, MOST_PARTS = 8, 64
MOST_HEADS = 64  # queries of a program
SMALL, ALONE = KeyTile(4096, 64, 4, 3), KeyTile(16384, 128, 3, 1)
PAIR, CROWD = KeyTile(8192, 64, 3, 2), KeyTile(8192, 64, 2, 4)
# Parts there is room for, tokens of one that are worth it, tile. The fewer texts share a multiprocessor, the more of
# each had better be on its way at once. Beside a program that is ALONE there is no room for the next kernel's, which
# would ask for weights before it has its keys.
SPLITS = ((48, 32, SMALL), (16, 256, ALONE), (4, 1024, ALONE), (2, inf, PAIR), (0, inf, CROWD))
WARPS = 4
GATHERED = 16384  # numbers that so many warps gather in registers; more take twice the warps
# Where keys hold their values: heads, tokens, stages. From 64 queries on a GPU of compute capability 9.0 multiplies out
# of shared memory, where a tile that is read both ways can be loaded ahead of its turn.
SHARED = ((64, 32, 3), (64, 32, 2), (16, 32, 2), (16, 16, 2))
SPARE = 16 << 10  # bytes that a program takes beside tiles


@dataclass(frozen=True, slots=True)
class Shape:
    """How the work of a step is cut."""

    heads: int  # queries of a program, with padding
    blocks: int  # programs that share the queries of one key head
    tokens: int  # of a tile
    parts: int  # of a text, at most
    least: int  # tokens that a part is to have
    warps: int
    stages: int


def shape(query: Tensor, cache: Cache, table: Table, window: int | None) -> Shape:
    key_heads = cache.key.shape[1]
    group = query.shape[1] // key_heads
    if cache.shared:
        heads, tokens, stages, programs = together(query, cache)
    else:
        heads, programs = min(MOST_HEADS, padded(group)), PROGRAMS
    blocks = -(-group // heads)
    wanted = programs * processors(query.device) // (table.ones * key_heads * blocks)
    reach = table.reach if window is None else min(table.reach, window)
    if cache.shared:
        least = tokens
    else:
        asked, tile = next((least, tile) for room, least, tile in SPLITS if wanted >= room)
        least, (tokens, stages) = int(min(asked, reach)), cut(query, cache, tile)
    parts = max(1, min(-(-reach // least), wanted, MOST_PARTS))
    parts = 1 << parts.bit_length() - 1  # few values: each is compiled for
    warps = WARPS if heads * padded(cache.value.shape[2]) <= GATHERED else 2 * WARPS
    return Shape(heads, blocks, tokens, parts, least, warps, stages)


def cut(query: Tensor, cache: Cache, tile: KeyTile) -> tuple[int, int]:
    """-> tokens and stages of a tile: of this one, or as far as there is room for it."""
    tokens = min(tile.tokens, max(16, tile.numbers // padded(cache.key.shape[2])))
    tokens = 16 if query.dtype == torch.float32 else tokens  # without matrix units larger tiles spill
    size = cache.key.element_size()
    stages = 1 + (tile.stages - 1) * (2 if size == 1 else 1)  # of codes as many bytes on their way
    held = (stages - 1) * tokens * tiled(cache) * size
    if held <= shared_bytes(query.device) // tile.programs - SPARE:
        return tokens, stages
    return cut(query, cache, SMALL) if tile is ALONE else (tokens, 2)


def together(query: Tensor, cache: Cache) -> tuple[int, int, int, int]:
    """The first of SHARED that has room, and how many such programs a multiprocessor has room for."""
    each, room = tiled(cache) * query.element_size(), shared_bytes(query.device) - 2048
    known = SHARED[-1:] if query.dtype == torch.float32 else SHARED
    needs = [(heads + tokens * stages) * each for heads, tokens, stages in known]
    found = next((i for i, n in enumerate(needs) if n <= room), -1)
    return *known[found], max(1, min(PROGRAMS, room // needs[found]))


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
    """The first table.ones requests; see triton_attention.attend."""
    how, (heads, key_heads) = shape(query, cache, table, window), (query.shape[1], cache.key.shape[1])
    split = (table.ones, heads, how.parts) if how.parts > 1 else (0, 0, 0)
    found = torch.empty(*split, out.shape[2], dtype=torch.float32, device=query.device)
    weights = torch.empty(*split, 2, dtype=torch.float32, device=query.device)
    dims = sizes(cache)
    itself, group = how.parts > 1 and not cache.shared, power(min(how.heads, heads // key_heads))
    many = min(MOST_PARTS, max(1, JOINED * how.warps // WARPS // (group * dims["DVP"])))
    if itself and cache.ended is None:  # of each request and key head: no more of them where texts are cut
        cache.ended = torch.zeros(PROGRAMS * processors(query.device) // 2, dtype=torch.int32, device=query.device)
    _part[(table.ones, key_heads * how.blocks, how.parts)](
        query, cache.key, cache.value, cache.key_scale, cache.value_scale, cache.key_measured, cache.value_measured,
        out, found, weights, cache.ended if itself else None, table.pages, table.lengths, table.starts, sinks, scaling,
        window, softcap, heads, query.stride(2), query.stride(1), *cache.key.stride()[:2], *cache.value.stride()[:2],
        *out.stride()[:2], table.pages.stride(0), key_heads, how.parts, how.least, SPLIT=how.parts > 1,
        TOKENS=how.tokens, GROUP=heads // key_heads, BLOCKS=how.blocks, HEADS=how.heads, SIZE=table.size,
        PRECISION=precision(query.dtype), P=p, PAIRS=pairs(query.device), GROUPED=group, MANY=many,
        num_warps=how.warps, num_stages=how.stages, **dims, **early(query.device),
    )  # fmt: skip
    if how.parts > 1 and not itself:
        many = FEW_PARTS if how.parts <= FEW_PARTS else MOST_PARTS
        _join[(table.ones, heads)](
            found, weights, out, table.lengths, table.starts, window, heads, *out.stride()[:2], how.parts, how.least,
            MANY=many, TOKENS=how.tokens, DV=dims["DV"], DVP=dims["DVP"],
            num_warps=WARPS if many * dims["DVP"] <= JOINED else 2 * WARPS, **early(query.device),
        )  # fmt: skip


@triton.jit
def _stretch(length, window, parts, least, TOKENS: tl.constexpr):
    """-> the tile of the first token that is seen, and how many tokens each part takes: whole tiles."""
    first = 0
    if window is not None:
        first = tl.maximum(length - window, 0) // TOKENS * TOKENS
    several = tl.minimum(parts, tl.maximum(tl.cdiv(length - first, least), 1))
    return first, tl.cdiv(tl.cdiv(length - first, several), TOKENS) * TOKENS


@triton.jit(
    do_not_specialize=["parts", "least", "p_row"], do_not_specialize_on_alignment=["pages", "lengths", "starts"]
)
def _part(
    query, key, value, key_scale, value_scale, key_measured, value_measured, out, found, weights, ended, pages, lengths,
    starts, sinks, scaling, window, softcap, heads, q_row, q_head, k_slot: tl.constexpr, k_head, v_slot: tl.constexpr,
    v_head, o_row, o_head, p_row, key_heads, parts, least,
    GROUP: tl.constexpr, BLOCKS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DR: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, DRP: tl.constexpr, SHARED: tl.constexpr, P: tl.constexpr, PAIRS: tl.constexpr,
    GROUPED: tl.constexpr, MANY: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next(EARLY)
    request = tl.program_id(0)
    kin = tl.program_id(1) // BLOCKS
    part = tl.program_id(2)
    row = tl.load(starts + request).to(tl.int64)
    one = tl.load(starts + request + 1) == row + 1
    length = tl.load(lengths + request)
    first, step = _stretch(length, window, parts, least, TOKENS)
    whole, opened = first + step >= length, first
    first += part * step
    last = tl.minimum(first + step, length)
    if SPLIT and (part > 0) & (first >= last):  # the first part of each text stays and waits
        return
    pages += request.to(tl.int64) * p_row
    page = paged(pages, first, last, SIZE, TOKENS)
    scaling, unit = scaled(scaling, key_measured, kin), scaled(1.0, value_measured, kin)
    await_last(EARLY)
    if not one:
        return
    member = tl.program_id(1) % BLOCKS * HEADS + tl.arange(0, HEADS)
    inside = member < GROUP
    head = kin * GROUP + member
    d = tl.arange(0, DP)
    e = tl.arange(0, DVP)
    q = tl.load(query + row * q_row + head[:, None] * q_head + d[None, :],
                mask=inside[:, None] & (d < D)[None, :], other=0.0)  # fmt: skip
    rest = None
    if DR > 0:
        r = tl.arange(0, DRP)
        rest = tl.load(query + row * q_row + head[:, None] * q_head + D + r[None, :],
                       mask=inside[:, None] & (r < DR)[None, :], other=0.0)  # fmt: skip
    top, total = opening(sinks, head, inside & (part == 0), HEADS)
    if key_scale is not None:
        key_scale += kin
        value_scale += kin
    place = tl.zeros([HEADS], tl.int32) + length - 1
    acc, total, top = walk(
        q, rest, tl.zeros([HEADS, DVP], tl.float32), total, top, first, last, last, place, window, pages, page,
        key + kin * k_head, value + kin * v_head, key_scale, value_scale, k_slot, v_slot, key_heads,
        scaling, softcap, True, SIZE, TOKENS, D, DV, DR, DP, DVP, DRP, SHARED, PRECISION, P, PAIRS,
    )  # fmt: skip
    if P > 0.0:
        acc = acc / P
    acc = acc * unit
    wanted = inside[:, None] & (e < DV)[None, :]
    if not SPLIT or whole:
        acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(out + row * o_row + head[:, None] * o_head + e[None, :], acc.to(out.dtype.element_ty), mask=wanted)
    else:
        at = (request.to(tl.int64) * heads + head) * parts + part
        tl.store(found + at[:, None] * DV + e[None, :], acc, mask=wanted)
        tl.store(weights + at * 2, top, mask=inside)
        tl.store(weights + at * 2 + 1, total, mask=inside)
        if ended is not None:
            ended += request * tl.num_programs(1) + tl.program_id(1)
            several = tl.cdiv(length - opened, step)
            tl.debug_barrier()  # all threads have written
            if tl.atomic_add(ended, 1, sem="acq_rel") == several - 1:
                tl.store(ended, 0)
                mate = tl.program_id(1) % BLOCKS * HEADS + tl.arange(0, GROUPED)  # without padding
                here = kin * GROUP + mate
                all_acc = _joined(found, weights, (request.to(tl.int64) * heads + here) * parts, mate < GROUP, several,
                                  MANY, DV, DVP)  # fmt: skip
                tl.store(out + row * o_row + here[:, None] * o_head + e[None, :], all_acc.to(out.dtype.element_ty),
                         mask=(mate < GROUP)[:, None] & (e < DV)[None, :])  # fmt: skip


@triton.jit
def _joined(found, weights, at, inside, several, MANY: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr):
    """at: [HEADS], where each head's first part is -> [HEADS, DVP]: what all its parts are together."""
    e = tl.arange(0, DVP)
    top = tl.full(at.shape, LOWEST, tl.float32)
    total = tl.zeros(at.shape, tl.float32)
    acc = tl.zeros([at.shape[0], DVP], tl.float32)
    for start in range(0, several, MANY):
        part = start + tl.arange(0, MANY)
        place = at[:, None] + part[None, :]
        there = inside[:, None] & (part < several)[None, :]
        tops = tl.load(weights + place * 2, mask=there, other=LOWEST)
        totals = tl.load(weights + place * 2 + 1, mask=there, other=0.0)
        accs = tl.load(found + place[:, :, None] * DV + e[None, None, :],
                       mask=there[:, :, None] & (e < DV)[None, None, :], other=0.0)  # fmt: skip
        peak = tl.maximum(top, tl.max(tops, 1))
        share = tl.where(there, tl.exp2(tops - peak[:, None]), 0.0)
        fade = tl.exp2(top - peak)
        total = total * fade + tl.sum(totals * share, 1)
        acc = acc * fade[:, None] + tl.sum(accs * share[:, :, None], 1)
        top = peak
    return acc / tl.where(total > 0.0, total, 1.0)[:, None]


@triton.jit(do_not_specialize=["parts", "least"], do_not_specialize_on_alignment=["lengths", "starts"])
def _join(
    found, weights, out, lengths, starts, window, heads, o_row, o_head, parts, least, MANY: tl.constexpr,
    TOKENS: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next(EARLY)
    request = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(starts + request).to(tl.int64)
    one = tl.load(starts + request + 1) == row + 1
    length = tl.load(lengths + request)
    first, step = _stretch(length, window, parts, least, TOKENS)
    await_last(EARLY)
    if not one or first + step >= length:  # it is there
        return
    at = (request.to(tl.int64) * heads + head + tl.arange(0, 1)) * parts
    acc = _joined(found, weights, at, at >= 0, tl.cdiv(length - first, step), MANY, DV, DVP)
    e = tl.arange(0, DVP)
    tl.store(out + row * o_row + head * o_head + e[None, :], acc.to(out.dtype.element_ty), mask=(e < DV)[None, :])
