"""Latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of one low-rank latent, and a key that heads share.

What stands for the forward of such a module where no cache goes through the model. Queries and keys are put together,
their last channels turned, in one launch, and so are the norms of two latents; all else is the module's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fewbit.modules import norm, rotary
from fewbit.modules.rotary import RotaryForm

HELD = ("expand_kv", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj", "scaling", "config",
        "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")  # fmt: skip
LOW = ("q_a_proj", "q_a_layernorm", "q_b_proj")  # queries by a latent of their own
ATTENTION = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"  # globals of such a module's own code


@dataclass(frozen=True, slots=True)
class LatentForm:
    """low: queries have a latent of their own."""

    rotary: RotaryForm
    low: bool

    def __str__(self) -> str:
        return f"queries{' by a latent' if self.low else ''} and keys put together: {self.rotary}"


def forward(
    module: Any,
    form: LatentForm,
    own: Callable[..., Any],
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **named: Any,
) -> Any:
    """own: what stood there before, for calls with a cache or with other tables."""
    nope, rope, rank = module.qk_nope_head_dim, module.qk_rope_head_dim, module.kv_lora_rank
    paired = isinstance(position_embeddings, tuple) and len(position_embeddings) == 2
    if past_key_values is not None or module.training or not paired:
        return own(hidden_states, position_embeddings, attention_mask, past_key_values, **named)
    q = (module.q_a_proj if form.low else module.q_proj)(hidden_states)
    latent, turned = module.kv_a_proj_with_mqa(hidden_states).split([rank, rope], -1)
    if form.low:
        q, latent = norm.pair(module.q_a_layernorm, module.kv_a_layernorm, q, latent)
        q = module.q_b_proj(q)
    else:
        latent = module.kv_a_layernorm(latent)
    kv = module.kv_b_proj(latent).unflatten(-1, (-1, nope + module.v_head_dim))
    queries, keys = assemble(q.unflatten(-1, (-1, nope + rope)), kv, turned, *position_embeddings, form.rotary)
    functions, eager = (type(module).forward.__globals__[name] for name in ATTENTION)
    attend = functions.get_interface(module.config._attn_implementation, eager)
    values = kv[..., nope:].transpose(1, 2)
    out, weights = attend(
        module, queries, keys, values, attention_mask, dropout=0.0, scaling=module.scaling, **named
    )  # fmt: skip
    return module.o_proj(out.flatten(2).contiguous()), weights


def assemble(
    q: Tensor, kv: Tensor, turned: Tensor, cos: Tensor, sin: Tensor, form: RotaryForm
) -> tuple[Tensor, Tensor]:
    """q: [B, T, H, P + R], kv: [B, T, H, P + V], turned: [B, T, R], not yet -> queries and keys [B, H, T, P + R]."""
    if q.is_cuda and kernel().takes(q, kv, turned, cos, sin, form.width(cos)):
        found: tuple[Tensor, Tensor] = kernel().assemble(
            q, kv, turned, cos, sin, form.reads == "neighbours", form.writes == "neighbours", form.table,
            form.wide or cos.dtype != q.dtype,
        )  # fmt: skip
        return found
    return assembled(q, kv, turned, cos, sin, form)


def assembled(
    q: Tensor, kv: Tensor, turned: Tensor, cos: Tensor, sin: Tensor, form: RotaryForm
) -> tuple[Tensor, Tensor]:
    """The same in the operations that models write; the oracle."""
    plain = q.shape[-1] - turned.shape[-1]
    q_last, k_last = rotary.rotate(q[..., plain:], turned.unsqueeze(2), cos, sin, form, 2)
    queries = torch.cat((q[..., :plain], q_last), -1)
    keys = torch.empty_like(queries)
    keys[..., :plain], keys[..., plain:] = kv[..., :plain], k_last
    return queries.transpose(1, 2), keys.transpose(1, 2)


@cache
def kernel() -> Any:
    from fewbit.kernels import triton_latent

    return triton_latent
