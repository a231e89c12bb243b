"""Draw one token a row by inverse distribution: temperature, min_p, top_k, top_p.

A row must draw the same token whoever shares its batch, so nothing here may depend on the order in which a sum was
taken: probabilities become 40-bit integers, whose sums are exact in any order, and each row's one random number comes
from its own seed and step.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fewbit.engine.sampler_row import Row
from fewbit.engine.transfer import sent

SCALE = float(1 << 40)  # times 2**19 tokens still fits int64
CACHED = 8192  # logits of a row beyond which a CPU is twice as fast row by row
HELD = 1 << 24  # logits of several rows, which take up to 50 bytes each on the way


def uniform(seed: int, step: int) -> float:
    """One number in [0, 1) with 53 random bits."""
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def draw(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """logits: [R, V] f32 -> [R] int64."""
    each = 1 if logits.device.type == "cpu" and logits.shape[1] > CACHED else max(1, HELD // logits.shape[1])
    return torch.cat([_draw(logits[i : i + each], rows[i : i + each]) for i in range(0, len(rows), each)])


def _draw(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    values = [[row.params.temperature, row.params.min_p, row.params.top_p, uniform(row.seed, len(row.output))]
              for row in rows]  # fmt: skip
    heat, min_p, top_p, chance = sent(values, torch.float64, logits.device).T.unsqueeze(-1)
    scaled = logits / heat.float()
    odds = torch.exp(scaled - scaled.amax(-1, keepdim=True)).nan_to_num(0.0)  # of the likeliest token, 1
    if any(row.params.min_p for row in rows):
        odds = odds * (odds >= min_p.float())  # on a CPU ten times as fast as masked_fill
    odds = _top_k(scaled, odds, [row.params.top_k for row in rows])
    weights = (odds * SCALE).long()
    weights = _nucleus(weights, top_p, [i for i, row in enumerate(rows) if row.params.top_p < 1])
    return _chosen(weights, chance).clamp_(0, logits.shape[1] - 1)


def _top_k(scaled: Tensor, odds: Tensor, counts: list[int]) -> Tensor:
    """Nothing below a row's k-th logit; equals of it stay."""
    chosen = [i for i, count in enumerate(counts) if 0 < count < scaled.shape[1]]
    if not chosen:
        return odds
    where = sent(chosen, torch.int64, odds.device)
    nth = sent([counts[i] - 1 for i in chosen], torch.int64, odds.device).unsqueeze(-1)
    some = scaled[where]
    least = some.topk(max(counts[i] for i in chosen)).values.gather(1, nth)
    return odds.index_copy(0, where, odds[where] * (some >= least))


def _nucleus(weights: Tensor, top_p: Tensor, chosen: list[int]) -> Tensor:
    """Set to 0, in the chosen rows, all that the likeliest tokens that reach top_p do without. -> weights"""
    if not chosen:
        return weights
    where = sent(chosen, torch.int64, weights.device)
    some, keep = weights[where], top_p[where]
    total = some.sum(-1, keepdim=True)
    spare = torch.minimum(((1 - keep) * total).long(), total - 1)
    cut = _cut_each if weights.device.type == "cpu" else _cut
    return weights.index_copy(0, where, cut(some, spare))


def _cut(weights: Tensor, spare: Tensor) -> Tensor:
    """Drop the least likely while all dropped weigh at most `spare` [R, 1]; of equals the later ids go first."""
    ordered, ids = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = weights.sum(-1, keepdim=True) - before > spare  # what goes with this token is too much to drop
    kept[:, 0] = True
    return torch.zeros_like(weights).scatter_(1, ids, ordered * kept)


def _cut_each(weights: Tensor, spare: Tensor) -> Tensor:
    """The same, sorting few: tokens below an even share of `spare` weigh less than it all together."""
    out = torch.zeros_like(weights)
    for i, share in enumerate((spare // weights.shape[1]).flatten().tolist()):
        ids = torch.nonzero(weights[i] > share).flatten()
        some = weights[i : i + 1, ids]
        dropped = weights[i].sum() - some.sum()
        out[i, ids] = _cut(some, spare[i : i + 1] - dropped)[0]
    return out


def _chosen(weights: Tensor, chance: Tensor) -> Tensor:
    ends = weights.cumsum(-1)
    total = ends[:, -1:]
    target = torch.minimum((chance * total).long(), total - 1)
    return torch.searchsorted(ends, target, right=True).squeeze(-1)
