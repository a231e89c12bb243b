"""Quantizers put into a model as it is: linears, stacks of experts and attention change their class, and nothing else.

Weights stay the parameters they were, under the same names; optimizers, hooks and device moves go on working.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fewbit.compat.quantizer import Quantizer
from fewbit.errors import UnsupportedError
from fewbit.models import hf, twin
from fewbit.models.fill import is_stack
from fewbit.modules import attention, experts
from fewbit.modules.attention import is_attention
from fewbit.modules.attention_sides import Sides
from fewbit.quant.elements import E4M3

ATTENTION = "fewbit_quantizers"  # our name among transformers' attention functions
CACHE = ("k_bmm_quantizer", "v_bmm_quantizer")
OTHERS = ("q_bmm_quantizer", "softmax_quantizer")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a quantizer can be put. names: what patterns may call it; the first is its path in the model."""

    names: tuple[str, ...]
    owner: str
    leaf: str  # weight_quantizer, k_bmm_quantizer; of a stack gate_up_proj.weight_quantizer
    classes: frozenset[str] = field(repr=False)


class QuantLinear(nn.Linear):
    """A linear that rounds its weight and its input. Low-rank factors take what rounding would lose (SVDQuant)."""

    weight_quantizer: Quantizer
    input_quantizer: Quantizer
    svdquant_lora_a: Tensor
    svdquant_lora_b: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_quantizer.scaled(x)
        y = linear(self.input_quantizer.rounded(x), self.weight_quantizer(self.weight), self.bias)
        if getattr(self, "svdquant_lora_a", None) is None:
            return y
        a, b = self.svdquant_lora_a.to(x.dtype), self.svdquant_lora_b.to(x.dtype)
        return y + linear(linear(x, a), b)


class Projection(nn.Module):
    """The two quantizers of one projection of a stack of experts: each expert has scales of its own for its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_quantizer, self.input_quantizer = Quantizer(weight=True), Quantizer()


class QuantExperts(nn.Module):
    """What a stack's class becomes: transformers' parameters and gate, our loop over the experts."""

    quantizers: nn.ModuleDict

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return experts.forward(self, hidden, top_k_index, top_k_weights)


class Runner:
    """How modules.experts runs a projection that is not dense: bound to its host, and no part of its state."""

    def __init__(self, host: Any):
        self.host, self.parts = host, dict(host.quantizers.items())

    def run(self, name: str, x: Tensor, rows: Sequence[int], token: Tensor | None = None) -> Tensor:
        assert token is None, "rows that the host has sorted are picked out"
        held = self.parts[name]
        x = held.input_quantizer.scaled(x)
        # a scale that each call chooses is each expert's own
        x = torch.cat([held.input_quantizer.rounded(run) for run in x.split(list(rows))])
        return experts.dense(x, held.weight_quantizer(oriented(self.host, name)), False, rows)


def oriented(host: Any, name: str) -> Tensor:
    """A stack's parameter as [E, N, K]."""
    weight: Tensor = getattr(host, name)
    return weight.mT.contiguous() if host.is_transposed else weight


def projections(host: Any) -> tuple[str, ...]:
    return ("gate_up_proj" if host.has_gate else "up_proj", "down_proj")


@cache
def _experts_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Quant{kind.__name__}", (QuantExperts, kind), {"fewbit_experts": property(Runner)})


def places(model: nn.Module) -> Iterator[Place]:
    """Every quantizer that could be switched on."""
    disk = disk_modules(model)
    for path, module in model.named_modules():
        if type(module) is nn.Linear:
            leaves = ["weight_quantizer", "input_quantizer", "output_quantizer"]
        elif is_stack(module):
            leaves = [f"{p}.{q}_quantizer" for p in projections(module) for q in ("weight", "input")]
        elif is_attention(module):
            leaves = [*CACHE, *OTHERS]
        else:
            continue
        classes = frozenset(f"nn.{c.__name__}" for c in type(module).__mro__) | {type(module).__name__}
        for leaf in leaves:
            yield Place((f"{path}.{leaf}", *_aliases(path, leaf, disk)), path, leaf, classes)


