"""From measurements to scales: what INC writes into its Scale files, node by node."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.inc.config import Config
from fewbit.inc.files import Node, Stats
from fewbit.inc.nodes import Site, by_canonical, canonical
from fewbit.inc.scales import scale_of
from fewbit.inc.unify import largest, postprocess

Weights = Callable[[Site], Sequence[Tensor]]  # of a linear one scale, of a stack two of each expert: first and second
LINEARS = ("linear", "row_parallel_linear")
NONE = Node()


@dataclass(slots=True)
class Chosen:
    """scales: by the name of a site. left: site -> why it is not quantized."""

    scales: dict[str, Node] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Found:
    """Nodes of a file, under any of the names that a site may have."""

    nodes: Mapping[str, Node]
    spelt: Mapping[str, str]  # canonical -> as in the file

    @classmethod
    def of(cls, stats: Stats) -> "Found":
        return cls(stats.nodes, by_canonical(stats.nodes))

    def node(self, site: Site) -> Node | None:
        for name in site.names:
            if (spelling := self.spelt.get(canonical(name))) is not None:
                return self.nodes[spelling]
        parts = [self.nodes[self.spelt[path]] for path in site.paths if path in self.spelt]
        whole = site.kind in LINEARS and len(parts) == len(site.paths)
        return largest(site.name, parts, side_by_side=False) if whole else None

    def below(self, site: Site, rest: str) -> Node | None:
        spelling = self.spelt.get(canonical(f"{site.name}.{rest}"))
        return None if spelling is None else self.nodes[spelling]

    def knows(self, role: str) -> bool:
        return any(name.rpartition(".")[2] == role for name in self.spelt)


def taken(sites: Sequence[Site], config: Config, cached: bool) -> list[Site]:
    """The sites that are to be quantized. cached: keys and values are."""
    found = [site for site in sites if config.takes(site.names, site.types)]
    return [site for site in found if cached or site.kind != "kv_cache"]


def choose(sites: Sequence[Site], stats: Stats | None, config: Config, weights: Weights) -> Chosen:
    """sites: to be quantized. stats: None where the methods ask for none."""
    found = Found.of(postprocess(stats)) if stats is not None else None
    out, missing = Chosen(), []
    for site in sites:
        method = config.methods.of(site.name, site.kind)
        if method.dynamic and site.kind not in (*LINEARS, "dynamic_moe"):
            out.left[site.name] = "its method has a scale for each token of what linears read, and none for attention"
            continue
        node = found.node(site) if found is not None and method.measures else None
        if method.measures and not measured(site, node):
            if found is None or site.kind in (*LINEARS, "dynamic_moe", "kv_cache") or found.knows(site.role):
                missing.append(site.name)
            else:
                out.left[site.name] = f"the measurements know no {site.role}"
            continue
        out.scales[site.name] = scales(site, node or NONE, config, weights)
    if missing and not config.flags["ignore_modules_wo_measures"]:
        said = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        raise UnsupportedError(f"{config.where}: {len(missing)} modules are to be quantized and were not measured", [
            said, "measure them, name them in blocklist, or set ignore_modules_wo_measures to true",
        ])  # fmt: skip
    out.left |= dict.fromkeys(missing, "it was not measured")
    return out


def spread(scales: Mapping[str, Node]) -> dict[str, Node]:
    """As files have them: the projections of experts are nodes of their own."""
    out: dict[str, Node] = {}
    for name, node in scales.items():
        lists = {key: x for key, x in node.params.items() if "_list." in key}
        out[name] = replace(node, params={}) if lists else node
        for key, weight in lists.items():
            kind, _, number = key.partition(".")
            own = node.inputs[0 if kind == "w13_list" else 1 + int(number)]
            out[f"{name}.{key}"] = Node((own,), (), {"weight": weight})
    return out


def gathered(sites: Sequence[Site], stats: Stats) -> dict[str, Node]:
    """From a file of scales, by the name of a site. The inverse of `spread`."""
    found, out = Found.of(stats), {}
    for site in sites:
        node = found.node(site)
        if node is not None and site.kind == "dynamic_moe":
            params: dict[str, Tensor] = {}
            for key in (f"{kind}.{e}" for kind in ("w13_list", "w2_list") for e in range(len(node.inputs) - 1)):
                below = found.below(site, key)
                weight = below.weight() if below is not None else None
                if weight is None:
                    raise CheckpointError(f"{site.name}: the file of scales has no weight of {key}")
                params[key] = weight
            node = replace(node, params=params)
        if node is not None:
            out[site.name] = node
    return out


NEEDED = {"matmul": (2, 0), "kv_cache": (1, 0), "softmax": (0, 1), "fused_sdpa": (3, 0), "dynamic_moe": (1, 2)}


def measured(site: Site, node: Node | None) -> bool:
    inputs, outputs = NEEDED.get(site.kind, (1, 0))
    return node is not None and len(node.inputs) >= inputs and len(node.outputs) >= outputs


def scales(site: Site, node: Node, config: Config, weights: Weights) -> Node:
    rule = config.methods.of(site.name, site.kind).act

    def act(states: Sequence[Tensor], i: int) -> Tensor:
        """Of a node that was not measured: fixed, or chosen at each call."""
        amax = states[i].amax() if i < len(states) else torch.zeros(())
        return scale_of(amax, rule, config.unit, config.input_backoff)

    if site.kind in LINEARS:
        own, (weight,) = act(node.inputs, 0), weights(site)
        out = act(node.outputs, 0) if site.kind == "row_parallel_linear" and node.outputs else own * weight
        columns = {"weight": weight} if weight.dim() == 0 else {"weight": {"0": weight, "1": torch.ones(1)}}
        return Node((own,), (out,), columns)
    if site.kind == "matmul":
        pair = act(node.inputs, 0), act(node.inputs, 1)
        return Node(pair, (pair[0] * pair[1],))
    if site.kind == "kv_cache":
        return Node((act(node.inputs, 0),), (act(node.inputs, 0),))
    if site.kind == "softmax":
        return Node((), (act(node.outputs, 0),))
    if site.kind == "fused_sdpa":
        probabilities = (act(node.outputs, 1),) if len(node.outputs) > 1 or not node.inputs else ()
        outputs = (act(node.outputs, 0),) if node.outputs or not node.inputs else ()
        return Node((*(act(node.inputs, i) for i in range(3)), *probabilities), outputs)
    return of_experts(site, node, act, weights)


def of_experts(site: Site, node: Node, act: Callable[[Sequence[Tensor], int], Tensor], weights: Weights) -> Node:
    """inputs: of what all read, then of what each expert's second projection reads; params: the experts' weights."""
    held = weights(site)
    count = len(held) // 2
    amounts = [x.amax() for x in node.outputs[1:]]
    if amounts and len(amounts) != count:
        reason = f"{len(amounts)} experts were measured and the model has {count}; unify the files of the ranks first"
        raise UnsupportedError(f"{site.name}: its measurements are of other experts", [reason])
    largest_one = max(amounts, default=torch.zeros(()))
    inner = [x if x > 0 else largest_one for x in amounts]  # an expert that saw no token takes the range of the others
    params = {
        f"{kind}.{e}": held[e + i * count] for i, kind in enumerate(("w13_list", "w2_list")) for e in range(count)
    }
    inputs = (act(node.inputs, 0), *(act(inner, e) for e in range(count)))
    return Node(inputs, (act(node.outputs, 0),), params)
