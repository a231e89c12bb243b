"""Roles: what a rotation of the residual stream, and of values, does to each parameter of a model."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn

from fewbit.models.fill import is_stack, owner
from fewbit.models.observe_values import Group, LayerWiring, bias_of, parameter
from fewbit.models.observe_wiring import Wiring, sizes


@dataclass(frozen=True, slots=True)
class Role:
    """What a rotation does to one parameter."""

    neutral: float | None = None  # a norm's weight that was taken out: what stands there instead
    norm: tuple[str, int] | None = None  # parameter and offset of the norm that multiplies the columns
    inward: bool = False  # reads the stream: columns turn
    outward: bool = False  # adds to the stream: rows turn
    rows: Tensor | None = None  # [heads, size], values, turned head by head
    columns: int = 0  # reads values, in heads of this size


def roles(wiring: Wiring, config: Any, model: nn.Module) -> dict[str, Role]:
    """Every parameter that a rotation changes, by full path. model: of the untied config, weightless."""
    held = dict(model.named_parameters())
    found = dict(ends(wiring))
    for i, layer in enumerate(wiring.for_model(config)):
        prefix = f"{wiring.path}.{i}"
        for path, role in of_layer(layer, model.get_submodule(prefix), prefix, wiring.stream.heads):
            name = parameter(held, f"{prefix}.{path}")
            bias = (bias_of(name),) if (role.outward or role.rows is not None) and bias_of(name) in held else ()
            for each in (name, *bias):
                found[each] = joined(found.get(each, Role()), role)
    return found


def ends(wiring: Wiring) -> Iterator[tuple[str, Role]]:
    stream = wiring.stream
    yield f"{stream.embedding}.weight", Role(inward=True)
    if stream.norm is not None:
        norm = f"{stream.norm.path}.weight"
        yield norm, Role(neutral=1.0 - stream.norm.offset)
        yield f"{stream.head}.weight", Role(norm=(norm, stream.norm.offset), inward=True)


def of_layer(layer: LayerWiring, module: nn.Module, prefix: str, heads: bool) -> Iterator[tuple[str, Role]]:
    """Roles of one layer's paths; a path may have several."""
    for group in layer.groups:
        source = group.source
        if source is not None and source.kind == "norm" and source.path in layer.readers:
            yield source.path, Role(neutral=1.0 - source.offset)
            norm = (f"{prefix}.{source.path}.weight", source.offset)
            yield from ((path, Role(norm=norm, inward=True)) for path in group.readers)
        elif any(path in layer.readers for path in group.linears):
            yield from ((path, Role(inward=True)) for path in group.readers)
        if heads and source is not None and source.head:
            yield from of_values(group, module)
    yield from ((path, Role(outward=True)) for path in layer.writers)


def of_values(group: Group, module: nn.Module) -> Iterator[tuple[str, Role]]:
    source, (path, *_) = group.source, group.linears
    assert source is not None
    rows = source.heads(sizes(module, source.path)[0], sizes(module, path)[1], source.head)
    yield source.path, Role(rows=rows)
    yield path, Role(columns=source.head)


def joined(a: Role, b: Role) -> Role:
    """What both say; they never speak of the same thing."""
    return replace(a, **{f.name: value for f in fields(Role) if (value := getattr(b, f.name)) != f.default})


def turned(model: nn.Module, path: str) -> bool:
    """True for a stack whose matrices stand as [K, N]."""
    host, leaf = owner(model, path)
    held = host._parameters.get(leaf)
    return is_stack(host) and bool(host.is_transposed) and held is not None and held.dim() == 3


def untied(config: Any) -> Any:
    """The config with a head of its own."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    return config


def untied_raw(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a config.json."""
    out = copy.deepcopy(dict(config)) | {"tie_word_embeddings": False}
    if isinstance(out.get("text_config"), dict):
        out["text_config"]["tie_word_embeddings"] = False
    return out
