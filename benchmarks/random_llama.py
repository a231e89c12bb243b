"""A checkpoint of random weights in a Llama's shape, a shard for each layer: what speed is measured on."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fewbit.files.shard import Part, write_shard

COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {  # Llama 3.1
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "1.1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000, "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
    },
}  # fmt: skip


def shapes(config: dict[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each shard: everything else, then one layer each."""
    h, i, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = (config[n] * config["head_dim"] for n in ("num_attention_heads", "num_key_value_heads"))
    out: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (vocab, h), "lm_head.weight": (vocab, h), "model.norm.weight": (h,)}
    ]
    for n in range(config["num_hidden_layers"]):
        p = f"model.layers.{n}."
        out.append({
            p + "self_attn.q_proj.weight": (q, h), p + "self_attn.k_proj.weight": (kv, h),
            p + "self_attn.v_proj.weight": (kv, h), p + "self_attn.o_proj.weight": (h, q),
            p + "mlp.gate_proj.weight": (i, h), p + "mlp.up_proj.weight": (i, h), p + "mlp.down_proj.weight": (h, i),
            p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,),
        })  # fmt: skip
    return out


def make(folder: Path, shape: str, layers: int | None = None, device: str = "cpu") -> Path:
    """The model, if it is not there yet: every shard by a thread, synced, so that nothing is left to be written."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    held = shapes(config)
    names = [f"model-{n:05d}-of-{len(held):05d}.safetensors" for n in range(1, len(held) + 1)]

    def shard(n: int) -> None:
        generator = torch.Generator(device).manual_seed(n)
        parts = {key: Part("BF16", shape, partial(noise, shape, generator)) for key, shape in held[n].items()}
        write_shard(folder / names[n], parts)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(shard, range(len(held))))
    index = {key: name for name, tensors in zip(names, held, strict=True) for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(COMMON | config))
    return folder


def noise(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    found = torch.randn(shape, generator=generator, device=generator.device)
    return (found.mul_(shape[-1] ** -0.5) if len(shape) == 2 else 1 + 0.1 * found).bfloat16()
