"""shrink: a config of the same type whose model is tiny.

Sizes only are changed: widths, heads, layers, experts, vocabulary, windows. What is not a size (eps, multipliers,
activation, rope, softcap, the pattern of layers) stays, and so do the relations between sizes.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from fewbit.models import hf

HIDDEN, HEADS, HEAD, ROPE, VOCAB, WINDOW = 64, 4, 16, 8, 160, 8

TABLE: tuple[tuple[int, str], ...] = (
    (
        HIDDEN,
        """hidden_size n_embd d_model emb_dim embedding_dim attention_hidden_size word_embed_proj_dim input_size dim
        hidden_size_global embedding_size lru_width out_hidden_size backbone_hidden_size adapter_out_dim attention_size
        conv_output_size projector_input_dim projector_output_dim projection_dim""",
    ),
    (
        96,
        """intermediate_size ffn_dim n_inner d_ff dff dim_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim d_inner
        feed_forward_size dense_intermediate_size intermediate_size_mlp mlp_dim adapter_input_size""",
    ),
    (
        48,
        """moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size ple_embed_dim
        shared_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size router_hidden_size
        prompt_mid_dim""",
    ),
    (
        HEADS,
        """num_attention_heads n_head n_heads attention_heads decoder_attention_heads encoder_attention_heads num_heads
        swa_num_attention_heads num_decoder_attention_heads num_encoder_attention_heads linear_num_heads index_n_heads
        linear_num_value_heads conf_num_attention_heads num_attention_heads_per_layer""",
    ),
    (
        HEAD,
        """head_dim kv_channels dim_head d_kv d_head attention_head_size v_head_dim qk_nope_head_dim swa_head_dim d_rel
        global_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim mamba_d_state
        mamba_d_head ssm_state_size mamba_head_dim mamba_headdim lightning_head_dim""",
    ),
    (ROPE, "qk_rope_head_dim rotary_dim laurel_rank gated_norm_rank hc_lowrank adapter_rank"),
    (HEAD + ROPE, "qk_head_dim"),
    (2 * HEADS, "mamba_n_heads mamba_num_heads"),
    (2 * HIDDEN, "mamba_d_ssm"),
    (4, "index_block_size"),
    (
        32,
        """attention_head_dim kv_lora_rank q_lora_rank o_lora_rank hidden_size_per_layer_input time_step_rank
        mamba_dt_rank""",
    ),
    (
        VOCAB,
        """vocab_size vocab_size_per_layer_input audio_vocab_size encoder_hash_byte_group_vocab unpadded_vocab_size
        decoder_vocab_size shape_vocab_size pronunciation_vocab_size ngram_vocab_size_base""",
    ),
    (
        WINDOW,
        """sliding_window sliding_window_size attention_window_size window_size local_attention attention_chunk_size
        index_topk rel_extent token_budget""",
    ),
    (8, "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num split_ngram_parts"),
    (
        2,
        """num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts n_group num_expert_group
        n_shared_experts num_shared_experts moe_num_shared_experts linear_num_key_heads o_groups n_groups
        num_codebooks index_topk_blocks""",
    ),
    (1, "topk_group first_k_dense_replace num_dense_layers moe_layer_start_index num_nextn_predict_layers"),
)


def _row(name: str) -> tuple[str, ...]:
    """The names that share a row of the table."""
    (found,) = (names.split() for _, names in TABLE if name in names.split())
    return tuple(found)


SIZES: dict[str, int] = {name: size for size, names in TABLE for name in names.split()}
ALWAYS = frozenset(name for names in (_row("vocab_size"), _row("sliding_window")) for name in names)  # small or not
ATTENTION_HEADS = _row("num_attention_heads")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


LAYERS = _words(
    """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth num_decoder_layers num_blocks
    num_encoder_layers conf_num_hidden_layers num_layers_per_stack"""
)
KV = _words(
    """num_key_value_heads num_kv_heads kv_n_heads num_query_groups swa_num_key_value_heads
    num_global_key_value_heads"""
)
PERIODS = _words(
    """attn_layer_period attn_layer_offset expert_layer_period sliding_window_pattern layer_group_size
    interleave_moe_layer_step global_attn_every_n_layers no_rope_layer_interval full_attention_interval
    n_layers_per_attn_res_block decoder_sparse_step"""
)
SAME = (  # sizes that follow another where they equal it
    ("head_dim", "qk_rope_head_dim"),
    ("linear_num_key_heads", "linear_num_value_heads"),
    ("shared_intermediate_size", "intermediate_size"),
    ("moe_intermediate_size", "intermediate_size"),
)
STATES = (("num_heads", "head_dim"), ("mamba_n_heads", "mamba_d_head"), ("mamba_num_heads", "mamba_head_dim"))
FACTORS = ("short_factor", "long_factor")  # of rotary embeddings: one number per frequency
MOST_LAYERS = 12


def shrink(config: Any) -> Any:
    """A config of the same type whose model is tiny."""
    small = copy.deepcopy(config)
    for part in parts(small):
        shrink_part(part)
    return small


def parts(config: Any) -> Iterable[Any]:
    """A config and the configs in it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_diff_dict") and hasattr(value, "model_type"):
            yield from parts(value)


