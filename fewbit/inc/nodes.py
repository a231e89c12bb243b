"""Nodes: what INC measures and quantizes in a model, under the names that vLLM's modules have.

transformers' query, key and value projections are one qkv_proj there, gate and up one gate_up_proj; attention is made
of small modules below attn.impl, and experts are a moe_op. A file may use either spelling.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from fewbit.models.fill import is_stack
from fewbit.modules.attention import is_attention

Kind = Literal["linear", "row_parallel_linear", "matmul", "kv_cache", "softmax", "fused_sdpa", "dynamic_moe"]

FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
ROWS = ("o_proj", "down_proj", "out_proj", "dense", "dense_4h_to_h", "c_proj", "fc2")  # of a row-parallel linear
LINEARS: dict[str, str] = {"qkv_proj": "QKVParallelLinear", "gate_up_proj": "MergedColumnParallelLinear",
                           "lm_head": "ParallelLMHead"}  # fmt: skip
INSIDE: dict[str, tuple[Kind, tuple[str, ...]]] = {  # of an attention module
    "matmul_qk": ("matmul", ("Matmul",)),
    "softmax": ("softmax", ("Softmax", "BlockSoftmaxConstMax")),
    "matmul_av": ("matmul", ("Matmul",)),
    "k_cache": ("kv_cache", ("KVCache", "VLLMKVCache")),
    "v_cache": ("kv_cache", ("KVCache", "VLLMKVCache")),
    "fused_scaled_dot_product_attention": ("fused_sdpa", ("ModuleFusedSDPA", "FusedSDPA", "SDPA")),
}
MOE = ("FusedMoE", "MoeMatmul", "VllmMixtureOfExpertsOp", "VllmMixtureOfExpertsOpFP8", "MoE")
ELSEWHERE = (  # types of INC that no causal language model of ours is made of
    "Conv2d", "LoRACompatibleLinear", "LoRACompatibleConv", "FalconLinear", "LinearLayer", "LinearAllreduce",
    "ScopedLinearAllReduce", "LmHeadLinearAllreduce", "Embedding", "EmbeddingBag", "B2BMatmul", "b2b_matmul",
)  # fmt: skip
TYPES: tuple[str, ...] = tuple(dict.fromkeys((
    "Linear", *LINEARS.values(), "ColumnParallelLinear", "RowParallelLinear", "ReplicatedLinear",
    *(name for _, names in INSIDE.values() for name in names), *MOE, *ELSEWHERE,
)))  # fmt: skip
OUTPUTS: tuple[Kind, ...] = ("row_parallel_linear", "softmax", "fused_sdpa", "dynamic_moe")  # measured in any case
VLLM: dict[str, tuple[str, str]] = {"mixtral": (".mlp.experts", ".block_sparse_moe.experts")}  # where its names differ
SAME = (  # spellings in files -> ours
    (re.compile(r"^language_model\."), ""), (re.compile(r"^model\.language_model\.(?=model\.)"), ""),
    (re.compile(r"\.block_sparse_moe\.experts\b"), ".mlp.experts"), (re.compile(r"\.hpu_fused_moe\b"), ""),
    (re.compile(r"\.MoeOp\b"), ".moe_op"), (re.compile(r"\.mla_attn\b"), ".attn"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Site:
    """A node in a model. paths: the linears that make it, or the attention module or stack of experts it is in."""

    name: str
    kind: Kind
    types: frozenset[str]
    paths: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What lists and files may call it."""
        whole = self.kind in ("linear", "row_parallel_linear", "dynamic_moe")
        ours = self.paths if whole else tuple(f"{path}.{self.role}" for path in self.paths)
        return tuple(dict.fromkeys((self.name, canonical(self.name), *ours)))

    @property
    def role(self) -> str:
        return self.name.rpartition(".")[2]


def canonical(name: str) -> str:
    """One spelling for the names that versions of vLLM have given a node."""
    for spelling, ours in SAME:
        name = spelling.sub(ours, name)
    return name


def by_canonical(names: Iterable[str]) -> dict[str, str]:
    """Canonical -> as it stands in a file."""
    return {canonical(name): name for name in names}


def sites(model: nn.Module) -> list[Site]:
    """Every node of a model, in its order."""
    config: Any = model.config
    renamed = VLLM.get(config.model_type)
    linears = {path: module for path, module in model.named_modules() if is_linear(module)}
    found: dict[str, Site] = {}
    for path, module in model.named_modules():
        if path in linears:
            site = linear_site(path, linears)
            found.setdefault(site.name, site)
        elif is_stack(module):
            host = path.replace(*renamed) if renamed else path
            found[f"{host}.moe_op"] = Site(f"{host}.moe_op", "dynamic_moe", frozenset(MOE), (path,))
        elif is_attention(module):
            for role, (kind, types) in INSIDE.items():
                name = f"{path}.attn.impl.{role}"
                found[name] = Site(name, kind, frozenset(types), (path,))
    return list(found.values())


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "bind"))


def linear_site(path: str, linears: Mapping[str, nn.Module]) -> Site:
    parent, _, leaf = path.rpartition(".")
    prefix = f"{parent}." if parent else ""
    for fused, parts in FUSED.items():
        paths = tuple(f"{prefix}{part}" for part in parts if f"{prefix}{part}" in linears)
        if leaf in parts and len(paths) > 1:
            return Site(f"{prefix}{fused}", "linear", frozenset(("Linear", LINEARS[fused])), paths)
    if leaf in ROWS:
        return Site(path, "row_parallel_linear", frozenset(("Linear", "RowParallelLinear")), (path,))
    own = LINEARS.get(leaf)
    types = ("Linear", own) if own else ("Linear", "ColumnParallelLinear", "ReplicatedLinear")
    return Site(path, "linear", frozenset(types), (path,))


def idle(patterns: Sequence[re.Pattern[str]], found: Sequence[Site]) -> Iterator[str]:
    """Names of a list that no node has."""
    for pattern in patterns:
        if not any(pattern.search(name) for site in found for name in site.names):
            yield pattern.pattern
