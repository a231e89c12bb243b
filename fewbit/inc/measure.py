"""MEASURE: what INC's observers see while a model runs, node by node.

A node's state is the largest magnitude so far: one number, or one for each channel; or the last shape. What a node is
fed is seen by hooks of its modules, what attention makes on the way by a hook inside it. Nothing computed is changed.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import UnsupportedError
from fewbit.inc import files
from fewbit.inc.config import Config
from fewbit.inc.files import Mode, Node, Stats
from fewbit.inc.nodes import OUTPUTS, Site, idle, sites
from fewbit.inc.tensors import Saver
from fewbit.modules.attention import INSIDE, WATCH_KV
from fewbit.modules.experts import WATCH

LOG = logging.getLogger("fewbit.inc")
Key = tuple[str, str, int | str]  # node, part, which of it
Axis = int | None  # of channels; probabilities have none, for as many as a text has tokens are not the next one's
Observer = Callable[[Tensor | None, Tensor, Axis], Tensor]  # (state so far, tensor, axis) -> state
MODES: dict[str, Mode] = {"shape": "Shape"}
EXCLUDES = {"inputs": "INPUT", "outputs": "OUTPUT", "params": "PARAMS"}  # what measure_exclude calls a part


def maxabs(state: Tensor | None, x: Tensor, axis: Axis) -> Tensor:
    """-> [1, 1]"""
    found = x.detach().abs().amax().float().view(1, 1)
    return found if state is None else torch.maximum(state, found)


def per_channel(state: Tensor | None, x: Tensor, axis: Axis) -> Tensor:
    """-> [channels, 1]"""
    if axis is None:
        return maxabs(state, x, axis)
    found = x.detach().abs().movedim(axis, -1).flatten(0, -2).amax(0).float().view(-1, 1)
    return found if state is None else torch.maximum(state, found)


def shape(state: Tensor | None, x: Tensor, axis: Axis) -> Tensor:
    """-> [1, dimensions], of the last call"""
    return torch.tensor([x.shape], dtype=torch.float32)


def nothing(state: Tensor | None, x: Tensor, axis: Axis) -> Tensor:
    """What INC leaves in a file beside saved tensors."""
    return torch.zeros(1, 1)


OBSERVERS: dict[str, Observer] = {
    "maxabs": maxabs,
    "maxabs_per_channel": per_channel,
    "shape": shape,
    "save": nothing,
}


class Measure:
    """One rank's states, from construction to `close`."""

    def __init__(self, model: nn.Module, config: Config, rank: int = 0, size: int = 1):
        self.config, self.rank, self.size = config, rank, size
        self.observe = OBSERVERS[config.observer]
        self.saver = Saver(config.stats) if config.observer == "save" else None
        found = sites(model)
        self.sites = [site for site in found if config.takes(site.names, site.types)]
        for text in idle((*config.allow.names, *config.block.names), found):
            LOG.warning("%s: no node of this model is called %s", config.where, text)
        self.states: dict[Key, dict[str, Tensor]] = defaultdict(dict)  # by the module that was seen
        self.modules: list[str] = []
        self.samples = 0
        self._undo: list[Callable[[], Any]] = []
        self._attach(model)

    def see(self, node: str, part: str, index: int | str, x: Tensor, path: str = "", axis: Axis = -1) -> None:
        """Take a tensor in. path: of the module it is of, where a node has several."""
        if not x.numel() or not self._wanted(node, part):
            return
        held = self.states[node, part, index]
        held[path] = self.observe(held.get(path), x, axis)
        if self.saver is not None:
            self.saver.save(node, part, index, x)

    def _wanted(self, node: str, part: str) -> bool:
        required = part == "outputs" and self._kinds.get(node) in OUTPUTS
        return required or self.config.exclude not in (EXCLUDES[part], "ALL")

    def _attach(self, model: nn.Module) -> None:
        self._kinds = {site.name: site.kind for site in self.sites}
        inside: dict[str, set[str]] = defaultdict(set)
        for site in self.sites:
            self.modules.append(site.name)
            if site.kind in ("linear", "row_parallel_linear"):
                for path in site.paths:
                    self._linear(site, path, model.get_submodule(path))
            elif site.kind == "dynamic_moe":
                self._experts(site, model.get_submodule(site.paths[0]))
            else:
                inside[site.paths[0]].add(site.role)
        for path, roles in inside.items():
            module, watch = model.get_submodule(path), Look(self, f"{path}.attn.impl", roles)
            self._set(module, INSIDE, watch)
            self._set(module, WATCH_KV, watch.cached)
        self._undo.append(model.register_forward_hook(self._counted).remove)

    def _linear(self, site: Site, path: str, module: Any) -> None:
        def fed(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.see(site.name, "inputs", 0, args[0], path)

        def made(_: nn.Module, __: Any, y: Tensor) -> None:
            self.see(site.name, "outputs", 0, y, path)

        def summed(_: nn.Module, __: Any, y: Tensor) -> None:
            self.see(site.name, "outputs", 1, y, path)

        self._undo.append(module.register_forward_pre_hook(fed).remove)
        if site.kind == "row_parallel_linear":  # its own part of the sum, then the sum over the ranks
            self._undo.append(module.register_forward_hook(made, prepend=True).remove)
            self._undo.append(module.register_forward_hook(summed).remove)
        else:
            self._undo.append(module.register_forward_hook(made).remove)
        self._weight(site.name, path, module)

    def _weight(self, node: str, path: str, module: Any) -> None:
        try:
            self.see(node, "params", "weight", module.weight, path, axis=0)
        except UnsupportedError as error:
            LOG.warning("%s: its weight is not measured: %s", path, error)

    def _experts(self, site: Site, host: Any) -> None:
        def fed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.see(site.name, "inputs", 0, args[0] if args else kwargs["hidden_states"])

        self._undo.append(host.register_forward_pre_hook(fed, with_kwargs=True).remove)
        self._undo.append(host.register_forward_hook(lambda _, __, y: self.see(site.name, "outputs", 0, y)).remove)
        self._set(host, WATCH, Intermediate(self, site.name))
        first = "gate_up_proj" if host.has_gate else "up_proj"
        for kind, leaf in (("w13_list", first), ("w2_list", "down_proj")):
            stack = host._parameters.get(leaf)
            for e in range(host.num_experts):
                self.modules.append(f"{site.name}.{kind}.{e}")
                if stack is not None:
                    axis = -1 if host.is_transposed else 0
                    self.see(f"{site.name}.{kind}.{e}", "params", "weight", stack[e], axis=axis)

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        object.__setattr__(module, name, value)
        self._undo.append(lambda: object.__delattr__(module, name))

    def _counted(self, *_: Any) -> None:
        self.samples += 1
        if self.config.interval and self.samples % self.config.interval == 0:
            self.write()

    def stats(self) -> Stats:
        """What was measured so far; nodes that never ran are left out."""
        parts: dict[str, dict[str, dict[int | str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
        ran = {node for node, part, _ in self.states if part != "params"}
        for (node, part, index), by_path in self.states.items():
            if node in ran:
                parts[node][part][index] = self._whole(part, list(by_path.values())).cpu()
        for (node, part, _), by_path in self.states.items():
            if not all(bool(state.isfinite().all()) for state in by_path.values()):
                reason = "no scale can be made of that; calibrate in bfloat16 or float32, and look at the checkpoint"
                raise UnsupportedError(f"{node}: its {part} were not finite", [reason])
        nodes = {node: node_of(held) for node, held in parts.items()}
        nodes |= self._lists(nodes)
        ordered = {name: nodes[name] for name in self.modules if name in nodes}
        mode, rank = MODES.get(self.config.observer, "DynamicRange"), self.rank if self.size > 1 else None
        return Stats(ordered, mode, rank, self.samples, tuple(self.modules))

    def _lists(self, nodes: dict[str, Node]) -> dict[str, Node]:
        """The projections of each expert, of stacks that ran."""
        found: dict[str, Node] = {}
        for name in self.modules:
            base, below, _ = name.partition(".moe_op.")
            if below and (op := nodes.get(f"{base}.moe_op")) is not None:
                found[name] = experts(op, name, self.states)
        return found

    def _whole(self, part: str, states: Sequence[Tensor]) -> Tensor:
        """Of modules that are one node: what they read is one tensor, what they make lies side by side."""
        if len(states) == 1 or self.config.observer == "shape":
            return states[0]
        if part == "inputs" or self.config.observer != "maxabs_per_channel":
            return torch.stack(list(states)).amax(0)
        return torch.cat(list(states))

    def write(self) -> list[Path]:
        return files.write(files.stem(self.config, self.rank, self.size), self.stats())

    def close(self) -> None:
        """The model is as it was."""
        while self._undo:
            self._undo.pop()()


class Look:
    """What is seen of one attention module."""

    def __init__(self, to: Measure, base: str, roles: set[str]):
        self.to, self.base, self.roles = to, base, roles

    def see(self, role: str, part: str, index: int, x: Tensor, axis: Axis = -1) -> None:
        if role in self.roles:
            self.to.see(f"{self.base}.{role}", part, index, x, axis=axis)

    def cached(self, key: Tensor, value: Tensor) -> None:
        for i, (x, product, cache) in enumerate(((key, "matmul_qk", "k_cache"), (value, "matmul_av", "v_cache"))):
            self.see(cache, "inputs", 0, x)
            self.see(product, "inputs", 1, x)
            self.see("fused_scaled_dot_product_attention", "inputs", 1 + i, x)

    def queries(self, query: Tensor, scaling: float) -> Tensor:
        scaled = query * scaling
        self.see("fused_scaled_dot_product_attention", "inputs", 0, query)
        self.see("matmul_qk", "inputs", 0, scaled)
        return scaled

    def weights(self, weights: Tensor) -> Tensor:
        self.see("softmax", "outputs", 0, weights, None)
        self.see("matmul_av", "inputs", 0, weights, None)
        self.see("fused_scaled_dot_product_attention", "outputs", 1, weights, None)
        return weights

    def output(self, out: Tensor) -> Tensor:
        self.see("matmul_av", "outputs", 0, out)
        self.see("fused_scaled_dot_product_attention", "outputs", 0, out)
        return out


class Intermediate:
    """A modules.experts.Watch that sees what each expert's second projection reads."""

    every: Sequence[int] = ()

    def __init__(self, to: Measure, node: str):
        self.to, self.node = to, node

    def routed(self, rows: Sequence[int]) -> None:
        pass

    def __call__(self, projection: str, x: Tensor, rows: Sequence[int]) -> None:
        if projection == "down_proj":
            for e, run in enumerate(torch.split(x, list(rows))):
                self.to.states[self.node, "outputs", 1 + e].setdefault("", torch.zeros(1, 1, device=x.device))
                self.to.see(self.node, "outputs", 1 + e, run)  # an expert without a token keeps a zero, as in INC

    def shown(self, projection: str, x: Tensor, expert: int) -> None:
        pass


def node_of(held: dict[str, dict[int | str, Tensor]]) -> Node:
    inputs, outputs = (tuple(held[part][i] for i in sorted(held[part], key=int)) for part in ("inputs", "outputs"))
    return Node(inputs, outputs, {str(name): x for name, x in held["params"].items()})


def experts(op: Node, name: str, states: dict[Key, dict[str, Tensor]]) -> Node:
    """One expert's projection: the first reads what all read, the second what the first made."""
    _, _, rest = name.partition(".moe_op.")
    kind, _, number = rest.partition(".")
    inputs = op.inputs if kind == "w13_list" else op.outputs[1 + int(number) : 2 + int(number)]
    weight = states.get((name, "params", "weight"))
    return Node(inputs, (), {} if weight is None else {"weight": weight[""].cpu()})
