"""Latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of one low-rank latent, and a key that heads share.

What stands for the forward of such a module where no cache goes through the model. Queries and keys are put together,
their last channels turned, in one launch, and so are the norms of two latents; all else is the module's own.

Over a paged cache attention goes through the latent. A score is (W q) c as well as q (W^T c), and weights times values
are W times the weighted latents: heads share one key, the latent c beside the turned channels, whose first numbers are
its value; queries are multiplied by kv_b_proj's rows of keys before, results by those of values after. Where a cache
rounds keys or values, or somebody watches them, they are expanded, for that is what such rounding is defined on.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fewbit.kernels import torch_emulated
from fewbit.kernels.cache import Cache
from fewbit.kernels.registry import EMULATED
from fewbit.modules import norm, paged, rotary
from fewbit.modules.attention import INSIDE, KV, KV_TURN, WATCH_KV
from fewbit.modules.attention_sides import SIDES
from fewbit.modules.linear import Linear
from fewbit.modules.rotary import RotaryForm
from fewbit.modules.watched import watched
from fewbit.quant.qtensor import Quantized

HELD = ("expand_kv", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj", "scaling", "config",
        "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")  # fmt: skip
LOW = ("q_a_proj", "q_a_layernorm", "q_b_proj")  # queries by a latent of their own
ATTENTION = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"  # globals of such a module's own code
EXPANDED = (KV, KV_TURN, WATCH_KV, INSIDE, SIDES)  # attributes of a module that are about its keys and values
Tables = tuple[Tensor, Tensor]
Up = tuple[Tensor, Quantized | None]  # [H (P + V), C], and what rounds its input, if anything


@dataclass(frozen=True, slots=True)
class LatentForm:
    """low: queries have a latent of their own. through: attention over a paged cache may go through that of keys."""

    rotary: RotaryForm
    low: bool
    through: bool = False

    def __str__(self) -> str:
        ways = f"queries{' by a latent' if self.low else ''} and keys put together: {self.rotary}"
        return f"{ways}; attention through the latent" if self.through else ways


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
    turns = tables(position_embeddings)
    if past_key_values is not None or module.training or turns is None:
        named |= {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
        return own(hidden_states, past_key_values=past_key_values, **named)
    q = (module.q_a_proj if form.low else module.q_proj)(hidden_states)
    latent, turned = module.kv_a_proj_with_mqa(hidden_states).split([rank, rope], -1)
    if form.low:
        q, latent = norm.pair(module.q_a_layernorm, module.kv_a_layernorm, q, latent)
        q = module.q_b_proj(q)
    else:
        latent = module.kv_a_layernorm(latent)
    q = q.unflatten(-1, (-1, nope + rope))
    if form.through and (up := goes_through(module, attention_mask)) is not None:
        return module.o_proj(attended(module, form, up, q, latent, turned, turns, **named)), None
    kv = module.kv_b_proj(latent).unflatten(-1, (-1, nope + module.v_head_dim))
    queries, keys = assemble(q, kv, turned, *turns, form.rotary)
    functions, eager = (type(module).forward.__globals__[name] for name in ATTENTION)
    attend = functions.get_interface(module.config._attn_implementation, eager)
    values = kv[..., nope:].transpose(1, 2)
    out, weights = attend(
        module, queries, keys, values, attention_mask, dropout=0.0, scaling=module.scaling, **named
    )  # fmt: skip
    return module.o_proj(out.flatten(2).contiguous()), weights


def tables(position_embeddings: Any) -> Tables | None:
    """cos and sin, [B, T, R] each, of a pair or of the complex numbers that they are of; None: something else."""
    if isinstance(position_embeddings, Tensor) and position_embeddings.is_complex():
        cos, sin = torch.view_as_real(position_embeddings).movedim(-1, 0).contiguous()
        return cos, sin
    return position_embeddings if isinstance(position_embeddings, tuple) and len(position_embeddings) == 2 else None


def ready(module: Any, form: LatentForm) -> None:
    """Before weights are settled: kv_b_proj as floats alone where attention is to go through the latent."""
    linear, paging = module.kv_b_proj, module.config._attn_implementation == paged.NAME
    pending = linear.pending if type(linear) is Linear and linear.options.kernels == "auto" else ()
    if form.through and paging and not expands(module) and len(pending) == 1 and not low_rank(pending[0]):
        linear.options = replace(linear.options, kernels=EMULATED)


def goes_through(module: Any, mask: Tensor | None) -> Up | None:
    """What to multiply by; None where attention is over expanded keys and values. A cache goes on as it began."""
    step = paged.current()
    if step is None or mask is not None or module.config._attn_implementation != paged.NAME:
        return None
    held = step.caches.get(module.layer_idx)
    if not (isinstance(held, Cache) and held.shared if held is not None else not expands(module)):
        return None
    return plain(module.kv_b_proj)


def expands(module: Any) -> bool:
    return any(getattr(module, name, None) is not None for name in EXPANDED)


def plain(linear: Any) -> Up | None:
    """A linear's weight as it multiplies; None where it does more, or holds it in another way."""
    if type(linear) is not Linear or linear.bias is not None or linear.parted or watched(linear):
        return None
    if not linear.parts:
        return linear.weight, None
    only = linear.parts[0]
    if len(linear.parts) > 1 or only.kernel.name != EMULATED or low_rank(only.quantized):
        return None
    return only.packed.weight, only.quantized


