"""Sizes that metadata claims, against one another and against the tensors of every layer."""

from typing import Any

from fewbit.codecs.gguf_keys import Metadata
from fewbit.codecs.gguf_names import split_name

Config = dict[str, Any]


def check_sizes(config: Config, meta: Metadata) -> None:
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
