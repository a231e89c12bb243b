"""The residual stream: what reads it, what adds to it, and whether it may be rotated."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fewbit.models import hf
from fewbit.models.observe_derive import carries, made_of
from fewbit.models.observe_proof import Bench, proven
from fewbit.models.observe_taps import Passage, Seen, Tap, reader, tap_of, writer
from fewbit.models.observe_values import Group, LayerWiring, Refused, Source, Stream


def streaming(seen: Seen, taps: dict[str, Tap], index: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """-> paths in one layer of what reads the stream, and of what adds to it."""
    if len(seen.layers[index]) != 1:
        return (), ()
    passage = seen.layers[index][0]
    reads = {p: tap for p, tap in taps.items() if any(carries(x, passage.start) for x in tap.inputs)}
    adds = {p: tap for p, tap in taps.items() if any(carries(passage.gave, z) for z in tap.shifts)}
    return tuple(reader(p, tap) for p, tap in reads.items()), tuple(writer(p, tap) for p, tap in adds.items())


def ends(seen: Seen, bench: Bench, layers: Sequence[LayerWiring]) -> Stream:
    """The stream from the embedding to the head, and every reason against rotating it."""
    outer = {p: tap for p, tap in seen.taps.items() if not p.startswith(f"{bench.path}.")}
    embedding, reasons = first(seen, outer)
    head = head_of(bench.model, outer)
    norm, doubts = last(seen, bench, outer, head)
    reasons += doubts
    reasons += list(between(seen.layers))
    for layer in layers:
        reasons += list(against(seen, bench, layer))
    return Stream(embedding, norm, head, False, tuple(dict.fromkeys(reasons)))


def first(seen: Seen, outer: dict[str, Tap]) -> tuple[str, list[str]]:
    """The embedding that the stream begins with."""
    tables = [p for p, tap in outer.items() if tap.kind == "embedding" and tap.shifts]
    if not tables or not seen.layers[0]:
        return "", ["no embedding found"]
    came = seen.layers[0][0].came
    found = [p for p in tables if carries(came, outer[p].shifts[0])]
    came = came.detach()
    if len(found) != 1:
        return "", [f"the stream is not an embedding's output: {', '.join(tables)}"]
    value = outer[found[0]].outputs[0]
    factor = float((came * value).sum() / (value * value).sum())
    if bool((came - factor * value).abs().max() > 1e-5 * came.abs().max()):
        return found[0], ["something is added to the embeddings"]
    return found[0], []


def head_of(model: nn.Module, outer: dict[str, Tap]) -> str:
    head = hf.output_head(model)
    return next((p for p, tap in outer.items() if tap.module is head and len(tap.inputs) == 1), "")


def last(seen: Seen, bench: Bench, outer: dict[str, Tap], head: str) -> tuple[Source | None, list[str]]:
    """The norm between the last layer and the head."""
    if not head:
        return None, ["no output head found"]
    makers = made_of(outer[head].inputs[0], outer.values())
    norms = [p for p, index in makers.items() if outer[p].kind == "norm" and same(index, torch.arange(len(index)))]
    if not norms or not seen.layers[-1]:
        return None, [f"{head} does not read a norm"]
    found = proven(bench, -1, "", Group((head,), Source("norm", norms[0])))
    if isinstance(found, Refused) or found.source is None:
        return None, [str(found)]
    tap = outer[norms[0]]
    reasons = [] if carries(tap.inputs[0], seen.layers[-1][0].end) else [f"{norms[0]} does not read the stream"]
    return found.source, reasons + list(plain(tap, found.source.offset, norms[0]))


def between(layers: Sequence[Sequence[Passage]]) -> Iterator[str]:
    """What happens between layers and must not."""
    if any(len(passages) != 1 for passages in layers):
        yield "layers are not called once each"
        return
    single = [passages[0] for passages in layers]
    for i, passage in enumerate(single):
        if not carries(passage.gave, passage.start):
            yield f"layer {i} does not pass the stream on"
        if i and not same(single[i - 1].end, passage.came):
            yield f"something happens between layers {i - 1} and {i}"


def same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape and torch.equal(a, b)


def against(seen: Seen, bench: Bench, layer: LayerWiring) -> Iterator[str]:
    """What in one layer speaks against rotating the stream."""
    prefix = f"{bench.path}.{layer.index}"
    for path in layer.readers:
        tap = tap_of(seen.taps, f"{prefix}.{path}")
        if tap.kind != "norm":
            if tap.kind == "other":
                yield f"{path} reads the stream, and is no linear"
            continue
        sources = [g.source for g in layer.groups if g.source and g.source.path == path]
        if not sources:
            yield f"{path}: its weight cannot be taken into what reads it"
        else:
            yield from plain(tap, sources[0].offset, path)
    for path in layer.writers:
        kind = tap_of(seen.taps, f"{prefix}.{path}").kind
        if kind == "norm":
            yield f"{path} stands between a linear and the stream: its weight cannot be rotated"
        elif kind == "other":
            yield f"{path} adds to the stream, and is no linear"
    if not layer.writers:
        yield f"layer {layer.index}: nothing found that adds to the stream"


def plain(tap: Tap, offset: int, path: str) -> Iterator[str]:
    """Why a norm with its weight taken out does not commute with a rotation."""
    if tap.module._parameters.get("bias") is not None:
        yield f"{path} has a bias"
        return
    x = tap.inputs[0].detach()
    q = torch.linalg.qr(torch.randn(x.shape[-1], x.shape[-1], generator=torch.Generator().manual_seed(6)))[0]
    held = tap.module._parameters["weight"]
    tap.module._parameters["weight"] = nn.Parameter(torch.full_like(held, 1 - offset), requires_grad=False)
    try:
        with torch.no_grad():
            straight, turned = tap.module(x), tap.module(x @ q)
    finally:
        tap.module._parameters["weight"] = held
    if bool((straight @ q - turned).abs().max() > 1e-4 * straight.abs().max()):
        yield f"{path} does more than divide by a root mean square (it subtracts the mean)"
