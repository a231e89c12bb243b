"""QUANTIZE once more, on transformers' own model: weights, inputs and attention rounded by numpy and ml_dtypes.

Scales come from a measurement file by the formulas of plain.py. Nothing of the package computes here.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from tests.inc import plain

NAME = "plain-inc"
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
         "up_proj": "gate_up_proj"}  # fmt: skip
Unit = tuple[str, str]


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float,
           **_: Any) -> tuple[Tensor, None]:  # fmt: skip
    """Every step by itself, with what `module.plain` does to it."""
    do = module.plain
    groups = query.shape[1] // key.shape[1]
    key, value = do("key", key), do("value", value)
    scores = do("query", query * scaling) @ key.repeat_interleave(groups, 1).mT
    if mask is not None:
        scores = scores + mask[..., : key.shape[-2]]
    weights = do("weights", scores.float().softmax(-1).to(query.dtype))
    out = do("output", weights @ value.repeat_interleave(groups, 1))
    return out.transpose(1, 2).contiguous(), None


def run_experts(host: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """One expert after another."""
    out = torch.zeros_like(hidden)
    for e in range(host.num_experts):
        token, place = (index == e).nonzero(as_tuple=True)
        x = host.plain("hidden", hidden[token], e) @ host.gate_up_proj[e].mT
        gate, up = x.chunk(2, -1)
        x = host.plain("inner", host.act_fn(gate) * up, e) @ host.down_proj[e].mT
        out.index_add_(0, token, x * weights[token, place, None])
    return out


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)
ALL_EXPERTS_FUNCTIONS.register(NAME, run_experts)


def model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=NAME,
                                                experts_implementation=NAME)  # fmt: skip


def attentions(of: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in of.named_modules() if hasattr(m, "layer_idx") and hasattr(m, "o_proj")}


def stacks(of: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in of.named_modules() if name.endswith(".experts")}


def node_name(path: str) -> str:
    parent, _, leaf = path.rpartition(".")
    return f"{parent}.{FUSED.get(leaf, leaf)}".removeprefix(".")


def op_name(path: str, kind: str) -> str:
    return f"{path.replace('.mlp.', '.block_sparse_moe.') if kind == 'mixtral' else path}.moe_op"


@contextmanager
def measured(of: Any) -> Iterator[dict[str, list[float]]]:
    """Within: the largest magnitudes of what is read, by node and which input of it. Outputs of experts likewise."""
    found: dict[str, Any] = {}

    def see(name: str, at: int, x: Tensor) -> None:
        held = found.setdefault(name, {})
        held[at] = max(held.get(at, 0.0), float(x.abs().max()) if x.numel() else 0.0)

    undo = [m.register_forward_pre_hook(lambda _, args, n=name: see(node_name(n), 0, args[0]))
            for name, m in of.named_modules() if isinstance(m, nn.Linear)]  # fmt: skip
    for name, module in attentions(of).items():

        def do(what: str, x: Tensor, base: str = f"{name}.attn.impl") -> Tensor:
            for role, at in {"key": [("matmul_qk", 1), ("k_cache", 0)], "value": [("matmul_av", 1), ("v_cache", 0)],
                             "query": [("matmul_qk", 0)], "weights": [("matmul_av", 0), ("softmax", 1)],
                             "output": []}[what]:  # fmt: skip
                see(f"{base}.{role}", at, x)
            return x

        module.plain = do
    for name, module in stacks(of).items():

        def fed(what: str, x: Tensor, e: int, op: str = op_name(name, of.config.model_type)) -> Tensor:
            see(op, 0 if what == "hidden" else 1 + e, x)
            return x

        module.plain = fed
    yield found
    for handle in undo:
        handle.remove()


class Emulation:
    """A model whose layers are rounded as a method says, by a file of measurements."""

    def __init__(self, of: Any, file: Path, method: str, unit: Unit, blocked: tuple[str, ...] = ()):
        self.nodes = json.loads(file.read_text())["Nodes"]
        self.method, self.unit, self.model = method, unit, of
        for name, module in of.named_modules():
            if isinstance(module, nn.Linear) and node_name(name) in self.nodes and node_name(name) not in blocked:
                self._input(module, self.act(node_name(name), "inputs", 0))
        self._weights({n: m for n, m in of.named_modules() if isinstance(m, nn.Linear) and node_name(n) not in blocked})
        for name, module in attentions(of).items():
            module.plain = self._inside(f"{name}.attn.impl")
        for name, module in stacks(of).items():
            self._experts(op_name(name, of.config.model_type), module)

    def act(self, node: str, part: str, at: int) -> float:
        return plain.act(self.method, self.nodes[node][part][at][0][0], self.unit)

    def round(self, x: Tensor, scale: Any) -> Tensor:
        return torch.from_numpy(plain.rounded(x.detach().numpy(), scale, self.unit))

    def _input(self, module: nn.Module, scale: float) -> None:
        module.register_forward_pre_hook(lambda _, args: (self.round(args[0], scale),))

    def _weights(self, linears: dict[str, Any]) -> None:
        """Linears of one node have one scale between them, or one for each row."""
        groups: dict[str, list[Any]] = {}
        for name, module in linears.items():
            groups.setdefault(node_name(name), []).append(module)
        for node, modules in groups.items():
            if node not in self.nodes:
                continue
            whole = torch.cat([m.weight.data for m in modules])
            back = self.round(whole, plain.weight(self.method, whole.numpy(), self.unit))
            for module, rows in zip(modules, back.split([m.out_features for m in modules]), strict=True):
                module.weight.data = rows.clone()

    def _inside(self, base: str) -> Any:
        scales = {"key": self.act(f"{base}.k_cache", "inputs", 0), "value": self.act(f"{base}.v_cache", "inputs", 0),
                  "query": self.act(f"{base}.matmul_qk", "inputs", 0),
                  "weights": self.act(f"{base}.matmul_av", "inputs", 0)}  # fmt: skip
        return lambda what, x: self.round(x, scales[what]) if what in scales else x

    def _experts(self, op: str, host: Any) -> None:
        inner = [x[0][0] for x in self.nodes[op]["outputs"][1:]]
        scales = [plain.act(self.method, x or max(inner), self.unit) for x in inner]
        hidden = self.act(op, "inputs", 0)
        host.plain = lambda what, x, e: self.round(x, hidden if what == "hidden" else scales[e])
        for leaf in ("gate_up_proj", "down_proj"):
            stack = getattr(host, leaf).data
            made = [self.round(w, plain.weight(self.method, w.numpy(), self.unit)) for w in stack]
            getattr(host, leaf).data = torch.stack(made)
