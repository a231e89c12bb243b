"""Attention in plain torch, registered with transformers as "fewbit": the oracle for every later attention kernel.

It sees queries and keys after rotary, and the additive mask of transformers' eager path, so padding, sliding windows
and caches are what they are there. Keys and values may be rounded first: `module.fewbit_kv`, `module.fewbit_sides`; and
before that turned by a Hadamard matrix, queries with keys, which changes no score: `module.fewbit_kv_turn`. What
attention makes of them on the way may be rounded too, or looked at: `module.fewbit_inside`.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fewbit.errors import UnsupportedError
from fewbit.modules.attention_sides import Sides, heads, of, weighed
from fewbit.quant.qtensor import Planes
from fewbit.quant.spec import QuantSpec

NAME = "fewbit"
ROOM = 1 << 26  # scores worked on at a time where they are written out
Turn = Callable[..., Tensor]  # x [..., D] -> x Q; with back=True, x Q^T
HARMLESS = ("position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k")  # what the mask says already
KV = "fewbit_kv"  # attribute of an attention module: (spec, planes of k, planes of v)
KV_TURN = "fewbit_kv_turn"  # attribute of an attention module: a Turn
WATCH_KV = "fewbit_watch_kv"  # attribute of an attention module: called with (key, value) as they would be cached
INSIDE = "fewbit_inside"  # attribute of an attention module: an Inside


class Inside(Protocol):
    """What becomes of tensors inside attention. One that only looks gives back what it was given."""

    def queries(self, query: Tensor, scaling: float) -> Tensor:
        """[B, H, Q, D] -> the same, scaled."""

    def weights(self, weights: Tensor) -> Tensor:
        """Probabilities: [B, H, Q, T]."""

    def output(self, out: Tensor) -> Tensor:
        """[B, H, Q, Dv]"""


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    sides: Sides | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query: [B, H, Q, D], key: [B, G, T, D], value: [B, G, T, Dv], mask: additive [B, 1, Q, T] -> [B, Q, H, Dv]."""
    known_or_raise(module, others)
    if (watch := getattr(module, WATCH_KV, None)) is not None:
        watch(key, value)
    if (turn := getattr(module, KV_TURN, None)) is not None:
        query, key, value = turn(query), turn(key), turn(value)
    sides = of(module) if sides is None else sides
    query, key, value = sides(query, key, value)
    if (kv := getattr(module, KV, None)) is not None:
        key, value = rounded(key, value, *kv)
    mask = attention_mask[..., : key.shape[-2]] if attention_mask is not None else None
    for more in (position_bias, chosen(indices, key)):
        mask = more if mask is None else mask if more is None else mask + more
    inside: Inside | None = getattr(module, INSIDE, None)
    if softcap is None and s_aux is None and not sides.p and inside is None:
        gqa = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=gqa)
    else:
        how = scaling or query.shape[-1] ** -0.5, softcap, s_aux, sides.p
        out = in_runs(query, key, value, mask, *how, inside)
    out = out if turn is None else turn(out, back=True)
    return out.transpose(1, 2).contiguous(), None


def is_attention(module: nn.Module) -> bool:
    """True for a module of transformers' that calls an attention function."""
    return type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx") and hasattr(module, "config")


def known_or_raise(module: nn.Module, others: dict[str, Any]) -> None:
    """A tensor that we do not know may change the result: say so, and do not drop it."""
    unknown = [name for name, value in others.items() if isinstance(value, Tensor) and name not in HARMLESS]
    if unknown:
        raise UnsupportedError(
            f"{type(module).__name__} passes {', '.join(unknown)} to attention, which ours cannot use"
        )


def chosen(indices: Tensor | None, key: Tensor) -> Tensor | None:
    """indices: [B, Q, k], the keys an indexer chose for each query -> additive mask [B, 1, Q, T]."""
    if indices is None:
        return None
    lowest = torch.finfo(key.dtype).min
    mask = torch.full((*indices.shape[:2], key.shape[-2]), lowest, dtype=key.dtype, device=key.device)
    return mask.scatter_(-1, indices.long(), 0.0).unsqueeze(1)


def in_runs(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *how: Any) -> Tensor:
    """`explicit` on so many queries at a time that their scores fit in ROOM values: those of a long prompt may not."""
    rows, many = max(1, ROOM // (query.shape[0] * query.shape[1] * key.shape[2])), query.shape[2]
    if many <= rows:
        return explicit(query, key, value, mask, *how)
    cut = mask is not None and mask.shape[-2] == many
    each = [slice(start, start + rows) for start in range(0, many, rows)]
    masks = [mask[..., at, :] if mask is not None and cut else mask for at in each]
    return torch.cat([explicit(query[:, :, at], key, value, m, *how) for at, m in zip(each, masks, strict=True)], 2)


def explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    p: float = 0.0,
    inside: Inside | None = None,
) -> Tensor:
    """Scores written out: soft-capped before the mask; a sink is one more score per head that only takes weight.

    p: as in Sides.
    """
    groups = query.shape[1] // key.shape[1]
    if inside is not None:
        query, scaling = inside.queries(query, scaling), 1.0
    scores = query @ key.repeat_interleave(groups, 1).mT * scaling  # [B, H, Q, T]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1).to(scores)], -1)
    if p:
        return weighed(scores, value.repeat_interleave(groups, 1), p, scores.shape[-1] - key.shape[-2])
    weights = scores.float().softmax(-1).to(value.dtype)[..., : key.shape[-2]]
    if inside is not None:
        weights = inside.weights(weights)
    out = weights @ value.repeat_interleave(groups, 1)
    return out if inside is None else inside.output(out)


def rounded(key: Tensor, value: Tensor, spec: QuantSpec, k: Planes, v: Planes) -> tuple[Tensor, Tensor]:
    """Keys and values as a cache of this spec gives them back; planes may have an axis of heads."""
    return heads(key, spec, k), heads(value, spec, v)
