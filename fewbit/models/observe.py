"""observe: how an architecture is wired, read off its twin: what reads the same tensor, what that tensor is made of.

Nothing here knows an architecture. Values and derivatives of one run propose; a change of the twin's weights that
should change nothing proves, or the proposal is refused with the figure. `observe` never raises: it refuses.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from fewbit.errors import FewbitError
from fewbit.models import hf, twin
from fewbit.models.observe_derive import fit, gate_rows, head_sizes, made_of
from fewbit.models.observe_proof import BEYOND, Bench, proven, turns
from fewbit.models.observe_stream import ends, streaming
from fewbit.models.observe_taps import Seen, Tap, layers_path, reader, same_input, tap_of, watch, writer
from fewbit.models.observe_values import Group, LayerWiring, Refused, Source, Stream, kind, structure
from fewbit.models.observe_wiring import Wiring, sizes
from fewbit.models.rewrite import Rotated
from fewbit.models.shrink import shrink

_WIRINGS: dict[str, Wiring] = {}  # by class and shrunk config


def observe(config: Any) -> Wiring:
    """The wiring of a config's architecture; the same for all of its sizes."""
    name = str(getattr(config, "model_type", ""))
    try:
        small = shrink(config)
        key = type(config).__name__ + small.to_json_string(use_diff=False)
        if key not in _WIRINGS:
            with torch.enable_grad():  # derivatives tell what makes an input, whatever the caller has turned off
                _WIRINGS[key] = looked_at(small, twin.require(config))
        return _WIRINGS[key]
    except Exception as error:  # whatever a model definition raises on this config is the finding
        return Wiring(name, "", (), Stream(reasons=(twin.told(error),)), (Refused(name, twin.told(error)),))


def looked_at(small: Any, attention: str) -> Wiring:
    state, model = twin.filled(small, attention)
    ids = torch.randint(10, 100, (2, twin.LENGTH), generator=torch.Generator().manual_seed(0))
    path = layers_path(model, ids)
    seen, bench = watch(model, path, ids), Bench(model, path, ids)
    layers: list[LayerWiring] = []
    refused: list[Refused] = []
    known: Known = {}
    for i in range(len(seen.layers)):
        layer, doubts = observed(seen, bench, i, known)
        layers.append(replace(layer, kind=kind(model.config, i)))
        refused += doubts
    wiring = Wiring(small.model_type, path, tuple(layers), Stream(), tuple(refused), attention)
    try:
        wiring = replace(wiring, stream=ends(seen, bench, layers))
        return wiring if wiring.stream.reasons else replace(wiring, stream=rotatable(wiring, small, state, bench))
    except Exception as error:  # what the layers showed stays true
        return replace(wiring, stream=Stream(reasons=(twin.told(error),)))


def rotatable(wiring: Wiring, small: Any, state: dict[str, torch.Tensor], bench: Bench) -> Stream:
    """The stream as the rotated twin proves it: with the values of attention, without them, or not at all."""
    heads = any(g.source is not None and g.source.head for layer in wiring.layers for g in layer.groups)
    reason = ""
    for turned in (True, False) if heads else (False,):
        stream = replace(wiring.stream, heads=turned)
        try:
            error = rotation_error(replace(wiring, stream=stream), small, state, bench)
        except FewbitError as refusal:
            reason = str(refusal)
            continue
        if error <= BEYOND:
            return stream
        reason = f"the rotated twin's logits differ by {error:.2g}, allowed {BEYOND:.0e}"
    return replace(wiring.stream, reasons=(reason,))


def rotation_error(wiring: Wiring, small: Any, state: dict[str, torch.Tensor], bench: Bench) -> float:
    rotated = Rotated(twin.Memory(state), wiring, config=small)
    model = hf.build(rotated.hf_config, torch.float32, wiring.attention)
    twin.fill(model, rotated)
    with torch.no_grad():
        got = model(input_ids=bench.ids, use_cache=False).logits
    return twin.relative(got, bench.wanted[-1])


Known = dict[tuple[Any, ...], list[Source | Refused]]


