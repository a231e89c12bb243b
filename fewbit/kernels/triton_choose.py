"""A router's choice in one launch: scores, groups, the best experts and their weights; a program for each token.

A score and its place make one whole number: the greater score wins, NaN over all, and of equals the first, so one
reduction finds both. Of equal scores torch may take another.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbit.kernels.triton_early import begin, early
from fewbit.kernels.triton_runtime import power

MOST = 8192  # experts; a program holds a token's all
LAST = tl.constexpr(65535)
NEVER = tl.constexpr(-(1 << 62))
SCORES = {"none": 0, "sigmoid": 1, "softmax": 2}
DIVIDES = {"no": 0, "plus": 1, "least": 2}


@triton.jit
def ordered(value):
    """float32 -> int32 in the order of values, NaN over all."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
    return tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _rank(value, at):
    """[..] float32 and places below 65536 -> int64 in the order of values."""
    return ordered(value).to(tl.int64) * (LAST + 1) + (LAST - at)


@triton.jit
def _value(rank):
    key = (rank >> 16).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _scored(x, inside, SCORE: tl.constexpr):
    """x: [1, P]"""
    if SCORE == 1:
        x = tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + tl.exp(-x))
    if SCORE == 2:
        most = tl.max(tl.where(inside, x, -float("inf")), 1)
        x = tl.where(inside, tl.exp(x - most[:, None]), 0.0)
        total = tl.sum(x, 1)[:, None]
        x = tl.div_rn(x, tl.broadcast_to(total, x.shape))
    return x


@triton.jit
def _choose(
    logits_at, bias_at, weights_at, experts_at, row, each, groups, eps, scale, fill,
    K: tl.constexpr, KEPT: tl.constexpr, SCORE: tl.constexpr, THEN: tl.constexpr, DIVIDE: tl.constexpr,
    BIAS: tl.constexpr, GROUPS: tl.constexpr, TWO: tl.constexpr, WEIGHED: tl.constexpr,
    HIGH: tl.constexpr, WIDE: tl.constexpr, ROOM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
    token = tl.program_id(0).to(tl.int64)
    group, within = tl.arange(0, HIGH)[:, None], tl.arange(0, WIDE)[None, :]
    at = group * each + within
    inside = (group < groups) & (within < each)
    flat_at, flat_inside = tl.reshape(at, (1, HIGH * WIDE)), tl.reshape(inside, (1, HIGH * WIDE))
    logit = tl.load(logits_at + token * row + flat_at, flat_inside, 0.0).to(tl.float32)
    score = tl.reshape(_scored(logit, flat_inside, SCORE), (HIGH, WIDE))
    wanted = score
    if BIAS:
        wanted += tl.load(bias_at + at, inside, 0.0).to(tl.float32)
    rank = tl.where(inside, _rank(wanted, at), NEVER)
    if GROUPS:
        best = tl.max(rank, 1)
        worth = _value(best)
        if TWO:
            worth += _value(tl.max(tl.where(rank == best[:, None], NEVER, rank), 1))
        index = tl.arange(0, HIGH)
        order = tl.where(index < groups, _rank(worth, index), NEVER)
        left = order
        for _ in range(KEPT):
            left = tl.where(left == tl.max(left, 0), NEVER, left)
        out = (left == order)[:, None]  # of a group that was taken nothing is left
        rank = tl.where(out & inside, _rank(tl.full((HIGH, WIDE), 0.0, tl.float32) + fill, at), rank)
        if WEIGHED:
            score = tl.where(out, fill, score)
    lane = tl.arange(0, ROOM)
    weight = tl.zeros([ROOM], tl.float32)
    found = tl.zeros([ROOM], tl.int64)
    for j in range(K):
        first = tl.max(tl.max(rank, 1), 0)
        here = rank == first
        weight = tl.where(lane == j, tl.sum(tl.sum(tl.where(here, score, 0.0), 1), 0), weight)
        found = tl.where(lane == j, LAST - (first & LAST), found)
        rank = tl.where(here, NEVER, rank)
    real = lane < K
    weight = tl.reshape(_scored(tl.reshape(weight, (1, ROOM)), tl.reshape(real, (1, ROOM)), THEN), (ROOM,))
    if DIVIDE > 0:
        total = tl.sum(tl.where(real, weight, 0.0), 0)
        if DIVIDE == 1:
            total += eps
        else:
            total = tl.where(total < eps, eps, total)  # NaN stays
        weight = tl.div_rn(weight, tl.zeros([ROOM], tl.float32) + total)
    weight *= scale
    tl.store(weights_at + token * K + lane, weight.to(weights_at.dtype.element_ty), real)
    tl.store(experts_at + token * K + lane, found, real)


def takes(logits: Tensor, bias: Tensor | None, top: int) -> bool:
    """Whether the kernel runs on them."""
    learning = torch.is_grad_enabled() and logits.requires_grad
    fits = logits.dim() == 2 and logits.stride(1) == 1 and 0 < top <= logits.shape[1] <= MOST
    return fits and not learning and (bias is None or bias.numel() == logits.shape[1])


def choose(logits: Tensor, bias: Tensor | None, by: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """logits: [T, E], by: a modules.router.Choice -> weights [T, k], experts [T, k]; as modules.router.chosen.

    The best expert comes first, as torch has it where it sorts.
    """
    form, groups = by.form, by.form.groups
    tokens, experts = logits.shape
    weights = torch.empty(tokens, by.top, dtype=dtype, device=logits.device)
    index = torch.empty(tokens, by.top, dtype=torch.int64, device=logits.device)
    if not tokens:
        return weights, index
    each = experts // by.groups
    high, wide = power(by.groups), power(each)
    _choose[(tokens,)](
        logits, logits if bias is None else bias.contiguous(), weights, index, logits.stride(0), each,
        by.groups, float(form.eps), float(by.scale), float(groups.fill if groups else 0.0),
        by.top, by.kept, SCORES[form.score], SCORES[form.then], DIVIDES[form.divide], bias is not None,
        groups is not None, groups is not None and groups.by == "two", groups is not None and groups.weighed,
        high, wide, power(by.top), num_warps=max(1, min(8, high * wide // 256)),
        **early(logits.device),
    )  # fmt: skip
    return weights, index
