"""Attention in plain torch, registered with transformers as "fewbit": the oracle for every later attention kernel.

It sees queries and keys after rotary, and the additive mask of transformers' eager path, so padding, sliding windows
and caches are what they are there. Keys and values may be rounded first: `module.fewbit_kv`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fewbit.quant.qtensor import Planes
from fewbit.quant.reference import fake_quant
from fewbit.quant.spec import QuantSpec

NAME = "fewbit"
KV = "fewbit_kv"  # attribute of an attention module: (spec, planes of k, planes of v)


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
    **_: Any,
) -> tuple[Tensor, None]:
    """query: [B, H, Q, D], key: [B, G, T, D], value: [B, G, T, Dv], mask: additive [B, 1, Q, T] -> [B, Q, H, Dv]."""
    if (kv := getattr(module, KV, None)) is not None:
        key, value = rounded(key, value, *kv)
    mask = attention_mask[..., : key.shape[-2]] if attention_mask is not None else None
    if position_bias is not None:
        mask = position_bias if mask is None else mask + position_bias
    if softcap is None and s_aux is None:
        gqa = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=gqa)
    else:
        out = explicit(query, key, value, mask, scaling or query.shape[-1] ** -0.5, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


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
        return fake_quant(x, spec, planes)
    each = [fake_quant(x[:, h], spec, {n: p[h] for n, p in planes.items()}) for h in range(x.shape[1])]
    return torch.stack(each, 1)
