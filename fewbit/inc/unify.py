"""Measurements of several ranks as those of fewer, and of one as those of several.

Ranks that each held a part of a tensor saw the maximum of that part: theirs together is the largest of them. Ranks that
each held some of the experts number theirs from 0: together they follow one another.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import CheckpointError, RequestError, UnsupportedError
from fewbit.inc.files import Node, Stats

EXPERT = re.compile(r"^(.*\b(?:w13_list|w2_list))\.(\d+)$")
MOE = re.compile(r"\b(moe_op|MoeOp)$")


def unify(parts: Sequence[Stats], expert_parallel: bool = False, rank: int | None = None) -> Stats:
    """parts: of ranks in their order. expert_parallel: each had experts of its own. rank: of the unified file."""
    if not parts:
        raise RequestError("there are no measurements to unify")
    if len({(part.mode, frozenset(part.nodes)) for part in parts}) > 1:
        odd = sorted({name for part in parts for name in part.nodes if not all(name in p.nodes for p in parts)})
        raise CheckpointError(f"measurements of ranks that cannot be unified: only some have {odd[:3] or 'that mode'}")
    experts = [1 + max((int(m[2]) for name in part.nodes if (m := EXPERT.match(name))), default=-1) for part in parts]
    nodes: dict[str, Node] = {}
    for name in parts[0].nodes:
        held = [part.nodes[name] for part in parts]
        if expert_parallel and (found := EXPERT.match(name)):
            for i, node in enumerate(held):
                nodes[f"{found[1]}.{sum(experts[:i]) + int(found[2])}"] = node
        else:
            nodes[name] = largest(name, held, side_by_side=expert_parallel and bool(MOE.search(name)))
    samples = [part.samples for part in parts if part.samples is not None]
    modules = tuple(dict.fromkeys(name for part in parts for name in part.modules))
    return replace(parts[0], nodes=nodes, rank=rank, samples=max(samples) if samples else None, modules=modules)


def largest(name: str, held: Sequence[Node], side_by_side: bool) -> Node:
    """side_by_side: outputs but the first are of experts."""
    outputs = [node.outputs[: 1 if side_by_side else None] for node in held]
    rest = [x for node in held for x in node.outputs[1:]] if side_by_side else []
    params = {key: of_params(name, [node.params[key] for node in held]) for key in held[0].params}
    return Node(each(name, [node.inputs for node in held]), (*each(name, outputs), *rest), params)


def each(name: str, rows: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    if len({len(row) for row in rows}) > 1:
        raise CheckpointError(f"{name}: ranks measured different numbers of tensors: {[len(row) for row in rows]}")
    return tuple(maximum(name, column) for column in zip(*rows, strict=True))


def of_params(name: str, values: Sequence[Any]) -> Any:
    if isinstance(values[0], dict):
        return {key: maximum(name, [value[key] for value in values]) for key in values[0]}
    return maximum(name, values)


def maximum(name: str, states: Sequence[Tensor]) -> Tensor:
    if len({x.shape for x in states}) > 1:
        reason = "channels that ranks share out cannot be put together from the files alone"
        raise UnsupportedError(f"{name}: ranks measured {[list(x.shape) for x in states]}", [reason])
    return torch.stack(list(states)).amax(0)


def postprocess(stats: Stats) -> Stats:
    """What is cached is what attention multiplies by: the second inputs of its products are those of the caches.

    The output of fused attention is the input of the output projection. In INC this is a step of the calibration.
    """
    nodes = dict(stats.nodes)
    for name in stats.nodes:
        base, _, role = name.rpartition(".")
        if role in CACHES:
            replaced = first_of(nodes, base, CACHES[role])
            if replaced is not None and len(nodes[name].inputs) > 1:
                inputs = (nodes[name].inputs[0], replaced, *nodes[name].inputs[2:])
                nodes[name] = replace(nodes[name], inputs=inputs)
        elif role == "fused_scaled_dot_product_attention" and nodes[name].outputs:
            reader = first_of(nodes, base.rpartition(".attn.impl")[0], ("o_proj",))
            if reader is not None:
                nodes[name] = replace(nodes[name], outputs=(reader, *nodes[name].outputs[1:]))
    return replace(stats, nodes=nodes)


CACHES = {"matmul_qk": ("k_cache", "latent_cache_k"), "matmul_av": ("v_cache", "k_cache", "latent_cache_k")}


def first_of(nodes: dict[str, Node], base: str, roles: Sequence[str]) -> Tensor | None:
    for role in roles:
        node = nodes.get(f"{base}.{role}")
        if node is not None and node.inputs:
            return node.inputs[0]
    return None


def expand(stats: Stats, size: int, expert_parallel: bool = False) -> list[Stats]:
    """Of one rank -> of so many; with experts dealt out, as each would have measured its own."""
    if size < 1:
        raise RequestError(f"expand to {size} ranks: want at least 1")
    if not expert_parallel:
        return [replace(stats, rank=r if size > 1 else None) for r in range(size)]
    count = 1 + max((int(m[2]) for name in stats.nodes if (m := EXPERT.match(name))), default=-1)
    count = count or max((len(node.outputs) - 1 for name, node in stats.nodes.items() if MOE.search(name)), default=0)
    if count % size:
        raise RequestError(f"{count} experts cannot be dealt out to {size} ranks")
    return [own(stats, r, count // size) for r in range(size)]


def own(stats: Stats, rank: int, each: int) -> Stats:
    nodes: dict[str, Node] = {}
    for name, node in stats.nodes.items():
        if found := EXPERT.match(name):
            number = int(found[2]) - rank * each
            if 0 <= number < each:
                nodes[f"{found[1]}.{number}"] = node
        elif MOE.search(name) and len(node.outputs) > 1:
            first = 1 + rank * each
            nodes[name] = replace(node, outputs=(node.outputs[0], *node.outputs[first : first + each]))
        else:
            nodes[name] = node
    return replace(stats, nodes=nodes, rank=rank)
