"""Tensor names of GGUF and of Hugging Face, one table per architecture, and what happens to values in between.

A layer's tensor is `blk.{i}.{leaf}.weight` there and `model.layers.{i}.{leaf}.weight` here. A Recipe says which GGUF
tensors make one Hugging Face tensor and how: llama's query and key rows are in the order of adjacent pairs, Gemma's
norms have 1 added, experts lie in one stack.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
MLP = {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
DEEPSEEK = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
FUSED_MLP = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}


@dataclass(frozen=True, slots=True)
class Names:
    """One architecture. `{}` in a name: one tensor for each entry of the leading axis.

    exact: leaf with its ending -> name with its ending, where the ending changes. joined: name -> (leaves, operation).
    """

    layer: Mapping[str, str]
    exact: Mapping[str, str] = field(default_factory=dict)
    joined: Mapping[str, tuple[tuple[str, ...], str]] = field(default_factory=dict)
    pairs: bool = False  # rows of q and k in the order of adjacent rotary pairs
    plus_one: bool = False  # norm weights have 1 added


_LLAMA = Names({**ATTENTION, **MLP, **MIXTRAL}, pairs=True)
_QWEN = Names({**ATTENTION, **MLP, **QK_NORMS, **EXPERTS, **SHARED})
_GEMMA = Names({**ATTENTION, **MLP}, plus_one=True)
_OLMO2 = {  # norms after attention and after the MLP, none before
    **{leaf: hf for leaf, hf in {**ATTENTION, **MLP, **QK_NORMS}.items() if leaf not in ("attn_norm", "ffn_norm")},
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
NAMES: dict[str, Names] = {
    "llama": _LLAMA,
    "granite": _LLAMA,
    "qwen2": _QWEN,
    "qwen2moe": _QWEN,
    "qwen3": _QWEN,
    "qwen3moe": _QWEN,
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, layer={**ATTENTION, **MLP, **GEMMA_NORMS}),
    "gemma3": replace(_GEMMA, layer={**ATTENTION, **MLP, **GEMMA_NORMS, **QK_NORMS}),
    "phi3": Names({**ATTENTION, **MLP, **FUSED_MLP}),
    "starcoder2": Names({**ATTENTION, **MLP, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
    "stablelm": Names(
        {
            **ATTENTION,
            **MLP,
            "attn_q_norm": "self_attn.q_layernorm.norms.{}",
            "attn_k_norm": "self_attn.k_layernorm.norms.{}",
        }
    ),
    "olmo2": Names(_OLMO2),
    "glm4": Names(
        {
            **ATTENTION,
            **MLP,
            **FUSED_MLP,
            "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
        }
    ),
    "deepseek2": Names(
        {**ATTENTION, **MLP, **EXPERTS, **DEEPSEEK},
        {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"},
        {"self_attn.kv_b_proj.weight": (("attn_k_b.weight", "attn_v_b.weight"), "kv_b")},
    ),
    "gpt-oss": Names(
        {**ATTENTION, "post_attention_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.router"},
        {
            "attn_sinks.weight": "self_attn.sinks",
            "ffn_down_exps.weight": "mlp.experts.down_proj",
            "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
        },
        {
            "mlp.experts.gate_up_proj": (("ffn_gate_exps.weight", "ffn_up_exps.weight"), "interleave"),
            "mlp.experts.gate_up_proj_bias": (("ffn_gate_exps.bias", "ffn_up_exps.bias"), "interleave"),
        },
    ),
}
# read when the config is rebuilt, or not at all
SURPLUS = {
    "rope_freqs.weight": "read into the config: rotary factors",
    "rope_factors_long.weight": "read into the config: rotary factors",
    "rope_factors_short.weight": "read into the config: rotary factors",
    "attn_rot_embd.weight": "computed from the config",
}
SIDES = ("scale", "input_scale")  # of an NVFP4 weight, in tensors of their own
_TENSOR = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<leaf>.+?)\.(?P<ending>weight|bias|scale|input_scale)")
_OLD_EXPERT = re.compile(r"(ffn_gate|ffn_up|ffn_down)\.(\d+)")


@dataclass(frozen=True, slots=True)
class Recipe:
    """One Hugging Face tensor: the GGUF tensors it is made of, and how."""

    sources: tuple[str, ...]
    operation: str = ""
    index: int | None = None  # entry of the leading axis
    template: str = ""  # its name with `{}` for the index


@dataclass(frozen=True, slots=True)
class Sorted:
    """All tensors of a file: what makes what, what nothing reads, what no table knows."""

    recipes: dict[str, Recipe]
    surplus: dict[str, str]
    unknown: list[str]


def split_name(name: str) -> tuple[int | None, str, str] | None:
    """blk.3.attn_q.weight -> (3, "attn_q", "weight")."""
    match = _TENSOR.fullmatch(name)
    if match is None:
        return None
    return (int(match["layer"]) if match["layer"] else None), match["leaf"], match["ending"]


def sort_tensors(shapes: Mapping[str, tuple[int, ...]], arch: str, layers: int) -> Sorted:
    """shapes: every tensor of the file, in torch order."""
    out = Sorted({}, {}, [])
    joined = _joined(NAMES[arch], shapes, layers)
    out.recipes.update(joined)
    used = {source for recipe in joined.values() for source in recipe.sources}
    for name, shape in shapes.items():
        parts = split_name(name)
        layer, leaf, ending = parts or (None, name, "")
        reason = SURPLUS.get(f"{leaf}.{ending}") or _beyond(layer, layers)
        if reason:
            out.surplus[name] = reason
        elif parts is None or (found := _place(NAMES[arch], layer, leaf, ending)) is None:
            if name not in used:
                out.unknown.append(name)
        elif ending not in SIDES:
            out.recipes.update(_recipes(found, name, shape, NAMES[arch]))
    return out


def _beyond(layer: int | None, layers: int) -> str:
    return "" if layer is None or layer < layers else "predicts further tokens; the model has no place for it"


def _joined(names: Names, shapes: Iterable[str], layers: int) -> dict[str, Recipe]:
    present, out = set(shapes), {}
    for layer in range(layers):
        for target, (leaves, operation) in names.joined.items():
            sources = tuple(f"blk.{layer}.{leaf}" for leaf in leaves)
            if present.issuperset(sources):
                name = f"model.layers.{layer}.{target}"
                out[name] = Recipe(sources, operation, template=name)
    return out


def _place(names: Names, layer: int | None, leaf: str, ending: str) -> tuple[str, int | None] | None:
    """-> Hugging Face name (with `{}`), and the expert that the name of an old file ends in."""
    if layer is None:
        return (f"{TOP[leaf]}.{ending}", None) if leaf in TOP else None
    prefix = f"model.layers.{layer}."
    if f"{leaf}.{ending}" in names.exact:
        return prefix + names.exact[f"{leaf}.{ending}"], None
    expert = None
    if old := _OLD_EXPERT.fullmatch(leaf):
        leaf, expert = f"{old[1]}_exps", int(old[2])
    return (f"{prefix}{names.layer[leaf]}.{ending}", expert) if leaf in names.layer else None


def _recipes(found: tuple[str, int | None], name: str, shape: tuple[int, ...], names: Names) -> dict[str, Recipe]:
    template, expert = found
    if expert is not None:
        return {template.format(expert): Recipe((name,), template=template)}
    operation = _operation(name, shape, names)
    if "{}" not in template:
        return {template: Recipe((name,), operation, template=template)}
    return {template.format(i): Recipe((name,), operation, i, template) for i in range(shape[0])}


def _operation(name: str, shape: tuple[int, ...], names: Names) -> str:
    leaf = name.split(".")[-2]
    if names.pairs and leaf in ("attn_q", "attn_k"):
        return "pairs_q" if leaf == "attn_q" else "pairs_k"
    if names.plus_one and name.endswith("norm.weight"):
        return "minus_one"
    if leaf == "ffn_gate_inp_shexp" and len(shape) == 1:
        return "one_row"
    return "transpose" if "ffn_down_exps.weight" in names.exact and leaf == "ffn_down_exps" and len(shape) == 3 else ""


def pair_rows(rows: int, heads: int) -> Tensor:
    """Index that takes rows in pair order (0, d/2, 1, d/2 + 1 ... of each head) back to halves."""
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def half_rows(rows: int, heads: int) -> Tensor:
    """The inverse of pair_rows."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def interleave_rows(rows: int) -> Tensor:
    """Index into [gate rows, up rows] that makes gate, up, gate, up."""
    return torch.arange(rows).view(2, -1).T.reshape(-1)
