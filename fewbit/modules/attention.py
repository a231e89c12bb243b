"""Attention in plain torch, registered with transformers as "fewbit": the oracle for every later attention kernel.

It sees queries and keys after rotary, and the additive mask of transformers' eager path, so padding, sliding windows
and caches are what they are there. Keys and values may be rounded first: `module.fewbit_kv`; and before that turned by
a Hadamard matrix, queries with keys, which changes no score: `module.fewbit_kv_turn`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fewbit.errors import UnsupportedError
from fewbit.kernels import saturation
from fewbit.quant.qtensor import Planes
from fewbit.quant.spec import QuantSpec

NAME = "fewbit"
Turn = Callable[..., Tensor]  # x [..., D] -> x Q; with back=True, x Q^T
HARMLESS = ("position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k")  # what the mask says already
KV = "fewbit_kv"  # attribute of an attention module: (spec, planes of k, planes of v)
KV_TURN = "fewbit_kv_turn"  # attribute of an attention module: a Turn
WATCH_KV = "fewbit_watch_kv"  # attribute of an attention module: called with (key, value) as they would be cached


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
    **others: Any,
) -> tuple[Tensor, None]:
    """query: [B, H, Q, D], key: [B, G, T, D], value: [B, G, T, Dv], mask: additive [B, 1, Q, T] -> [B, Q, H, Dv]."""
    known_or_raise(module, others)
    if (watch := getattr(module, WATCH_KV, None)) is not None:
        watch(key, value)
    if (turn := getattr(module, KV_TURN, None)) is not None:
        query, key, value = turn(query), turn(key), turn(value)
    if (kv := getattr(module, KV, None)) is not None:
        key, value = rounded(key, value, *kv)
    mask = attention_mask[..., : key.shape[-2]] if attention_mask is not None else None
    for more in (position_bias, chosen(indices, key)):
        mask = more if mask is None else mask if more is None else mask + more
    if softcap is None and s_aux is None:
        gqa = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=gqa)
    else:
        out = explicit(query, key, value, mask, scaling or query.shape[-1] ** -0.5, softcap, s_aux)
    out = out if turn is None else turn(out, back=True)
    return out.transpose(1, 2).contiguous(), None


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


def explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Scores written out: soft-capped before the mask; a sink is one more score per head that only takes weight."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT * scaling  # [B, H, Q, T]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1).to(scores)], -1)
    weights = scores.float().softmax(-1).to(value.dtype)[..., : key.shape[-2]]
    return weights @ value.repeat_interleave(groups, 1)


def rounded(key: Tensor, value: Tensor, spec: QuantSpec, k: Planes, v: Planes) -> tuple[Tensor, Tensor]:
    """Keys and values as a cache of this spec gives them back; planes may have an axis of heads."""
    return _heads(key, spec, k), _heads(value, spec, v)


def _heads(x: Tensor, spec: QuantSpec, planes: Planes) -> Tensor:
    if all(plane.dim() == 2 for plane in planes.values()):
        return saturation.rounded(x, spec, planes)
    each = [saturation.rounded(x[:, h], spec, {n: p[h] for n, p in planes.items()}) for h in range(x.shape[1])]
    return torch.stack(each, 1)