def observed(seen: Seen, bench: Bench, index: int, known: Known) -> tuple[LayerWiring, list[Refused]]:
    """One layer. known: sources proposed for groups of layers with the same modules."""
    prefix = f"{bench.path}.{index}"
    layer = bench.model.get_submodule(prefix)
    taps = {p[len(prefix) + 1 :]: tap for p, tap in seen.taps.items() if p.startswith(f"{prefix}.")}
    held, groups, refused = structure(layer), [], []
    for group in grouped(taps):
        key = (held, group)
        if key not in known:
            known[key] = list(proposed(taps, layer, group))
        found, doubts = chosen(bench, index, prefix, group, known[key])
        groups.append(found)
        refused += doubts
    refused += [Refused(f"{prefix}: {p}", "never called") for p, t in taps.items() if not t.inputs and weighty(t)]
    readers, writers = streaming(seen, taps, index)
    return LayerWiring(index, "", held, tuple(groups), readers, writers), refused


def weighty(tap: Tap) -> bool:
    return tap.kind in ("linear", "experts")


def grouped(taps: dict[str, Tap]) -> Iterator[Group]:
    """What reads one tensor, together; then the second projection of every stack."""
    left = {path: tap for path, tap in taps.items() if tap.inputs and weighty(tap)}
    others = {path: tap for path, tap in taps.items() if tap.kind == "other" and scalable(tap)}
    while left:
        first = next(iter(left.values()))
        same = {p: tap for p, tap in left.items() if tap is first or same_input(first, tap)}
        left = {p: tap for p, tap in left.items() if p not in same}
        also = tuple(p for p, tap in others.items() if same_input(first, tap))
        yield Group(tuple(reader(p, tap) for p, tap in same.items()), None, also)
    yield from (Group((writer(p, tap),)) for p, tap in taps.items() if tap.inputs and tap.kind == "experts")


def scalable(tap: Tap) -> bool:
    """True for a module with a weight whose columns are its inputs, as a router's."""
    weight = tap.module._parameters.get("weight")
    return bool(tap.inputs) and weight is not None and weight.dim() > 1 and weight.shape[-1] == tap.inputs[0].shape[-1]


def proposed(taps: dict[str, Tap], layer: torch.nn.Module, group: Group) -> Iterator[Source | Refused]:
    """Where a scaling of the group's input might be taken out."""
    path = group.linears[0]
    tap = tap_of(taps, path)
    if tap.kind == "experts" and path != reader(path.rpartition(".")[0], tap):
        yield from gated(tap, layer, path)
        return
    if len(tap.inputs) != 1:
        yield Refused(", ".join(group.linears), f"called {len(tap.inputs)} times")
        return
    x = tap.inputs[0]
    for maker, index in made_of(x, taps.values()).items():
        name = next(p for p, t in taps.items() if t.path == maker)
        if taps[name].kind == "norm" and torch.equal(index, torch.arange(x.shape[-1])):
            yield Source("norm", name)
        elif taps[name].kind == "linear":
            n = taps[name].scales[0].numel()
            yield fit(index, n, layer, name) or Refused(f"{path} <- {name}", "its rows are in no order that is known")


def gated(tap: Tap, layer: torch.nn.Module, path: str) -> Iterator[Source | Refused]:
    """The rows of a stack's first projection that its second is fed by."""
    host = tap.module
    first = reader(path.rpartition(".")[0], tap)
    n, _ = sizes(layer, first)
    index = gate_rows(host, n)
    if index is None:
        yield Refused(f"{path} <- {first}", f"{type(host).__name__} does more than multiply by some of its rows")
    else:
        yield fit(index, n, layer, first) or Refused(f"{path} <- {first}", "its rows are in no order that is known")


def chosen(
    bench: Bench, index: int, prefix: str, group: Group, sources: Sequence[Source | Refused]
) -> tuple[Group, list[Refused]]:
    """The group with the first source that is proven, and what was refused before it."""
    refused: list[Refused] = []
    for source in sources:
        found = source if isinstance(source, Refused) else proven(bench, index, prefix, replace(group, source=source))
        if isinstance(found, Group):
            return with_heads(bench, index, prefix, found), refused
        refused.append(replace(found, what=found.what if found.what.startswith(prefix) else f"{prefix}: {found.what}"))
    return group, refused


def with_heads(bench: Bench, index: int, prefix: str, group: Group) -> Group:
    """The group, its source saying how long the runs are that may be turned."""
    source = group.source
    if source is not None and source.kind == "linear":
        for name, size in head_sizes(bench.model.get_submodule(prefix), source.path):
            if turns(bench, index, prefix, group, size):
                return replace(group, source=replace(source, head=size, named=name))
    return group
