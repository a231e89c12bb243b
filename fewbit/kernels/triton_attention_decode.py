"""One query per request: a program takes one key head with the queries on it, and a part of the text.

A text is cut into as many parts as the device has room for, so that one long text fills it; a second kernel joins what
the parts found. The number of parts is a matter of the step's size alone, the length of a part of its own text: a
request has the same bits beside any others as long as that number stays, and as long as all or not all have one row.
Requests of none or many rows are left alone.

Where all have one row (`New`), the program that sees a text's last token turns its key by its place, begins with it,
and writes it to the cache beside its value: nobody else reads those.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbit.kernels import saturation
from fewbit.kernels.cache import Cache
from fewbit.kernels.table import New, Table
from fewbit.kernels.triton_attention_parts import (
    LOG2E,
    LOWEST,
    as_e4m3,
    opening,
    padded,
    precision,
    processors,
    scaled,
    sizes,
    walk,
)
from fewbit.kernels.triton_cache import bounds, coded
from fewbit.kernels.triton_early import begin, early
from fewbit.kernels.triton_rotary import constants, steps, turned

PROGRAMS = 4  # that are aimed at, per multiprocessor
FEW_PARTS, MOST_PARTS = 8, 64
MOST_HEADS = 64  # queries of a program
MOST_TOKENS = 64
TILE = {True: 4096, False: 8192}  # numbers of a tile of keys, where texts are cut into parts and where not
WARPS, STAGES = 4, {True: 4, False: 2}  # tiles on their way are one less than stages
ROOM = 48 << 10  # bytes for them, so that PROGRAMS share a multiprocessor


@dataclass(frozen=True, slots=True)
class Shape:
    """How the work of a step is cut."""

    heads: int  # queries of a program, with padding
    blocks: int  # programs that share the queries of one key head
    tokens: int  # of a tile
    parts: int  # of a text
    stages: int


def shape(query: Tensor, cache: Cache, table: Table, window: int | None) -> Shape:
    key_heads = cache.key.shape[1]
    group = query.shape[1] // key_heads
    heads = min(MOST_HEADS, padded(group))
    blocks = -(-group // heads)
    wanted = PROGRAMS * processors(query.device) // (table.ones * key_heads * blocks)
    tokens = min(MOST_TOKENS, max(16, TILE[wanted > 1] // padded(cache.key.shape[2])))
    if query.dtype == torch.float32:  # without matrix units larger tiles spill
        tokens = 16
    reach = table.reach if window is None else min(table.reach, window)
    parts = max(1, min(-(-reach // tokens), wanted, MOST_PARTS))
    bytes_of_tile = tokens * (padded(cache.key.shape[2]) + padded(cache.value.shape[2])) * cache.key.element_size()
    stages = STAGES[wanted > 1]
    stages = stages if (stages - 1) * bytes_of_tile <= ROOM else 2
    return Shape(heads, blocks, tokens, 1 << parts.bit_length() - 1, stages)  # few values: each is compiled for


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
    new: New | None = None,
) -> None:
    """The first table.ones requests; see triton_attention.attend. new: what the cache does not have yet."""
    cut, (heads, key_heads) = shape(query, cache, table, window), (query.shape[1], cache.key.shape[1])
    split = (table.ones, heads, cut.parts) if cut.parts > 1 else (0, 0, 0)
    found = torch.empty(*split, out.shape[2], dtype=torch.float32, device=query.device)
    weights = torch.empty(*split, 2, dtype=torch.float32, device=query.device)
    dims = sizes(cache)
    rotary = None if new is None else new.rotary
    tables = (None, None, 0, 0) if rotary is None else (
        rotary.cos, rotary.sin, steps(rotary.cos)[1], steps(rotary.sin)[1])  # fmt: skip
    fresh = (None, None, None, 0, 0, 0, 0) if new is None else (
        new.key, new.value, new.slots, new.key.stride(2), new.key.stride(1), new.value.stride(2), new.value.stride(1),
    )  # fmt: skip
    cut_off = None if new is None or cache.key_measured is None else saturation.count_of(query.device)
    _part[(table.ones, key_heads * cut.blocks, cut.parts)](
        query, cache.key, cache.value, cache.key_scale, cache.value_scale, cache.key_measured, cache.value_measured,
        out, found, weights, table.pages, table.lengths, table.starts, sinks, *fresh, *tables, cut_off, scaling, window,
        softcap, heads, query.stride(2), query.stride(1), *cache.key.stride()[:2], *cache.value.stride()[:2],
        *out.stride()[:2], table.pages.stride(0), key_heads, cut.parts, SPLIT=cut.parts > 1, TOKENS=cut.tokens,
        GROUP=heads // key_heads, BLOCKS=cut.blocks, HEADS=cut.heads, SIZE=table.size,
        PRECISION=precision(query.dtype), P=p, num_warps=WARPS, num_stages=cut.stages, **dims, **bounds(cache),
        **constants(rotary), **early(query.device),
    )  # fmt: skip
    if cut.parts > 1:
        many = FEW_PARTS if cut.parts <= FEW_PARTS else MOST_PARTS
        _join[(table.ones, heads)](
            found, weights, out, table.lengths, table.starts, window, heads, *out.stride()[:2], cut.parts, MANY=many,
            TOKENS=cut.tokens, DV=dims["DV"], DVP=dims["DVP"], num_warps=4 if many * dims["DVP"] <= 8192 else 8,
        **early(query.device),
        )  # fmt: skip


@triton.jit
def _stretch(length, window, parts, TOKENS: tl.constexpr):
    """-> the tile of the first token that is seen, and how many tokens each part takes: whole tiles."""
    first = 0
    if window is not None:
        first = tl.maximum(length - window, 0) // TOKENS * TOKENS
    return first, tl.cdiv(tl.cdiv(length - first, parts), TOKENS) * TOKENS


UNALIGNED = ["pages", "lengths", "starts", "slots"]


@triton.jit(do_not_specialize=["parts", "p_row"], do_not_specialize_on_alignment=UNALIGNED)
def _part(
    query, key, value, key_scale, value_scale, key_measured, value_measured, out, found, weights, pages, lengths,
    starts, sinks, new_key, new_value, slots, nk_row, nk_head, nv_row, nv_head, cos, sin, c_row, s_row, cut, scaling,
    window, softcap, heads, q_row, q_head, k_slot: tl.constexpr, k_head, v_slot: tl.constexpr, v_head, o_row, o_head,
    p_row, key_heads, parts,
    GROUP: tl.constexpr, BLOCKS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    P: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, WHOLE: tl.constexpr, R: tl.constexpr,
    READS: tl.constexpr, WRITES: tl.constexpr, OWN: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
    request = tl.program_id(0)
    kin = tl.program_id(1) // BLOCKS
    part = tl.program_id(2)
    row = tl.load(starts + request).to(tl.int64)
    one = tl.load(starts + request + 1) == row + 1
    length = tl.load(lengths + request)
    first, step = _stretch(length, window, parts, TOKENS)
    first += part * step
    last = tl.minimum(first + step, length)
    if SPLIT:
        one = one & (first < last)
    if not one:
        return
    member = tl.program_id(1) % BLOCKS * HEADS + tl.arange(0, HEADS)
    inside = member < GROUP
    head = kin * GROUP + member
    e = tl.arange(0, DVP)
    if R > 0:
        cos += row * c_row
        sin += row * s_row
    q = turned(query + row * q_row, head * q_head, inside, cos, sin, D, DP, R, READS, WRITES, OWN, WIDE)
    top, total = opening(sinks, head, inside & (part == 0), HEADS)
    acc = tl.zeros([HEADS, DVP], tl.float32)
    place = tl.zeros([HEADS], tl.int32) + length - 1
    scaling = scaled(scaling, key_measured, kin)
    if new_key is not None:  # masks, for a branch would begin to read behind it
        newest = (last == length) & (length > 0)
        slot = tl.load(slots + row)
        each = kin + tl.arange(0, 1)
        there = (each < key_heads) & newest
        counts = tl.program_id(1) % BLOCKS == 0  # where several write the same
        k = turned(new_key + row * nk_row, each * nk_head, there, cos, sin, D, DP, R, READS, WRITES, OWN, WIDE)
        k = kept(k, key + slot * k_slot, k_head, each, there, key_scale, key_measured, cut, counts, slot * key_heads,
                 D, DP, LEAST, MOST, WHOLE)  # fmt: skip
        v = tl.load(new_value + row * nv_row + (each * nv_head)[:, None] + e[None, :],
                    there[:, None] & (e < DV)[None, :], other=0.0)  # fmt: skip
        v = kept(v, value + slot * v_slot, v_head, each, there, value_scale, value_measured, cut, counts,
                 slot * key_heads, DV, DVP, LEAST, MOST, WHOLE)  # fmt: skip
        score = tl.sum(q.to(tl.float32) * k, 1) * scaling
        if softcap is not None:
            score = softcap - 2.0 * softcap / (tl.exp2(score * (LOG2E * 2.0 / softcap)) + 1.0)
        score = tl.where(newest, score * LOG2E, LOWEST)
        peak = tl.maximum(top, score)
        weight = tl.where(newest, tl.exp2(score - peak), 0.0)
        total = total * tl.exp2(top - peak) + weight
        top = peak
        if P > 0.0:
            weight = as_e4m3(weight * P)
        acc = weight[:, None] * v
        last -= newest.to(tl.int32)
    if key_scale is not None:
        key_scale += kin
        value_scale += kin
    acc, total, top = walk(
        q, acc, total, top, first, last, last, place, window, pages + request.to(tl.int64) * p_row, key + kin * k_head,
        value + kin * v_head, key_scale, value_scale, k_slot, v_slot, key_heads, scaling, softcap, True, SIZE, TOKENS,
        D, DV, DP, DVP, PRECISION, P, True,
    )  # fmt: skip
    if P > 0.0:
        acc = acc / P
    acc = scaled(acc, value_measured, kin)
    wanted = inside[:, None] & (e < DV)[None, :]
    if not SPLIT:
        acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(out + row * o_row + head[:, None] * o_head + e[None, :], acc.to(out.dtype.element_ty), mask=wanted)
    else:
        at = (request.to(tl.int64) * heads + head) * parts + part
        tl.store(found + at[:, None] * DV + e[None, :], acc, mask=wanted)
        tl.store(weights + at * 2, top, mask=inside)
        tl.store(weights + at * 2 + 1, total, mask=inside)


@triton.jit
def kept(
    x, plane, p_head, each, there, scales, measured, cut, counts, row, SIZE: tl.constexpr, PAD: tl.constexpr,
    LEAST: tl.constexpr, MOST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """x: [1, PAD], what one head is to keep of a token -> float32, what is read from the cache from now on, but for a
    measured scale."""
    d = tl.arange(0, PAD)
    x, unit = coded(x, each, there, scales, measured, cut, counts, row, LEAST, MOST, WHOLE)
    codes = x.to(plane.dtype.element_ty)
    tl.store(plane + (each * p_head)[:, None] + d[None, :], codes, there[:, None] & (d < SIZE)[None, :])
    return codes.to(tl.float32) * unit[:, None]


@triton.jit(do_not_specialize=["parts"], do_not_specialize_on_alignment=["lengths", "starts"])
def _join(
    found, weights, out, lengths, starts, window, heads, o_row, o_head, parts, MANY: tl.constexpr,
    TOKENS: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
    request = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(starts + request).to(tl.int64)
    if tl.load(starts + request + 1) != row + 1:
        return
    length = tl.load(lengths + request)
    first, step = _stretch(length, window, parts, TOKENS)
    part = tl.arange(0, MANY)
    there = part * step < length - first
    at = (request.to(tl.int64) * heads + head) * parts + part
    e = tl.arange(0, DVP)
    top = tl.load(weights + at * 2, mask=there, other=LOWEST)
    total = tl.load(weights + at * 2 + 1, mask=there, other=0.0)
    acc = tl.load(found + at[:, None] * DV + e[None, :], mask=there[:, None] & (e < DV)[None, :], other=0.0)
    share = tl.where(there, tl.exp2(top - tl.max(top, 0)), 0.0)
    total = tl.sum(total * share, 0)
    acc = tl.sum(acc * share[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out + row * o_row + head * o_head + e, acc.to(out.dtype.element_ty), mask=e < DV)
