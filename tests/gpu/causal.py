"""Causal attention without a mask tensor, so that it can be captured in a graph: making a mask waits for the GPU."""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fewbit.models import hf

CAUSAL = "fewbit-test-causal"


def forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """query: [B, H, T, D], key and value: [B, G, T, D] -> [B, T, H, D]."""
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


hf.register_unmasked_attention(CAUSAL, forward)
