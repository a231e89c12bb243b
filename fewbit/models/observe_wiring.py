"""Wiring: what observation found in a twin, and the same for the layers of the real model.

A real layer is like a twin's layer that has the same modules; where several do and say different things, what they
agree on holds. Sizes of heads are read off the real layer under the name that was right in the twin.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fewbit.errors import UnsupportedError
from fewbit.models import hf
from fewbit.models.fill import is_stack
from fewbit.models.observe_values import Group, LayerWiring, Refused, Source, Stream, kind, structure

KV_GROUPS = ("num_key_value_groups", "n_rep")  # attributes of attention that say how many queries share a key


@dataclass(frozen=True, slots=True)
class Wiring:
    """layers: those of the twin, in order. refused: what was looked for and not found true, with figures."""

    model_type: str
    path: str  # of the list of decoder layers in the model
    layers: tuple[LayerWiring, ...]
    stream: Stream
    refused: tuple[Refused, ...] = ()
    attention: str = hf.OURS  # the implementation that the model is built with
    _real: dict[str, tuple[LayerWiring, ...]] = field(default_factory=dict, repr=False, compare=False)

    def for_layer(self, i: int, config: Any) -> LayerWiring:
        """Layer i of the model of a config, sizes and all."""
        found = self.for_model(config)
        if not 0 <= i < len(found):
            raise UnsupportedError(f"layer {i} of {self.model_type}: the model has {len(found)} that were observed")
        return found[i]

    def for_model(self, config: Any) -> tuple[LayerWiring, ...]:
        """Every layer of the model of a config."""
        key = config.to_json_string(use_diff=False)
        if key not in self._real:
            self._real[key] = tuple(fitted(self, config))
        return self._real[key]

    def __str__(self) -> str:
        return "\n".join(lines(self))


def lines(wiring: Wiring) -> Iterator[str]:
    """The wiring for people: layers that are alike once."""
    yield f"{wiring.model_type}: layers at {wiring.path or '(none)'}"
    told: set[tuple[Group, ...]] = set()
    for layer in wiring.layers:
        if layer.groups not in told:
            told.add(layer.groups)
            yield f"  layer {layer.index}" + (f" ({layer.kind})" if layer.kind else "")
            yield from (f"    {_line(group)}" for group in layer.groups)
    yield "  rotation: " + ("; ".join(wiring.stream.reasons) or ("with values" if wiring.stream.heads else "yes"))
    yield from (f"  refused: {refused}" for refused in wiring.refused)


def _line(group: Group) -> str:
    s = group.source
    told = f"{s.kind} {s.path}" + (f", {s.layout} rows, repeat {s.repeat}" if s.kind == "linear" else "") if s else "-"
    also = f" (also {', '.join(group.also)})" if group.also else ""
    return f"{' + '.join(group.linears)}{also} <- {told}"


def fitted(wiring: Wiring, config: Any) -> Iterator[LayerWiring]:
    if not wiring.path:
        return
    model = hf.build(config, torch.float32, wiring.attention)
    for i, layer in enumerate(model.get_submodule(wiring.path)):
        held, named = structure(layer), kind(model.config, i)
        like = [w for w in wiring.layers if w.structure == held]
        like = [w for w in like if w.kind == named] or like
        found = merged(like) if like else LayerWiring(i, named, held, tuple(borrowed(wiring.layers, held)))
        groups = tuple(replace(g, source=sized(g, layer)) for g in found.groups)
        yield replace(found, index=i, kind=named, groups=groups)


def borrowed(layers: Sequence[LayerWiring], held: frozenset[tuple[str, str]]) -> Iterator[Group]:
    """For a layer like none of the twin's: groups whose readers it has, without sources, since nothing proves them."""
    told: set[str] = set()
    for layer in layers:
        known = layer.structure & held
        paths = {path for path, _ in known}
        for group in layer.groups:
            if told.isdisjoint(group.linears) and all(
                p in paths or p.rpartition(".")[0] in paths for p in group.readers
            ):
                told.update(group.linears)
                yield Group(group.linears)


def merged(like: Sequence[LayerWiring]) -> LayerWiring:
    """What layers of one structure agree on."""
    first, *others = like
    groups = []
    for group in first.groups:
        same = [w.group_of(group.linears[0]) for w in others]
        if all(g is not None and g.linears == group.linears for g in same):
            agreed = all(g == group for g in same)
            groups.append(group if agreed else Group(group.linears))
    return replace(first, groups=tuple(groups))


def sized(group: Group, layer: nn.Module) -> Source | None:
    """The group's source with the real layer's sizes; None where the layer does not say them."""
    source = group.source
    if source is None or source.kind == "norm":
        return source
    n, k = outputs(layer, source.path), inputs(layer, group.linears[0])
    if not source.named:
        return source
    size = attribute(layer, source.path, (source.named,))
    runs = 1 if source.block == 0 else 0
    repeat = source.repeat if runs else repeats(source, layer, n, k)
    if not size or not repeat or k % (repeat * size):
        return None
    found = replace(source, repeat=repeat, block=0 if runs else size, head=size if source.head else 0)
    return found if int(found.rows(n, k).max()) < n else None


def repeats(source: Source, layer: nn.Module, n: int, k: int) -> int | None:
    """How many runs of channels one run of rows serves."""
    if source.layout == "all":
        return k // n if n and k % n == 0 else None
    return attribute(layer, source.path, KV_GROUPS) or (1 if source.repeat == 1 else None)


def attribute(layer: nn.Module, path: str, names: Sequence[str]) -> int | None:
    """A number that a module around this one says, nearest first."""
    while path:
        path = path.rpartition(".")[0]
        for name in names:
            value = getattr(layer.get_submodule(path), name, None)
            if isinstance(value, int):
                return value
    return None


def outputs(layer: nn.Module, path: str) -> int:
    return sizes(layer, path)[0]


def inputs(layer: nn.Module, path: str) -> int:
    return sizes(layer, path)[1]


def sizes(layer: nn.Module, path: str) -> tuple[int, int]:
    """N and K of a linear or of a stack of experts."""
    parent, _, leaf = path.rpartition(".")
    host = layer.get_submodule(parent)
    if is_stack(host):
        shape = getattr(host, leaf).shape
        return (shape[-1], shape[-2]) if host.is_transposed else (shape[-2], shape[-1])
    shape = layer.get_submodule(path).weight.shape
    return shape[0], shape[1]
