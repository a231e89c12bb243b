"""ModelOpt's exports for fakequant serving: float weights as they were trained, and the state of all quantizers.

Keys and values are in the state as everything else is, and so is what each quantizer does: a model of several formats
is served as it was trained. From Megatron's side a state dict of a whole GPT is taken apart into HF's names.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.compat.collect import STATE
from fewbit.compat.fakequant_ask import Asked, static, wish
from fewbit.compat.fakequant_state import State, normalized, state_of
from fewbit.compat.fakequant_write import files_of
from fewbit.compat.insert import quantizers, weights
from fewbit.compat.modelopt_config import Rounding
from fewbit.errors import CheckpointError, RequestError
from fewbit.files.writer import SafetensorsWriter
from fewbit.models import hf
from fewbit.workflows.convert import ON_DISK
from fewbit.workflows.export import small_files


def export_hf_vllm_fq_checkpoint(model: Any, export_dir: str | Path, *, dtype: torch.dtype | None = None,
                                 max_shard_size: int = 10_000_000_000, overwrite: bool = False) -> None:  # fmt: skip
    """A folder that `fewbit serve DIR --amax-file DIR` serves as the model now computes. A tokenizer is left alone."""
    if not any(True for _ in weights(model)) and not quantizers(model):
        raise RequestError("nothing of the model is quantized; save_pretrained writes it as it is")
    found = {n: Rounding(q.spec, affine=q.affine, turned=q.turned, outer=q.outer)
             for n, q in quantizers(model).items() if q.enabled and q.spec is not None}  # fmt: skip
    dense = {n: t for n, t in hf.disk_state(model).items() if not any(part in n for part in STATE)}
    tensors = {n: t.to(dtype) if dtype is not None and t.is_floating_point() else t for n, t in dense.items()}
    files = small_files(model, {}, dtype) | files_of(state_of(model), found)
    written(export_dir, tensors, files, max_shard_size, overwrite)


def written(out: str | Path, tensors: Mapping[str, Tensor], files: Mapping[str, bytes], max_shard: int,
            overwrite: bool) -> None:  # fmt: skip
    layout = {name: (ON_DISK[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    with SafetensorsWriter(out, layout, max_shard=max_shard, overwrite=overwrite) as writer:
        for name, data in files.items():
            writer.add_file(name, data)
        for name, tensor in tensors.items():
            writer.put(name, tensor.detach().cpu().contiguous())


def export_mcore_gpt_to_hf_vllm_fq(state: Mapping[str, Any], config: Mapping[str, Any], export_dir: str | Path, *,
                                   quant_cfg: Asked = None, max_shard_size: int = 10_000_000_000,
                                   overwrite: bool = False) -> None:  # fmt: skip
    """state: of a whole Megatron GPT, by its names. config: of the model in HF's words, as config.json has it.

    quant_cfg: what the quantizers do, where that is to be in the file too; else whoever serves it says so.
    """
    flat = normalized({name: t for name, t in state.items() if isinstance(t, Tensor)})
    weights: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for name, tensor in flat.items():
        (kept if "quantizer." in name else weights).update(mapped(name, tensor, config))
    files = {"config.json": (json.dumps(dict(config), indent=2) + "\n").encode()}
    held = {key: t.detach().cpu().clone().contiguous() for key, t in kept.items()}
    written(export_dir, weights, files | files_of(held, roundings(quant_cfg, config, held)), max_shard_size, overwrite)


def roundings(quant_cfg: Asked, config: Mapping[str, Any], state: State) -> Mapping[str, Rounding]:
    """What a config says of the model that the HF config describes, as far as the state knows it."""
    if quant_cfg is None:
        return {}
    from types import SimpleNamespace

    from fewbit.models import hf
    from fewbit.models.layers import Layers

    empty = SimpleNamespace(modules={}, dense={}, kv={})
    return static(wish(quant_cfg, None, Layers(empty, config=hf.read_config(config), plain=True)))


HEADS = re.compile(r"self_attention\.linear_qkv\.(.+)")
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
OUTSIDE = {"embedding.word_embeddings.weight": "model.embed_tokens.weight", "output_layer.weight": "lm_head.weight",
           "decoder.final_layernorm.weight": "model.norm.weight"}  # fmt: skip
RENAMED = (  # of a layer, in the order tried
    (r"self_attention\.linear_qkv\.layer_norm_weight$", "input_layernorm.weight"),
    (r"input_layernorm\.weight$", "input_layernorm.weight"),
    (r"mlp\.linear_fc1\.layer_norm_weight$", "post_attention_layernorm.weight"),
    (r"pre_mlp_layernorm\.weight$", "post_attention_layernorm.weight"),
    (r"self_attention\.([qk])_layernorm\.weight$", r"self_attn.\1_norm.weight"),
    (r"self_attention\.core_attention\.([qkv]_bmm_quantizer\..+)", r"self_attn.\1"),
    (r"self_attention\.linear_proj\.(.+)", r"self_attn.o_proj.\1"),
    (r"mlp\.router\.weight$", "mlp.gate.weight"),
    (r"mlp\.experts\.local_experts\.(\d+)\.linear_fc2\.(.+)", r"mlp.experts.\1.down_proj.\2"),
    (r"mlp\.linear_fc2\.(.+)", r"mlp.down_proj.\1"),
)  # fmt: skip
HALVES = re.compile(r"mlp\.(experts\.)?(?:local_experts\.(\d+)\.)?linear_fc1\.(.+)")


def mapped(name: str, tensor: Tensor, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """One of Megatron's tensors by HF's names; several where HF has several."""
    if name.endswith("_extra_state"):
        return {}
    if name in OUTSIDE:
        cut = tensor[: config["vocab_size"]] if OUTSIDE[name] != "model.norm.weight" else tensor  # rows are filled up
        return {OUTSIDE[name]: cut}
    if not (match := LAYER.fullmatch(name)):
        raise CheckpointError(f"{name}: no name of a Megatron GPT that has a place in HF's")
    prefix, rest = f"model.layers.{match[1]}", match[2]
    for pattern, to in RENAMED:
        if re.fullmatch(pattern, rest):
            return {f"{prefix}.{re.sub(pattern, to, rest)}": tensor}
    if found := HEADS.fullmatch(rest):
        pieces: Sequence[Tensor] = heads(name, tensor, config) if per_row(found[1], tensor) else (tensor,) * 3
        return {f"{prefix}.self_attn.{leaf}_proj.{found[1]}": t for leaf, t in zip("qkv", pieces, strict=True)}
    if found := HALVES.fullmatch(rest):
        host = f"{prefix}.mlp.experts.{found[2]}" if found[2] else f"{prefix}.mlp"
        pieces = tensor.chunk(2) if per_row(found[3], tensor) else (tensor,) * 2
        return {f"{host}.{leaf}_proj.{found[3]}": t for leaf, t in zip(("gate", "up"), pieces, strict=True)}
    raise CheckpointError(f"{name}: no name of a Megatron GPT that has a place in HF's")


def per_row(leaf: str, tensor: Tensor) -> bool:
    """Whether a tensor of a fused linear has a part for each of its outputs."""
    return leaf in ("weight", "bias") or (leaf.startswith("weight_quantizer.") and tensor.numel() > 1)


def heads(name: str, tensor: Tensor, config: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of q, k and v, which Megatron keeps by groups: the queries of a key head, the key head, its values."""
    count = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or count
    size = config.get("head_dim") or config["hidden_size"] // count
    rows = (count + 2 * groups) * size
    if len(tensor) % rows:
        raise CheckpointError(f"{name}: {len(tensor)} rows, and the config has {count} heads over {groups} of {size}")
    by_group = tensor.reshape(groups, count // groups + 2, -1, *tensor.shape[1:])
    parts = by_group[:, :-2], by_group[:, -2:-1], by_group[:, -1:]
    q, k, v = (part.reshape(-1, *tensor.shape[1:]) for part in parts)
    return q, k, v