def disk_modules(model: nn.Module) -> dict[str, list[str]]:
    """Path of a parameter -> the modules it is on disk, where those are called otherwise."""
    found: dict[str, list[str]] = {}
    names = [name for name in hf.disk_state(model) if name.endswith(".weight")]  # type: ignore[arg-type]
    for name, place in hf.placements(model, names).items():  # type: ignore[arg-type]
        for target in place.targets if place is not None else ():
            found.setdefault(target, []).append(name.removesuffix(".weight"))
    return found


def _aliases(path: str, leaf: str, disk: dict[str, list[str]]) -> tuple[str, ...]:
    """A stack goes by the names of all its experts; a linear by its own on disk."""
    projection, _, quantizer = leaf.rpartition(".")
    parameter = f"{path}.{projection or 'weight'}"
    names = disk.get(parameter, [])
    return tuple(f"{name}.{quantizer}" for name in names if name != path)


def insert(model: nn.Module, place: Place, quantizer: Quantizer) -> None:
    """Put a quantizer in its place; the module takes our class when it gets its first."""
    module: Any = model.get_submodule(place.owner)
    projection, _, leaf = place.leaf.rpartition(".")
    if is_attention(module):
        setattr(module, leaf, quantizer)
    elif projection:
        setattr(as_experts(module).quantizers[projection], leaf, quantizer)
    else:
        setattr(as_linear(module), leaf, quantizer)


def as_linear(module: Any, kind: type[QuantLinear] = QuantLinear) -> Any:
    if not isinstance(module, QuantLinear):
        module.__class__ = kind
        module.weight_quantizer, module.input_quantizer = Quantizer(weight=True), Quantizer()
    return module


def as_experts(module: Any) -> Any:
    if not isinstance(module, QuantExperts):
        kind: Any = type(module)
        module.__class__ = _experts_class(kind)
        module.quantizers = nn.ModuleDict({name: Projection() for name in projections(module)})
    return module


def check_attention(model: Any) -> None:
    """Refuse a model whose attention ours does not compute."""
    if (exact := twin.require(model.config)) != hf.OURS:
        reason = f"{type(model).__name__} is exact here only on transformers' own {exact} attention"
        raise UnsupportedError("keys and values cannot be quantized", [reason])


def route_attention(model: Any) -> None:
    """Attention modules that hold quantizers run through `attend`."""
    hf.register_attention(ATTENTION, attend)
    for module in model.modules():
        if is_attention(module) and any(hasattr(module, leaf) for leaf in (*CACHE, *OTHERS)):
            module.config._attn_implementation = ATTENTION


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **others: Any) -> Any:
    """Attention over rounded keys and values: what modules.attention does for a checkpoint that declares its cache."""
    rounded: list[Any] = []
    for leaf, x in zip(("q_bmm_quantizer", *CACHE), (query, key, value), strict=True):
        quantizer = getattr(module, leaf, None)
        rounded.append(x if quantizer is None else quantizer(x))
    query, key, value = rounded
    softmax = getattr(module, OTHERS[1], None)
    sides = Sides(p=E4M3.max if softmax is not None and softmax.enabled else 0.0)
    return attention.forward(module, query, key, value, mask, sides=sides, **others)


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Path -> quantizer, as patterns call them."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, Quantizer)}
    return {name.replace(".quantizers.", "."): q for name, q in found.items()}


def weights(model: nn.Module) -> Iterator[tuple[str, str, Any, Quantizer, Quantizer]]:
    """(module path, parameter, module, weight quantizer, input quantizer) of everything that we changed."""
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear):
            yield path, "weight", module, module.weight_quantizer, module.input_quantizer
        elif isinstance(module, QuantExperts):
            for name, held in module.quantizers.items():
                pair: Any = held
                yield path, name, module, pair.weight_quantizer, pair.input_quantizer


def matrix(module: Any, name: str) -> Tensor:
    """A parameter as [N, K] or [E, N, K]."""
    return module.weight if isinstance(module, QuantLinear) else oriented(module, name)


def assign_matrix(module: Any, name: str, value: Tensor) -> None:
    """The inverse: the parameter's data from [N, K] or [E, N, K]."""
    parameter = getattr(module, name)
    transposed = not isinstance(module, QuantLinear) and module.is_transposed
    with torch.no_grad():
        parameter.copy_((value.mT if transposed else value).to(parameter.dtype))
