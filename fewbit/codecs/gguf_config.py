"""A Hugging Face config.json rebuilt from GGUF metadata, one row per architecture, and the checks that catch a lie.

Every key is read with the type it must have, and sizes are compared with the tensors that are there, so that what
leaves here describes the file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fewbit.codecs.gguf_keys import Metadata, floats
from fewbit.codecs.gguf_rope import rope_scaling
from fewbit.codecs.gguf_sizes import check_sizes
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.files.gguf import GGUFFile

Config = dict[str, Any]
COMMON = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
MORE = {  # read where the file has them
    "attention.head_count_kv": "num_key_value_heads",
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
LOCAL_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
WINDOW = {"attention.sliding_window": "sliding_window"}
CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}


@dataclass(frozen=True, slots=True)
class Row:
    """One architecture: its model_type, the keys it has beside the common ones, and what takes more than a name."""

    model_type: str
    architecture: str
    keys: Mapping[str, str] = field(default_factory=dict)
    finish: Callable[[Config, Metadata], None] = lambda config, meta: None
    fixed: Mapping[str, Any] = field(default_factory=dict)  # what the architecture implies and the file does not say
    head_dim: bool = True  # the config has a head_dim


def _llama(config: Config, meta: Metadata) -> None:
    config |= {"attention_bias": meta.has("attn_q.bias"), "mlp_bias": meta.has("ffn_down.bias")}
    if meta.get("expert_count", 0):
        for leftover in ("attention_bias", "mlp_bias"):
            config.pop(leftover)
        config |= {name: meta.size(key) for key, name in LOCAL_EXPERTS.items()}
        config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "sliding_window": None}


def _qwen_moe(config: Config, meta: Metadata) -> None:
    config["moe_intermediate_size"] = _expert_size(meta, "expert_feed_forward_length", "ffn_down_exps.weight")
    if meta.has("ffn_down_shexp.weight"):
        size = _expert_size(meta, "expert_shared_feed_forward_length", "ffn_down_shexp.weight")
        config["shared_expert_intermediate_size"] = size


def _expert_size(meta: Metadata, key: str, leaf: str) -> int:
    """From the key, or from the tensor where older files have no key."""
    if key in meta:
        return meta.size(key)
    found = next((t for name, t in meta.file.tensors.items() if name.endswith(f".{leaf}")), None)
    if found is None:
        raise meta.refuse(key, f"is missing, and so is every {leaf}")
    return found.shape[-1]


def _gemma(config: Config, meta: Metadata) -> None:
    """The scale of attention is not in the file: ggml knows the two 27B models by their depth."""
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    deep = {"gemma2": 46, "gemma3": 62}.get(meta.arch) == layers
    config["query_pre_attn_scalar"] = config["hidden_size"] // heads if deep else config["head_dim"]


def _gemma3(config: Config, meta: Metadata) -> None:
    _gemma(config, meta)
    config["rope_local_base_freq"] = meta.get("rope.freq_base_swa", 10000.0)
    config.setdefault("rope_theta", 1000000.0)


def _partial_rotary(config: Config, meta: Metadata) -> None:
    head = config["hidden_size"] // config["num_attention_heads"]
    head = config.get("head_dim", head)
    config["partial_rotary_factor"] = meta.get("rope.dimension_count", head) / head


def _phi3(config: Config, meta: Metadata) -> None:
    _partial_rotary(config, meta)
    original = meta.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    config["original_max_position_embeddings"] = int(original)
    config["sliding_window"] = config.get("sliding_window") or None
    factors = {kind: floats(meta, f"rope_factors_{kind}.weight") for kind in ("short", "long")}
    if factors["short"] and factors["long"]:
        config["rope_scaling"] = {"rope_type": "longrope"}
        config["rope_scaling"] |= {f"{kind}_factor": values for kind, values in factors.items()}


def _stablelm(config: Config, meta: Metadata) -> None:
    _partial_rotary(config, meta)
    config["use_qkv_bias"] = meta.has("attn_q.bias")
    config["qk_layernorm"] = meta.has("attn_q_norm.weight")
    config["use_parallel_residual"] = not meta.has("ffn_norm.weight")


def _glm4(config: Config, meta: Metadata) -> None:
    _partial_rotary(config, meta)
    config["attention_bias"] = meta.has("attn_q.bias")


def _starcoder2(config: Config, meta: Metadata) -> None:
    config["use_bias"] = meta.has("attn_q.bias")
    config["sliding_window"] = None


def _bias(config: Config, meta: Metadata) -> None:
    config["attention_bias"] = meta.has("attn_q.bias")


def _gpt_oss(config: Config, meta: Metadata) -> None:
    if "expert_feed_forward_length" in meta:
        config["intermediate_size"] = meta.size("expert_feed_forward_length")
    if "rope_scaling" in config:
        config["rope_scaling"] |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}


def _deepseek2(config: Config, meta: Metadata) -> None:
    rotary = meta.size("rope.dimension_count")
    mla = "_mla" if "attention.key_length_mla" in meta else ""
    config |= {
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": meta.size(f"attention.key_length{mla}") - rotary,
        "v_head_dim": meta.size(f"attention.value_length{mla}"),
        "num_key_value_heads": config["num_attention_heads"],
        "norm_topk_prob": bool(meta.get("expert_weights_norm", False)),
        "n_group": int(meta.get("expert_group_count", 1)),
        "topk_group": int(meta.get("expert_group_used_count", 1)),
        "attention_bias": meta.has("attn_kv_a_mqa.bias"),
    }
    config.setdefault("q_lora_rank", None)
    if config["n_group"] > 1 and config["model_type"] == "deepseek_v2":
        config["topk_method"] = "group_limited_greedy"
    if meta.get("expert_gating_func") == 2:
        config |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
        config.pop("topk_method", None)
    if scaling := config.get("rope_scaling"):
        scaling |= {"beta_fast": 32.0, "beta_slow": 1.0}
        if "rope.scaling.yarn_log_multiplier" in meta:
            scale = round(10 * meta.number("rope.scaling.yarn_log_multiplier"), 6)
            scaling |= {"mscale": scale, "mscale_all_dim": scale}


DEEPSEEK_KEYS = {
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_shared_count": "n_shared_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_weights_scale": "routed_scaling_factor",
}
GRANITE_KEYS = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.scale": "attention_multiplier",
    "logit_scale": "logits_scaling",
}
EPSILON = {"attention.layer_norm_epsilon": "layer_norm_eps"}
ROWS: dict[str, Row] = {
    "llama": Row("llama", "LlamaForCausalLM", finish=_llama),
    "granite": Row("granite", "GraniteForCausalLM", GRANITE_KEYS, _bias, head_dim=False),
    "qwen2": Row("qwen2", "Qwen2ForCausalLM", head_dim=False),
    "qwen2moe": Row("qwen2_moe", "Qwen2MoeForCausalLM", EXPERTS, _qwen_moe, {"norm_topk_prob": False}, False),
    "qwen3": Row("qwen3", "Qwen3ForCausalLM", finish=_bias),
    "qwen3moe": Row("qwen3_moe", "Qwen3MoeForCausalLM", EXPERTS, _qwen_moe, {"norm_topk_prob": True}),
    "gemma": Row("gemma", "GemmaForCausalLM"),
    "gemma2": Row("gemma2", "Gemma2ForCausalLM", WINDOW | CAPS, _gemma),
    "gemma3": Row("gemma3_text", "Gemma3ForCausalLM", WINDOW | CAPS, _gemma3),
    "phi3": Row("phi3", "Phi3ForCausalLM", WINDOW, _phi3, head_dim=False),
    "starcoder2": Row(
        "starcoder2", "Starcoder2ForCausalLM", {"attention.layer_norm_epsilon": "norm_epsilon"}, _starcoder2,
        head_dim=False,
    ),
    "stablelm": Row("stablelm", "StableLmForCausalLM", EPSILON, _stablelm, head_dim=False),
    "olmo2": Row("olmo2", "Olmo2ForCausalLM", finish=_bias, head_dim=False),
    "glm4": Row("glm4", "Glm4ForCausalLM", finish=_glm4),
    "deepseek2": Row(
        "deepseek_v2", "DeepseekV2ForCausalLM", DEEPSEEK_KEYS, _deepseek2, {"topk_method": "greedy"}, False
    ),
    "gpt-oss": Row("gpt_oss", "GptOssForCausalLM", LOCAL_EXPERTS | WINDOW, _gpt_oss),
}  # fmt: skip


def architecture(file: GGUFFile) -> str:
    """general.architecture, if there is a row for it."""
    arch = Metadata(file).arch
    if arch not in ROWS:
        known = [f"known: {', '.join(sorted(ROWS))}"]
        raise UnsupportedError(f"{file.path}: key 'general.architecture': {arch!r} is not read", known)
    return arch


def config_of(file: GGUFFile) -> Config:
    """The config.json that a GGUF file stands for."""
    row, meta = ROWS[architecture(file)], Metadata(file)
    config: Config = {"architectures": [row.architecture], "model_type": row.model_type, **row.fixed}
    config |= {name: meta.size(key) for key, name in COMMON.items() if key in meta or key != "feed_forward_length"}
    config |= {name: meta.number(key) for key, name in {**MORE, **row.keys}.items() if key in meta}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    if row.head_dim:
        config["head_dim"] = _head_dim(config, meta)
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config["vocab_size"] = _vocabulary(meta)
    config |= _special_tokens(meta, config["vocab_size"])
    config |= rope_scaling(config, meta)
    if file.info("token_embd.weight").type_name == "BF16":
        config["dtype"] = "bfloat16"
    row.finish(config, meta)
    check_sizes(config, meta)
    return config


def _head_dim(config: Config, meta: Metadata) -> int:
    for key in ("attention.key_length", "rope.dimension_count"):
        if key in meta and (key != "rope.dimension_count" or meta.arch == "llama"):
            return meta.size(key)
    return int(config["hidden_size"]) // int(config["num_attention_heads"])


def _vocabulary(meta: Metadata) -> int:
    """Rows of the embedding, which the vocabulary and its declared size must agree with."""
    rows = meta.file.info("token_embd.weight").shape[0]
    tokens = meta.file.kv.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > rows:
        why = f"{len(tokens)} pieces, and token_embd.weight has {rows} rows"
        raise CheckpointError(f"{meta.file.path}: key 'tokenizer.ggml.tokens': {why}")
    if "vocab_size" in meta and meta.size("vocab_size") != rows:
        raise meta.refuse("vocab_size", f"{meta.size('vocab_size')}, and token_embd.weight has {rows} rows")
    return rows


def _special_tokens(meta: Metadata, size: int) -> Config:
    def number(name: str) -> int | None:
        value = meta.file.kv.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) and 0 <= value < size else None

    eos, turn = number("eos"), number("eot")  # a text ends with the one, a turn of a chat with the other
    ends = [eos, turn] if None not in (eos, turn) and eos != turn else eos
    return {"bos_token_id": number("bos"), "eos_token_id": ends, "pad_token_id": number("padding")}