def low_rank(q: Quantized) -> bool:
    """Whether it multiplies by more than its weight."""
    return any(t.kind == "low_rank" for t in q.transforms)


def attended(
    module: Any, form: LatentForm, up: Up, q: Tensor, latent: Tensor, turned: Tensor, turns: Tables, **named: Any
) -> Tensor:
    """q: [1, T, H, P + R], latent: [1, T, C], turned: [1, T, R], not yet -> [1, T, H V]."""
    weight, source = up
    rank, nope, size = latent.shape[-1], module.qk_nope_head_dim, module.v_head_dim
    each = weight.unflatten(0, (-1, nope + size))
    latent = latent if source is None else torch_emulated.given(latent, source)
    queries, key = absorb(q, latent, turned, each[:, :nope], *turns, form.rotary)
    out, _ = paged.forward(module, queries, key, key[..., :rank], None, scaling=module.scaling, **named)
    found = torch.empty(*out.shape[:3], size, dtype=out.dtype, device=out.device)
    torch.bmm(out[0].transpose(0, 1), each[:, nope:].mT, out=found[0].transpose(0, 1))
    return found.flatten(2)


def absorb(
    q: Tensor, latent: Tensor, turned: Tensor, up: Tensor, cos: Tensor, sin: Tensor, form: RotaryForm
) -> tuple[Tensor, Tensor]:
    """up: [H, P, C] -> queries [1, H, T, C + R] and the key of all heads [1, 1, T, C + R]."""
    rank, rope, nope = latent.shape[-1], turned.shape[-1], up.shape[1]
    queries = torch.empty(*q.shape[:3], rank + rope, dtype=q.dtype, device=q.device)
    torch.bmm(q[0, ..., :nope].transpose(0, 1), up, out=queries[0, ..., :rank].transpose(0, 1))
    if q.is_cuda and kernel().takes(q, latent.unsqueeze(2), turned, cos, sin, form.width(cos), 1):
        key = kernel().join(
            q, latent, turned, cos, sin, queries, form.reads == "neighbours", form.writes == "neighbours", form.table,
            form.wide or cos.dtype != q.dtype,
        )  # fmt: skip
    else:
        key = joined(q, latent, turned, cos, sin, queries, form)
    return queries.transpose(1, 2), key.transpose(1, 2)


def joined(
    q: Tensor, latent: Tensor, turned: Tensor, cos: Tensor, sin: Tensor, queries: Tensor, form: RotaryForm
) -> Tensor:
    """Queries' last channels to their place -> the key [B, T, 1, C + R]; the oracle."""
    rope = turned.shape[-1]
    last, k_last = rotary.rotate(q[..., -rope:], turned.unsqueeze(2), cos, sin, form, 2)
    queries[..., -rope:] = last
    return torch.cat((latent.unsqueeze(2), k_last), -1)


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
