"""GGUF metadata from a Hugging Face config.json: gguf_config the other way round.

What an architecture of ggml cannot be told (a window it has not, a pattern of layers it fixes) is refused, since the
written file would compute something else.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fewbit.codecs.gguf_config import COMMON, MORE, ROWS
from fewbit.codecs.gguf_rope import llama3_factors
from fewbit.errors import CheckpointError, UnsupportedError

Config = Mapping[str, Any]
Values = dict[str, Any]
TypedKv = dict[str, tuple[str, Any]]
ARCHITECTURES = {row.model_type: arch for arch, row in ROWS.items()} | {
    "mistral": "llama", "mixtral": "llama", "deepseek_v3": "deepseek2",
}  # fmt: skip
THETA = {"gemma3": 1000000.0, "gpt-oss": 150000.0}  # where a config.json leaves it out; elsewhere 10000
ROTARY = {"stablelm": 0.25, "glm4": 0.5}
PERIODS = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2}  # every n-th layer attends to everything


COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # one number, three names in config.json


def _value(config: Config, name: str) -> Any:
    names = (name, *COUNTS) if name in COUNTS else (name,)
    return next((config[n] for n in names if config.get(n) is not None), None)


def metadata_of(config: Config, arch: str, vocab: int) -> TypedKv:
    """Everything but the tokenizer."""
    _refuse_unsayable(config, arch)
    values: Values = {}
    for key, name in {**COMMON, **MORE, **ROWS[arch].keys}.items():
        value = _theta(config, arch) if name == "rope_theta" else _value(config, name)
        if name == "num_key_value_heads" and value is None:
            value = config.get("num_attention_heads")
        if value is None and key in COMMON:
            raise CheckpointError(f"config.json: {name} is missing")
        if value is not None:
            values[key] = value
    values |= _rope(config) | EXTRA.get(arch, _heads)(config)
    values.setdefault("vocab_size", vocab)
    general: TypedKv = {"general.architecture": ("string", arch), "general.type": ("string", "model")}
    general |= {"general.quantization_version": ("u32", 2)}
    return general | {f"{arch}.{key}": _typed(value) for key, value in values.items()}


def _typed(value: Any) -> tuple[str, Any]:
    if isinstance(value, bool):
        return "bool", value
    if isinstance(value, int):
        return "u32", value
    return ("f32", float(value)) if isinstance(value, float) else ("string", str(value))


def rope_parameters(config: Config, layers: str = "full_attention") -> dict[str, Any]:
    """The rotary parameters under any of the names that config.json has had for them."""
    held: Config = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found: dict[str, Any] = dict(held.get(layers) or held)
    if "rope_type" not in found and "type" in found:
        found["rope_type"] = found["type"]
    return found


def _theta(config: Config, arch: str) -> float:
    default = 1000000.0 if config.get("model_type") == "mixtral" else THETA.get(arch, 10000.0)
    return float(rope_parameters(config).get("rope_theta") or config.get("rope_theta") or default)


def head_dim(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rotary_tables(config: Config) -> dict[str, Tensor]:
    """Rotary factors that ggml keeps as tensors."""
    rope = rope_parameters(config)
    if rope.get("rope_type") == "llama3":
        theta = _theta(config, ARCHITECTURES[config["model_type"]])
        return {"rope_freqs.weight": llama3_factors(head_dim(config) // 2, theta, rope).float()}
    if rope.get("rope_type") in ("longrope", "su"):
        return {
            f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"]).float() for kind in ("long", "short")
        }
    return {}


def _rope(config: Config) -> Values:
    rope = rope_parameters(config)
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3", "longrope", "su"):
        return {}
    if kind not in ("linear", "yarn"):
        raise UnsupportedError(
            f"config.json: rope type {kind!r} cannot be said in a GGUF file", ["linear and yarn can"]
        )
    out = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if "original_max_position_embeddings" in rope:
        out["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    return out


def _heads(config: Config) -> Values:
    size = head_dim(config)
    return {"attention.key_length": size, "attention.value_length": size, "rope.dimension_count": size}


def _llama(config: Config) -> Values:
    keys = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
    return _heads(config) | {key: int(config[name]) for key, name in keys.items() if config.get(name)}


def _qwen_moe(config: Config) -> Values:
    sizes = {
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
        "expert_shared_feed_forward_length": config.get("shared_expert_intermediate_size"),
    }
    return _heads(config) | {key: size for key, size in sizes.items() if size}


def _gemma3(config: Config) -> Values:
    local = rope_parameters(config, "sliding_attention").get("rope_theta") if "rope_parameters" in config else None
    local = local or config.get("rope_local_base_freq", 10000.0)
    return _heads(config) | ({} if local == 10000.0 else {"rope.freq_base_swa": float(local)})


def _partial(config: Config, arch: str) -> Values:
    rope = rope_parameters(config)
    factor = config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or ROTARY.get(arch, 1.0)
    return _heads(config) | {"rope.dimension_count": int(head_dim(config) * factor)}


def _phi3(config: Config) -> Values:
    rope, context = rope_parameters(config), config["max_position_embeddings"]
    original = int(
        config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or context
    )
    out = _partial(config, "phi3") | {"rope.scaling.original_context_length": original}
    out["attention.sliding_window"] = config.get("sliding_window") or 0
    if rope.get("rope_type") in ("longrope", "su"):
        scale = context / original
        out["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return out


def _stablelm(config: Config) -> Values:
    return _partial(config, "stablelm") | {"use_parallel_residual": bool(config.get("use_parallel_residual", False))}


def _glm4(config: Config) -> Values:
    return _partial(config, "glm4")


def _gpt_oss(config: Config) -> Values:
    return _heads(config) | {"expert_feed_forward_length": int(config["intermediate_size"])}


def _deepseek2(config: Config) -> Values:
    rotary = int(config["qk_rope_head_dim"])
    v3 = config["model_type"] == "deepseek_v3"
    out = {
        "attention.key_length": int(config["qk_nope_head_dim"]) + rotary,
        "attention.value_length": int(config["v_head_dim"]),
        "attention.head_count_kv": int(config["num_attention_heads"]),
        "rope.dimension_count": rotary,
        "expert_gating_func": 2 if v3 else 1,
        "expert_weights_norm": bool(config.get("norm_topk_prob", v3)),
        "expert_weights_scale": float(config.get("routed_scaling_factor", 2.5 if v3 else 1.0)),
        "expert_group_count": int(config.get("n_group") or 1),
        "expert_group_used_count": int(config.get("topk_group") or 1),
    }
    if mscale := rope_parameters(config).get("mscale_all_dim"):
        out["rope.scaling.yarn_log_multiplier"] = 0.1 * float(mscale)
    return out


EXTRA: dict[str, Callable[[Config], Values]] = {
    "llama": _llama,
    "qwen2moe": _qwen_moe,
    "qwen3moe": _qwen_moe,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "stablelm": _stablelm,
    "glm4": _glm4,
    "gpt-oss": _gpt_oss,
    "deepseek2": _deepseek2,
}


def _refuse_unsayable(config: Config, arch: str) -> None:
    reasons = []
    window, context = config.get("sliding_window"), config.get("max_position_embeddings", 0)
    if (
        arch not in PERIODS
        and arch != "phi3"
        and window
        and window < context
        and config.get("use_sliding_window", True)
    ):
        reasons.append(f"sliding_window = {window}: ggml's {arch} attends to everything")
    period = PERIODS.get(arch)
    types = config.get("layer_types")
    if period and types:
        full = [i for i, kind in enumerate(types) if kind == "full_attention"]
        if full != [i for i in range(len(types)) if (i + 1) % period == 0]:
            reasons.append(f"layer_types: in ggml's {arch} every layer {period} attends to everything, and no other")
    if arch in ("gemma2", "gemma3") and (wrong := _attention_scale(config, arch)):
        reasons.append(wrong)
    if reasons:
        raise UnsupportedError(f"config.json: a GGUF file of architecture {arch!r} cannot say all of it", reasons)


def _attention_scale(config: Config, arch: str) -> str:
    deep = {"gemma2": 46, "gemma3": 62}[arch] == config["num_hidden_layers"]
    implied = config["hidden_size"] // config["num_attention_heads"] if deep else head_dim(config)
    said = config.get("query_pre_attn_scalar", 256)
    return "" if said == implied else f"query_pre_attn_scalar = {said}: ggml takes {implied} for a model of this depth"
