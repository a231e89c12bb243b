"""What scales need to know of weights that measurements do not say: read once before the model is loaded.

Only methods that look for the least error, those with a scale for each channel, and nodes whose weight was not measured
ask for it. A node of several linears is looked at as one: its maximum is theirs, its errors add up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import FewbitError
from fewbit.inc.chosen import LINEARS, Found
from fewbit.inc.config import Config
from fewbit.inc.files import Stats
from fewbit.inc.nodes import Site
from fewbit.inc.scales import Rule, Unit, candidates, channel_scales, least, losses, scale_of
from fewbit.models import hf
from fewbit.models.fill import Filler, Tensors, is_stack, owner
from fewbit.models.placement import Placement
from fewbit.modules.linear import Options


@dataclass(frozen=True, slots=True)
class Ask:
    """What is to be known of a parameter. node: whose scale it is part of; of a stack each expert has its own."""

    node: str
    rule: Rule
    backoff: float


@dataclass(slots=True)
class Seen:
    """Of one node, or of one expert of one."""

    amax: float = 0.0
    losses: Tensor | None = None  # [candidates]
    rows: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # (parameter, part) -> scales [N, 1]


class Glimpse(Filler):
    """Reads a checkpoint as loading does, and keeps nothing of it."""

    asked: Mapping[str, Ask]
    unit: Unit
    found: dict[tuple[str, int], Seen]

    def _one(self, place: Placement, tensor: Tensor) -> None:
        ask = self.asked.get(place.target)
        if ask is None:
            return
        module, _ = owner(self.model, place.target)
        if is_stack(module) and place.expert is None:
            for e, matrix in enumerate(tensor):
                self._see(ask, place, e, matrix.mT if module.is_transposed else matrix)
        else:
            self._see(ask, place, place.expert or 0, tensor)

    def _see(self, ask: Ask, place: Placement, expert: int, w: Tensor) -> None:
        seen = self.found.setdefault((ask.node, expert), Seen())
        w = w.float()
        seen.amax = max(seen.amax, float(w.abs().amax()))
        if ask.rule.per == "channel":
            seen.rows[place.target, place.part] = channel_scales(w, ask.rule, self.unit, ask.backoff)
        elif ask.rule.choose == "opt":
            steps = [torch.tensor(step, dtype=torch.float64) for step in candidates(ask.rule, self.unit)]
            more = losses(w, steps, self.unit.element).sum(-1)
            seen.losses = more if seen.losses is None else seen.losses + more


def glimpse(source: Tensors, model: Any, asked: Mapping[str, Ask], unit: Unit) -> dict[tuple[str, int], Seen]:
    """model: on meta. -> by node and expert."""
    reader = Glimpse(model, hf.rules(model), Options(), torch.device("cpu"))
    reader.asked, reader.unit, reader.found = asked, unit, {}
    if asked:
        reader.fill(source)
    missing = sorted({ask.node for ask in asked.values()} - {node for node, _ in reader.found})
    if missing:
        raise FewbitError(f"the checkpoint has no weights for {', '.join(missing[:4])}")
    return reader.found


def weight_scale(seen: Seen, ask: Ask, unit: Unit, paths: tuple[str, ...]) -> Tensor:
    """-> a number, or [N] over the rows of all parameters in their order. paths: those parameters."""
    if ask.rule.per == "channel":
        order = {path: i for i, path in enumerate(paths)}
        keys = sorted(seen.rows, key=lambda key: (order[key[0]], key[1]))
        return torch.cat([seen.rows[key] for key in keys]).flatten()
    if ask.rule.choose == "opt":
        assert seen.losses is not None
        return torch.tensor(candidates(ask.rule, unit)[least(seen.losses)], dtype=torch.float64)
    return scale_of(seen.amax, ask.rule, unit, ask.backoff)


class Weights:
    """The weight scales of sites: of what was measured where that suffices, else of a look at the checkpoint."""

    def __init__(self, source: Tensors, model: Any, config: Config, found: Sequence[Site], stats: Stats | None):
        self.config, self.model = config, model
        self.measured = Found.of(stats) if stats is not None else None
        asked: dict[str, Ask] = {}
        for site in found:
            if site.kind in (*LINEARS, "dynamic_moe"):
                asked |= {name: Ask(node, self._rule(site), config.weight_backoff)
                          for node, names in self._parameters(site).items() if not self._suffices(site)
                          for name in names}  # fmt: skip
        self.asked = asked
        self.seen: dict[tuple[str, int], Seen] = glimpse(source, model, asked, config.unit)

    def _rule(self, site: Site) -> Rule:
        return self.config.methods.of(site.name, site.kind).weight

    def _parameters(self, site: Site) -> dict[str, tuple[str, ...]]:
        """What shares a scale -> the parameters."""
        if site.kind != "dynamic_moe":
            return {site.name: tuple(f"{path}.weight" for path in site.paths)}
        host: Any = self.model.get_submodule(site.paths[0])
        first = "gate_up_proj" if host.has_gate else "up_proj"
        leaves = {"w13_list": first, "w2_list": "down_proj"}
        return {f"{site.name}.{kind}": (f"{site.paths[0]}.{leaf}",) for kind, leaf in leaves.items()}

    def _states(self, site: Site) -> list[Tensor | None]:
        """The weights' measured states."""
        if self.measured is None:
            return [None]
        if site.kind != "dynamic_moe":
            node = self.measured.node(site)
            return [None if node is None else node.weight()]
        host: Any = self.model.get_submodule(site.paths[0])
        keys = [f"{kind}.{e}" for kind in ("w13_list", "w2_list") for e in range(host.num_experts)]
        nodes = [self.measured.below(site, key) for key in keys]
        return [None if node is None else node.weight() for node in nodes]

    def _suffices(self, site: Site) -> bool:
        rule = self._rule(site)
        known = rule.choose == "maxabs" and rule.per == "tensor"
        return rule.choose == "fixed" or (known and all(state is not None for state in self._states(site)))

    def __call__(self, site: Site) -> list[Tensor]:
        rule, backoff = self._rule(site), self.config.weight_backoff
        if self._suffices(site):
            host: Any = self.model.get_submodule(site.paths[0])
            count = 2 * host.num_experts if site.kind == "dynamic_moe" else 1
            states = [torch.zeros(())] * count if rule.choose == "fixed" else self._states(site)
            return [scale_of(state.amax(), rule, self.config.unit, backoff) for state in states if state is not None]
        out = []
        for node, names in self._parameters(site).items():
            held = sorted(expert for name, expert in self.seen if name == node)
            out += [weight_scale(self.seen[node, e], self.asked[names[0]], self.config.unit, names) for e in held]
        return out
