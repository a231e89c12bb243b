"""From a router's choices to rows sorted by expert and back, and the biases of experts, each in one launch.

Only the device knows the counts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbit.kernels.triton_early import begin, early
from fewbit.kernels.triton_runtime import cdiv, power

BLOCK = 1024  # choices looked at together


@triton.jit
def _route(choices_at, token_at, place_at, rows_at, size, experts, k, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """One expert each: where its rows begin, and which they are. The last program is for choices of none."""
    begin(EARLY)
    mine = tl.program_id(0)
    before = 0
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        choice = tl.minimum(tl.load(choices_at + at, at < size, experts + 1).to(tl.int32), experts + 1)
        before += tl.sum(((choice < mine) & (at < size)).to(tl.int32), 0)
    found = 0
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        choice = tl.load(choices_at + at, at < size, 0).to(tl.int32)
        here = (tl.minimum(choice, experts) == mine) & (at < size)
        place = before + found + tl.cumsum(here.to(tl.int32), 0) - 1
        tl.store(token_at + place, (at // k).to(tl.int64), here)
        tl.store(place_at + at, place.to(tl.int64), here)
        found += tl.sum(here.to(tl.int32), 0)
    if mine < experts:
        tl.store(rows_at + mine, found.to(tl.int64))


@triton.jit
def _combine(
    y_at, choices_at, place_at, weights_at, onto_at, out_at, n, experts, K: tl.constexpr, ONTO: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(K):
        place = tl.load(place_at + token * K + j)
        known = tl.load(choices_at + token * K + j) < experts
        weight = tl.load(weights_at + token * K + j).to(tl.float32)
        total += weight * tl.load(y_at + place * n + at, known & (at < n), 0.0).to(tl.float32)
    made = total.to(out_at.dtype.element_ty)
    if ONTO:  # models round both sums
        onto = tl.load(onto_at + token * n + at, at < n, 0.0).to(tl.float32)
        made = (made.to(tl.float32) + onto).to(out_at.dtype.element_ty)
    tl.store(out_at + token * n + at, made, at < n)


@triton.jit
def _add_bias(y_at, bias_at, rows_at, n, experts, POWER: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    each = tl.arange(0, POWER)
    ends = tl.cumsum(tl.load(rows_at + each, each < experts, 0).to(tl.int32), 0)
    mine = tl.sum(((ends <= row) & (each < experts)).to(tl.int32), 0)
    known = (at < n) & (mine < experts)
    bias = tl.load(bias_at + mine.to(tl.int64) * n + at, known, 0.0).to(tl.float32)
    y = tl.load(y_at + row * n + at, known, 0.0).to(tl.float32)
    tl.store(y_at + row * n + at, (y + bias).to(y_at.dtype.element_ty), known)


def route(choices: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """choices: [T, k] -> the token of each sorted row [S], the row of each choice [S], rows of each expert [E].

    Rows of one expert keep the order of their tokens; a choice of `experts` or above comes last.
    """
    size, device = choices.numel(), choices.device
    token, place = (torch.empty(size, dtype=torch.int64, device=device) for _ in range(2))
    rows = torch.empty(experts, dtype=torch.int64, device=device)
    block = min(BLOCK, power(max(size, 16)))
    _route[(experts + 1,)](
        choices.contiguous(), token, place, rows, size, experts, max(1, choices.shape[-1]), block,
        **early(choices.device),
    )  # fmt: skip
    return token, place, rows


def combine(
    y: Tensor, choices: Tensor, place: Tensor, weights: Tensor, experts: int, dtype: torch.dtype,
    onto: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y: [S, H] sorted by expert, weights: [T, k] -> each token's weighted sum [T, H], added up in float32.

    onto: [T, H], added to it once it is rounded to dtype.
    """
    tokens, k = choices.shape
    n = y.shape[-1]
    out = torch.empty(tokens, n, dtype=dtype, device=y.device)
    if out.numel():
        block = min(BLOCK, power(n))
        grid = (tokens, cdiv(n, block))
        _combine[grid](
            y.contiguous(), choices.contiguous(), place, weights.contiguous(), y if onto is None else onto.contiguous(),
            out, n, experts, k, onto is not None, block, **early(y.device),
        )  # fmt: skip
    return out


def add_bias(y: Tensor, bias: Tensor, rows: Tensor) -> Tensor:
    """y: [S, N] sorted by expert, bias: [E, N], rows: [E] -> y, with its expert's bias added to each row in place."""
    y, n = y.contiguous(), y.shape[-1]
    if y.numel():
        block = min(BLOCK, power(n))
        grid = (len(y), cdiv(n, block))
        _add_bias[grid](y, bias.contiguous(), rows, n, len(rows), power(len(rows)), block, **early(y.device))
    return y
