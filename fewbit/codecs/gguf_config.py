"""A Hugging Face config.json rebuilt from GGUF metadata, one row per architecture, and the checks that catch a lie.

Every key is read with the type it must have, and sizes are compared with the tensors that are there, so that what
leaves here describes the file.
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fewbit.codecs.gguf_names import split_name
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.files.gguf import GGUFFile

Config = dict[str, Any]
SIZES = ("u8", "u16", "u32", "u64", "i8", "i16", "i32", "i64")
REALS = ("f32", "f64")
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


def shortest(value: float) -> float:
    """The decimal with the fewest digits that is this float32: what was meant before it was stored as one."""
    digits = (float(f"{value:.{n}g}") for n in range(1, 10))
    return next(d for d in digits if struct.pack("<f", d) == struct.pack("<f", value))


class Metadata:
    """The metadata of one file, read with types; every complaint names the file and the key."""

    def __init__(self, file: GGUFFile):
        self.file = file
        self.arch = str(file.kv_value("general.architecture", "string"))

    def key(self, name: str) -> str:
        return f"{self.arch}.{name}"

    def __contains__(self, name: str) -> bool:
        return self.key(name) in self.file.kv

    def refuse(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: key {self.key(name)!r}: {why}")

    def number(self, name: str) -> int | float:
        """A finite number from 0, or a bool; the one value of a list that repeats it for each layer."""
        plain = (*SIZES, *REALS, "bool")
        held = self.file.kv_value(self.key(name), *plain, *(f"[{kind}]" for kind in plain))
        values: list[int | float] = held if isinstance(held, list) else [held]
        if len(set(values)) > 1:
            why = f"{self.file.path}: key {self.key(name)!r}: {values[:8]} differs from layer to layer"
            raise UnsupportedError(why, ["models whose layers are all of one size are read"])
        if not values or not math.isfinite(values[0]) or values[0] < 0:
            raise self.refuse(name, f"{held} is not a finite number from 0")
        return shortest(values[0]) if "f32" in self.file.kinds[self.key(name)] else values[0]

    def size(self, name: str) -> int:
        value = self.number(name)
        if value < 1 or value != int(value):
            raise self.refuse(name, f"{value} is not a count from 1")
        return int(value)

    def get(self, name: str, default: Any = None) -> Any:
        return self.number(name) if name in self else default

    def has(self, leaf: str) -> bool:
        """True when some layer holds this tensor."""
        return any(n.endswith(f".{leaf}") and n.startswith("blk.") for n in self.file.tensors)


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
    factors = {kind: _floats(meta, f"rope_factors_{kind}.weight") for kind in ("short", "long")}
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
    config |= _rope_scaling(config, meta)
    if file.info("token_embd.weight").type_name == "BF16":
        config["dtype"] = "bfloat16"
    row.finish(config, meta)
    _check(config, meta)
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
    out: Config = {}
    for word, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        key = f"tokenizer.ggml.{name}_token_id"
        value = meta.file.kv.get(key)
        out[f"{word}_token_id"] = value if isinstance(value, int) and 0 <= value < size else None
    return out


def _rope_scaling(config: Config, meta: Metadata) -> Config:
    kind = meta.file.kv.get(meta.key("rope.scaling.type"), "none")
    factors = _floats(meta, "rope_freqs.weight")
    if factors is not None and any(f != 1.0 for f in factors):
        return {"rope_scaling": llama3_scaling(factors, float(config.get("rope_theta", 10000.0)), meta)}
    if kind == "linear" or "rope.scale_linear" in meta:
        factor = meta.get("rope.scaling.factor", meta.get("rope.scale_linear"))
        return {"rope_scaling": {"rope_type": "linear", "factor": float(factor)}} if factor not in (None, 0, 1) else {}
    if kind == "yarn":
        original = meta.get("rope.scaling.original_context_length", config["max_position_embeddings"])
        yarn = {"rope_type": "yarn", "factor": float(meta.number("rope.scaling.factor"))}
        return {"rope_scaling": {**yarn, "original_max_position_embeddings": int(original)}}
    if kind not in ("none", "longrope"):
        raise meta.refuse("rope.scaling.type", f"{kind!r} is not known; known: none, linear, yarn, longrope")
    return {}


def _floats(meta: Metadata, tensor: str) -> list[float] | None:
    if tensor not in meta.file.tensors:
        return None
    if meta.file.info(tensor).type_name != "F32":
        raise CheckpointError(f"{meta.file.path}: tensor {tensor!r}: is {meta.file.info(tensor).type_name}, not F32")
    values: list[float] = meta.file.read(tensor).view(torch.float32).flatten().tolist()
    return values


def llama3_factors(count: int, theta: float, scaling: Mapping[str, Any]) -> torch.Tensor:
    """What Llama 3 divides each rotary frequency by: 1 for short waves, `factor` for long ones, smooth between."""
    frequency = torch.exp(torch.arange(count, dtype=torch.float64) * (-math.log(theta) / count))
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high, factor = (float(scaling[k]) for k in ("low_freq_factor", "high_freq_factor", "factor"))
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return torch.reciprocal((1 - smooth) / factor + smooth)


def llama3_scaling(factors: list[float], theta: float, meta: Metadata) -> Config:
    """The scaling parameters behind a table of factors. Only ratios to the original context can be told."""
    table = torch.tensor(factors, dtype=torch.float64)
    for original in (8192, 4096, 2048, 16384, 32768, 131072):
        scaling = {"rope_type": "llama3", "factor": float(round(table.max().item(), 4)), "low_freq_factor": 1.0}
        scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": original}
        if torch.allclose(llama3_factors(len(factors), theta, scaling), table, rtol=1e-4):
            return scaling
    why = f"{table.tolist()[:4]} ... are no factors that Llama 3's rule makes"
    raise CheckpointError(f"{meta.file.path}: tensor 'rope_freqs.weight': {why}")


def _check(config: Config, meta: Metadata) -> None:
    """Heads and sizes against one another, and against the tensors of every layer."""
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    if kv < 1 or heads % kv:
        raise meta.refuse("attention.head_count_kv", f"{kv} does not divide {heads} heads")
    if "head_dim" not in config and config["hidden_size"] % heads:
        raise meta.refuse("attention.head_count", f"{heads} does not divide {config['hidden_size']}")
    if config.get("head_dim", 2) % 2:
        raise meta.refuse("attention.key_length", f"{config['head_dim']} is odd, and rotary pairs are not")
    _check_layers(config["num_hidden_layers"], meta)
    for name, tensor in meta.file.tensors.items():
        parts = split_name(name)
        if parts and parts[2] == "weight" and (parts[0] is None or parts[0] < config["num_hidden_layers"]):
            _check_shape(name, parts[1], tensor.shape, config, meta)


def _check_layers(count: int, meta: Metadata) -> None:
    parts = (split_name(name) for name in meta.file.tensors)
    found = {part[0] for part in parts if part and part[0] is not None}
    lacking = [i for i in range(count) if i not in found]
    extra = sorted(i for i in found if i >= count + int(meta.get("nextn_predict_layers", 0)))
    if lacking or extra:
        what = f"no tensor of blk.{lacking[0]} is there" if lacking else f"tensors of blk.{extra[0]} are there"
        raise meta.refuse("block_count", f"{count}, and {what}")


def _check_shape(name: str, leaf: str, shape: tuple[int, ...], config: Config, meta: Metadata) -> None:
    hidden, size = (
        config["hidden_size"],
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
    )
    heads, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    mla = meta.arch == "deepseek2"
    experts = config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts")
    width = config.get("moe_intermediate_size") or config.get("intermediate_size")
    want: dict[str, tuple[tuple[Any, ...], str]] = {
        "token_embd": ((config["vocab_size"], hidden), "embedding_length"),
        "attn_q": ((heads, hidden), "attention.head_count"),
        "attn_k": ((kv, hidden), "attention.head_count_kv"),
        "attn_v": ((kv, hidden), "attention.head_count_kv"),
        "attn_output": ((hidden, heads), "attention.head_count"),
        "ffn_down": ((hidden, config.get("intermediate_size")), "feed_forward_length"),
        "ffn_down_exps": ((experts, hidden, width), "expert_count"),
    }
    if leaf not in want or (mla and leaf.startswith("attn_")):
        return
    expected, key = want[leaf]
    if shape != expected:
        raise meta.refuse(key, f"tensor {name!r} is {list(shape)}, and the metadata says {list(expected)}")
