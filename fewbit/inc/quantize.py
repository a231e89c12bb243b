"""QUANTIZE: from scales to what a model becomes as it is loaded: Arrivals, keys and values, what attention rounds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import UnsupportedError
from fewbit.inc.chosen import LINEARS
from fewbit.inc.config import Config
from fewbit.inc.files import Node
from fewbit.inc.nodes import Site
from fewbit.inc.scales import act_spec, weight_spec
from fewbit.kernels.rounded import rounded
from fewbit.models.arrival import Arrival
from fewbit.quant.elements import F32
from fewbit.quant.qtensor import Planes
from fewbit.quant.spec import Format, QuantSpec, describe, spec

Cached = tuple[QuantSpec, Planes, Planes]


@dataclass(slots=True)
class Becomes:
    """What loading is given. arrivals: by module path. kv, inside: by the path of an attention module."""

    arrivals: dict[str, Arrival] = field(default_factory=dict)
    kv: dict[str, Cached] = field(default_factory=dict)
    inside: dict[str, "Rounds"] = field(default_factory=dict)


@dataclass(slots=True)
class Rounds:
    """A modules.attention.Inside: scales of what attention makes on the way; None: it stays as it is."""

    spec: QuantSpec
    query: float | None = None
    scaled: bool = True  # the query is rounded after scaling, as a product's input, not before
    probabilities: tuple[float, ...] = ()  # one after the other
    out: float | None = None

    def queries(self, query: Tensor, scaling: float) -> Tensor:
        if self.scaled:
            return self._rounded(query * scaling, self.query)
        return self._rounded(query, self.query) * scaling

    def weights(self, weights: Tensor) -> Tensor:
        for scale in self.probabilities:
            weights = self._rounded(weights, scale)
        return weights

    def output(self, out: Tensor) -> Tensor:
        return self._rounded(out, self.out)

    def _rounded(self, x: Tensor, scale: float | None) -> Tensor:
        if scale is None:
            return x
        return rounded(x, self.spec, {"scale0": torch.full((1, 1), scale, device=x.device)})

    @property
    def any(self) -> bool:
        return self.query is not None or bool(self.probabilities) or self.out is not None

    def __str__(self) -> str:
        said = {"queries": self.query is not None, "probabilities": bool(self.probabilities),
                "outputs": self.out is not None}  # fmt: skip
        return f"{', '.join(name for name, done in said.items() if done)} rounded to {describe(self.spec)}"


def becomes(sites: Sequence[Site], scales: Mapping[str, Node], config: Config, model: nn.Module) -> Becomes:
    """scales: of the sites that are quantized. model: on meta, for the sizes of what is fused."""
    found = Becomes()
    attention: dict[str, dict[str, Node]] = {}
    for site in sites:
        node = scales.get(site.name)
        if node is None:
            continue
        if site.kind in LINEARS:
            found.arrivals |= linear(site, node, config, model)
        elif site.kind == "dynamic_moe":
            found.arrivals |= experts(site, node, config, model)
        else:
            attention.setdefault(site.paths[0], {})[site.role] = node
    for path, nodes in attention.items():
        own = spec(config.unit.element, (F32, 0, 0))
        if (kv := cached(nodes)) is not None:
            found.kv[path] = (own, *kv)
        if (rounds := inside(nodes, own)).any:
            found.inside[path] = rounds
    return found


def format_of(site: Site, config: Config) -> Format:
    method = config.methods.of(site.name, site.kind)
    return Format(weight_spec(method.weight, config.unit), act_spec(method.act, config.unit))


def linear(site: Site, node: Node, config: Config, model: nn.Module) -> dict[str, Arrival]:
    """One Arrival for each linear of a node; they share its scales, by channel each has its rows of them."""
    form, weight = format_of(site, config), node.weight()
    assert weight is not None and form.act is not None
    act = {} if form.act.dynamic else {"scale0": plane(node.inputs[0])}
    start, found = 0, {}
    for path in site.paths:
        rows: Any = model.get_submodule(path)
        own = plane(weight) if weight.dim() == 0 else plane(weight[start : start + rows.out_features])
        found[path] = Arrival(form, {"scale0": own}, act)
        start += rows.out_features
    return found


def experts(site: Site, node: Node, config: Config, model: nn.Module) -> dict[str, Arrival]:
    form = format_of(site, config)
    assert form.act is not None
    host: Any = model.get_submodule(site.paths[0])
    first = "gate_up_proj" if host.has_gate else "up_proj"
    inputs = {first: plane(node.inputs[0]), "down_proj": torch.stack([plane(x) for x in node.inputs[1:]])}
    found = {}
    for kind, leaf in (("w13_list", first), ("w2_list", "down_proj")):
        weight = torch.stack([plane(node.params[f"{kind}.{e}"]) for e in range(host.num_experts)])
        act = {} if form.act.dynamic else {"scale0": inputs[leaf]}
        found[f"{site.paths[0]}.{leaf}"] = Arrival(form, {"scale0": weight}, act)
    return found


def cached(nodes: Mapping[str, Node]) -> tuple[Planes, Planes] | None:
    """Planes of keys and of values: of the caches, else of the products that read them, else of fused attention."""
    found: list[Planes] = []
    for i, (cache, product) in enumerate((("k_cache", "matmul_qk"), ("v_cache", "matmul_av"))):
        held = [(cache, 0), (product, 1), ("fused_scaled_dot_product_attention", 1 + i)]
        scales = [nodes[role].inputs[at] for role, at in held if role in nodes]
        if scales:
            found.append({"scale0": plane(scales[0])})
    if len(found) == 1:
        reasons = ["a layer's keys and values are cached alike: name both in a list, or neither"]
        raise UnsupportedError("keys or values alone are to be rounded", reasons)
    return (found[0], found[1]) if found else None


def inside(nodes: Mapping[str, Node], own: QuantSpec) -> Rounds:
    """The products' scales, where they are quantized; fused attention's where it alone is.

    Attention is one computation for prompts and for decoding here, so that a text does not depend on how it was cut
    into steps; INC has the products for decoding and fused attention for prompts.
    """
    rounds = Rounds(own)
    fused = nodes.get("fused_scaled_dot_product_attention")
    if "matmul_qk" in nodes:
        rounds.query = number(nodes["matmul_qk"].inputs[0])
    elif fused is not None:
        rounds.query, rounds.scaled = number(fused.inputs[0]), False
    softmax = [number(nodes["softmax"].outputs[0])] if "softmax" in nodes else []
    if "matmul_av" in nodes:
        rounds.probabilities = (*softmax, number(nodes["matmul_av"].inputs[0]))
    elif fused is not None and len(fused.inputs) > 3:
        rounds.probabilities = (*softmax, number(fused.inputs[3]))
    else:
        rounds.probabilities = tuple(softmax)
    if fused is not None and fused.outputs and "matmul_av" not in nodes:
        rounds.out = number(fused.outputs[0])
    return rounds


def plane(scale: Tensor) -> Tensor:
    """A number -> [1, 1], one for each row -> [N, 1]."""
    return scale.float().reshape(-1, 1)


def number(scale: Tensor) -> float:
    return float(scale.float())
