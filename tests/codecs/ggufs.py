"""Tiny GGUF files: one of every architecture, and ways to tamper with one."""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.codecs import gguf
from fewbit.files.gguf import GGML_IDS, GGML_TYPES, open_gguf
from fewbit.files.writer import GGUFWriter
from fewbit.quant.qtensor import Quantized

VOCAB = 320
BASE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROPE = {"rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
DEEPSEEK = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 32, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 64,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)],
}  # fmt: skip
GEMMA = {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32}
# model_type, and what is special: "llama+bias" is a llama whose linears have biases
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama+bias": {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "llama+llama3": {"rope_parameters": {"rope_type": "llama3", **ROPE, **LLAMA3}, "head_dim": 64},
    "llama+linear": {"rope_parameters": {"rope_type": "linear", **ROPE}},
    "llama+yarn": {"rope_parameters": {"rope_type": "yarn", **ROPE, "original_max_position_embeddings": 64}},
    "mistral": {"sliding_window": None},
    "mixtral": LOCAL,
    "granite": {
        "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 2.0,
    },
    "qwen2": {},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 64},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {**MOE, "head_dim": 32, "norm_topk_prob": True},
    "gemma": {"head_dim": 32},
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "num_hidden_layers": 7},
    "phi3": {},
    "phi3+long": {"rope_parameters": LONG, "original_max_position_embeddings": 64},
    "starcoder2": {"sliding_window": None},
    "stablelm": {},
    "stablelm+norms": {"qk_layernorm": True, "use_qkv_bias": True, "use_parallel_residual": True},
    "olmo2": {},
    "glm4": {"head_dim": 16},
    "deepseek_v2": {**DEEPSEEK, "topk_method": "greedy", "routed_scaling_factor": 1.5},
    "deepseek_v3": DEEPSEEK,
    "gpt_oss": {**LOCAL, "head_dim": 32, "sliding_window": 16},
}  # fmt: skip


def alphabet() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes with."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    return [chr(b if b in plain else next(shifted)) for b in range(256)]


@cache
def tokenizer() -> dict[str, bytes]:
    """A byte-level BPE of VOCAB pieces."""
    pieces = ["<pad>", "<s>", "</s>", *alphabet()]
    merges = [["Ġ", "t"], ["h", "e"], ["Ġt", "he"], ["i", "n"], ["e", "r"], ["1", "2"]]
    pieces += ["".join(merge) for merge in merges]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": p, **plain, "special": True} for i, p in enumerate(pieces[:3])]
    added += [{"id": len(pieces), "content": "<think>", **plain, "special": False}]
    pre = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {p: i for i, p in enumerate(pieces)}, "merges": merges}
    data = {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": pre, "model": model}
    data |= {"post_processor": None, "decoder": {"type": "ByteLevel"}}
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": "{{ messages }}"}
    return {"tokenizer.json": json.dumps(data).encode(), "tokenizer_config.json": json.dumps(config).encode()}


@cache
def saved(name: str) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    """A tiny random model: its config.json, its tensors under the names on disk, and itself."""
    import tempfile

    from safetensors.torch import load_file
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[name.split("+")[0]](**{**BASE, **MODELS[name]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for path, p in model.named_parameters():
            p.normal_(0, 0.1) if p.dim() > 1 or "bias" in path else p.add_(torch.randn_like(p) / 10)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        text = json.loads((Path(folder) / "config.json").read_text())
        return text, load_file(Path(folder) / "model.safetensors"), model


def layout_of(tensors: Mapping[str, Tensor | Quantized]) -> dict[str, Any]:
    return {
        name: (t.format, t.weight.shape) if isinstance(t, Quantized) else ("F32", tuple(t.shape))
        for name, t in tensors.items()
    }


def write(
    path: Path,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor | Quantized],
    files: Mapping[str, bytes] | None = None,
) -> Path:
    with gguf.create(path, config, layout_of(tensors), files or tokenizer()) as sink:
        for name, tensor in reversed(tensors.items()):
            sink.put(name, tensor)
    return path


LLAMA = {
    **BASE, "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


def llama(path: Path, **changes: Any) -> Path:
    """A random Llama, written without transformers."""
    config = LLAMA | changes
    h, i, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    g = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,), "lm_head.weight": (v, h)}
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        shapes |= {f"{p}self_attn.{n}_proj.weight": (h // (1 if n in "qo" else 2), h) for n in "qkvo"}
        shapes |= {f"{p}mlp.{n}_proj.weight": (i, h) for n in ("gate", "up")} | {f"{p}mlp.down_proj.weight": (h, i)}
        shapes |= {f"{p}{n}_layernorm.weight": (h,) for n in ("input", "post_attention")}
    return write(path, config, {n: torch.randn(s, generator=g) / 8 for n, s in shapes.items()})


Kv = dict[str, tuple[str, Any]]
Raw = dict[str, tuple[str, Tensor]]  # name -> (ggml type, raw bytes or values)


def rewrite(source: Path, out: Path, change: Callable[[Kv, Raw], None]) -> Path:
    """The same file with other metadata or tensors."""
    with open_gguf(source) as file:
        kv = file.typed_kv()
        tensors: Raw = {}
        shapes = {name: t.shape for name, t in file.tensors.items()}
        for name, t in file.tensors.items():
            tensors[name] = t.type_name, file.read(name)
    change(kv, tensors)
    declared = {}
    for name, (kind, data) in tensors.items():
        shape = shapes[name] if data.dtype == torch.uint8 and name in shapes else tuple(data.shape)
        if data.dtype == torch.uint8 and name not in shapes:
            _, weights, nbytes = GGML_TYPES[GGML_IDS[kind]]
            shape = (*shape[:-1], shape[-1] // nbytes * weights)
        declared[name] = GGML_IDS[kind], shape
    with GGUFWriter(out, kv, declared, overwrite=True) as writer:
        for name, (_, data) in tensors.items():
            writer.put(name, data)
    return out