def shrink_part(config: Any) -> None:
    """The sizes of one config, its nested configs aside."""
    old = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    overrides = hf.layer_overrides(config)
    if overrides:
        config.per_layer_config = None
    wide = next((old[n] for n in ("hidden_size", "n_embd", "d_model") if isinstance(old.get(n), int)), HIDDEN + 1)
    layers = next((old[n] for n in LAYERS if isinstance(old.get(n), int)), 0)
    keep = min(layers, depth(old, layers))
    new = sizes(old, wide) | lists(old, layers, keep) | {n: keep for n in LAYERS if isinstance(old.get(n), int)}
    consistent(new, old, wide)
    for name, value in new.items():
        setattr(config, name, value)
    special_tokens(config, old)
    rope(config, wide)
    if overrides:
        config.per_layer_config = {i: override(o, old, new) for i, o in overrides.items() if i < keep}


def sizes(old: Mapping[str, Any], wide: int) -> dict[str, Any]:
    """What the table says, for a config that is not small already."""
    new = {}
    for name, value in old.items():
        if name in ATTENTION_HEADS and value == 3 and wide > HIDDEN:
            new[name] = 2  # the small width has no thirds
        elif name in SIZES and (wide > HIDDEN or name in ALWAYS):
            new[name] = reduced(value, SIZES[name])
        elif name in KV and isinstance(value, int) and wide > HIDDEN:
            new[name] = kv_heads(value, old)
    return new


def lists(old: Mapping[str, Any], layers: int, keep: int) -> dict[str, Any]:
    """Lists with an entry per layer, and lists of layers, cut to the layers kept."""
    new: dict[str, Any] = {}
    for name, value in old.items():
        if isinstance(value, list | tuple) and layers > keep:
            if len(value) == layers:
                new[name] = type(value)(reduced(list(value[:keep]), SIZES.get(name, 1 << 62)))
            elif name.endswith(("layers", "idxs", "layer_ids", "layer_indices")):
                new[name] = [v for v in value if not isinstance(v, int) or v < keep]
    return new


def override(values: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """One layer's own sizes: larger than the others' where they were, the same otherwise."""
    out = {}
    for name, value in values.items():
        base = new.get(name, old.get(name))
        known = isinstance(value, int) and isinstance(base, int) and (name in SIZES or name in KV)
        out[name] = base * (2 if value > old[name] else 1) if known else value
    return out


def reduced(value: Any, size: int) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return min(value, size)
    if isinstance(value, list):
        return [reduced(v, size) for v in value]
    return value


def depth(values: Mapping[str, Any], layers: int) -> int:
    """The fewest layers, two at least, that show every kind of layer."""
    needed = 2
    for value in values.values():
        if isinstance(value, list | tuple) and len(value) == layers and all(isinstance(v, str | int) for v in value):
            kinds = list(dict.fromkeys(value))
            if len(kinds) <= 6:
                needed = max(needed, *(list(value).index(kind) + 1 for kind in kinds))
    for name in PERIODS:
        if isinstance(values.get(name), int):
            needed = max(needed, values[name] + 1 if "offset" in name else values[name])
    if isinstance(values.get("block_types"), list | tuple):  # a pattern that repeats
        needed = max(needed, len(values["block_types"]))
    if isinstance(values.get("first_k_dense_replace"), int):
        needed = max(needed, 3)
    return min(needed, MOST_LAYERS) + bool(values.get("num_kv_shared_layers"))


def kv_heads(value: int, values: Mapping[str, Any]) -> int:
    heads = next((values[n] for n in ATTENTION_HEADS if isinstance(values.get(n), int)), value)
    if value >= heads:
        return 2 if heads == 3 else min(heads, HEADS)
    return min(value, 2)


def consistent(new: dict[str, Any], old: Mapping[str, Any], wide: int) -> None:
    """Relations between sizes that the table cannot know."""
    if wide <= HIDDEN:
        return
    expand = old.get("expand") or old.get("mamba_expand")
    for heads, dim in STATES:
        if heads in new and dim in new and expand:
            new[heads] = (new.get("mamba_d_ssm") or HIDDEN * expand) // new[dim]
    for name, like in SAME:
        if name in new and like in new and old[name] and old[name] == old[like]:
            new[name] = new[like]
    if isinstance(old.get("num_layers_per_stack"), int) and "H_cycles" in old:
        new["num_hidden_layers"] = new["num_layers_per_stack"] * old["H_cycles"] * (old["L_cycles"] + 1)
    if isinstance(old.get("attention_hidden_size"), int):
        new["attention_hidden_size"] = old["attention_hidden_size"] * HIDDEN // wide
    if old.get("num_kv_shared_layers"):
        new["num_kv_shared_layers"] = 1


def special_tokens(config: Any, old: Mapping[str, Any]) -> None:
    """Token ids past the small vocabulary move to its end, out of the way of the ids `check` uses."""
    vocab = vars(config).get("vocab_size", VOCAB)
    if not isinstance(vocab, int):
        return
    for name, value in old.items():
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= vocab:
            setattr(config, name, vocab - 1 - value % 16)
        elif name.endswith("_token_id") and isinstance(value, list):
            setattr(config, name, [v if v < vocab else vocab - 1 - v % 16 for v in value])


def rope(config: Any, wide: int) -> None:
    """Lists with one number per rotary frequency, cut to the small head."""
    values = vars(config)
    for holder in rope_tables(values.get("rope_parameters")):
        partial = holder.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
        half = int(values.get("qk_rope_head_dim") or (values.get("head_dim") or HEAD) * partial) // 2
        for name in FACTORS:
            if isinstance(holder.get(name), list):
                holder[name] = holder[name][:half]
        section = holder.get("mrope_section")
        if section and wide > HIDDEN:
            shares = [half * s // sum(section) for s in section]
            holder["mrope_section"] = [half - sum(shares[1:]), *shares[1:]]


def rope_tables(value: Any) -> Iterable[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from rope_tables(inner)
