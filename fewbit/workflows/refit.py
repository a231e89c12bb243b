"""refit: a module as another dialect holds it: its codes carried over, or new ones where that was asked for."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewbit.codecs.source import Source
from fewbit.errors import UnsupportedError
from fewbit.models.values import sibling_groups
from fewbit.quant import qtensor
from fewbit.quant.formats import FORMATS, get
from fewbit.quant.qtensor import Quantized
from fewbit.quant.recast import recast
from fewbit.quant.reference import choose, decode, encode
from fewbit.quant.spec import Format, QuantSpec, describe


def shared_outer(source: Source, items: dict[str, str], codec: Any, requantize: bool | str) -> dict[str, Tensor]:
    """Module -> the outer scale it shares with the siblings that engines fuse with it (NVFP4 and its like)."""
    if not isinstance(requantize, str):
        return {}
    spec = codec.fit(get(requantize)).weight
    if len(spec.scales) != 2 or spec.scales[1].block != (0, 0):
        return {}
    shared = {}
    for group in sibling_groups(items).values():
        planes = [choose(effective(source.read(items[name])), spec, {})["scale1"] for name in group]
        largest = torch.stack(planes).amax(0) if spec.scales[1].op == "mul" else torch.stack(planes).amin(0)
        shared |= dict.fromkeys(group, largest)
    return shared


def refit(
    name: str, old: Quantized | Tensor, codec: Any, requantize: bool | str, outer: dict[str, Tensor]
) -> Quantized:
    """A module as the dialect holds it: recast where the codes carry over, encoded anew only when allowed."""
    if isinstance(requantize, str):
        return encode_anew(name, old, codec.fit(get(requantize)), outer.get(name))
    assert isinstance(old, Quantized)
    try:
        target = codec.fit(old.format)
        return replace(old, format=target, weight=recast(old.weight, target.weight), act=_act(old, target))
    except UnsupportedError as error:
        if not requantize:
            hint = "--requantize chooses new codes and prints what that costs"
            raise UnsupportedError(f"{name}: {error}", [hint]) from error
    return encode_anew(name, old, nearest(old.format, codec))


def _act(old: Quantized, target: Format) -> dict[str, Tensor]:
    """Static activation planes in the target's convention (a stored reciprocal, or not)."""
    if not old.act or old.format.act is None or target.act is None or not same_input(old.format.act, target.act):
        return {}
    planes = {}
    for name, plane in old.act.items():
        if not name.startswith("scale"):
            planes[name] = plane
            continue
        before, after = (f.scales[int(name[-1])] for f in (old.format.act, target.act))
        value = plane.float()
        planes[name] = (1 / value if before.op != after.op else value).to(after.element.dtype)
    return planes


def same_input(a: QuantSpec, b: QuantSpec) -> bool:
    """True when both round an input alike, reciprocals and the float type of scales aside."""
    blocks = [[(scale.block, scale.dynamic) for scale in spec.scales] for spec in (a, b)]
    return a.element == b.element and blocks[0] == blocks[1]


def nearest(form: Format, codec: Any) -> Format:
    """The format of FORMATS that a dialect holds and that is nearest in size, never smaller where one is not."""
    bits = qtensor.bits_per_weight(form.weight)
    held = []
    for row in FORMATS.values():
        if row.weight.element.kind == "run" or (row.act is None) != (form.act is None):
            continue
        try:
            held.append(codec.fit(row))
        except UnsupportedError:
            continue
    if not held:
        raise UnsupportedError(f"{codec.name} holds no format like {describe(form.weight)}")
    return min(held, key=lambda f: _distance(qtensor.bits_per_weight(f.weight) - bits, f, form))


def _distance(gap: float, f: Format, form: Format) -> tuple[float, float, bool]:
    wider = f.weight.element.bits - form.weight.element.bits
    return abs(wider) + (10 if wider < 0 else 0), abs(gap), f.weight.element != form.weight.element


def encode_anew(name: str, old: Quantized | Tensor, target: Format, outer: Tensor | None = None) -> Quantized:
    act = _act(old, target) if isinstance(old, Quantized) else {}
    static = {f"scale{i}" for i, scale in enumerate(target.act.scales) if not scale.dynamic} if target.act else set()
    if static - act.keys():
        reason = "its activations have static scales, which only calibration on text can give"
        raise UnsupportedError(f"{name}: cannot be requantized to {describe(target.weight)}", [reason])
    given = {} if outer is None else {"scale1": outer}
    return Quantized(target, encode(effective(old), target.weight, given), act)


def effective(q: Quantized | Tensor) -> Tensor:
    """The dense weight that does the same to an unrounded input: transforms folded in. [..., N, K] float32."""
    if isinstance(q, Tensor):
        return q.float()
    w = decode(q.weight)
    for transform in reversed(q.transforms):
        t = transform.tensors
        if transform.kind == "permute":
            w = torch.empty_like(w).index_copy_(-1, t["index"].long(), w)
        elif transform.kind == "input_scale":
            w = w * t["scale"].float()
        elif transform.kind == "rotate":
            matrix = t["matrix"].float()
            w = (w.unflatten(-1, (-1, matrix.shape[0])) @ matrix.T).flatten(-2)
        elif transform.kind == "low_rank":
            w = w + t["b"].float() @ t["a"].float()
    return w
