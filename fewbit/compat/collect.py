"""What a model with quantizers holds, as a dialect stores it: one Quantized per matrix on disk, KV scales, the plan."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fewbit.codecs.codec import Codec
from fewbit.compat.insert import CACHE, OTHERS, QuantLinear, matrix, weights
from fewbit.compat.quantizer import Quantizer
from fewbit.errors import UnsupportedError
from fewbit.models import hf
from fewbit.models.placement import Placement
from fewbit.modules.attention import is_attention
from fewbit.quant import qtensor
from fewbit.quant.qtensor import QTensor, Quantized, Transform
from fewbit.quant.recast import recast
from fewbit.quant.spec import Format, QuantSpec
from fewbit.workflows.export import Held

PROJECTIONS = (".k_proj.weight", ".qkv_proj.weight", ".kv_b_proj.weight", ".o_proj.weight")
STATE = ("quantizer._", "svdquant_lora_")  # parts of names that only our modules add to a state dict


def collect(model: Any, codec: Codec) -> Held:
    """Everything that `export` writes."""
    state = {n: t for n, t in hf.disk_state(model).items() if not any(part in n for part in STATE)}
    places = hf.placements(model, [n for n in state if n.endswith(".weight") or state[n].dim() == 3])
    held = Held(codec, dense=state)
    for path, name, module, quantizer, inputs in weights(model):
        parameter = f"{path}.{name}"
        disk = {n: p for n, p in places.items() if p is not None and parameter in p.targets}
        check(parameter, disk, quantizer, inputs)
        if not quantizer.enabled:
            continue
        weight = quantizer.encode(whole_blocks(parameter, quantizer.spec, matrix(module, name)))
        for n, (expert, start, stop) in slots(disk, state).items():
            one = cut(weight, expert, start, stop)
            q, form = quantized(one, inputs, codec, lora(module) if isinstance(module, QuantLinear) else ())
            held.add(n.removesuffix(".weight"), q, form)
            del held.dense[n]
    held.ignored = dense_linears(model, held.dense, places)
    held.kv, held.kv_spec = caches(model, places)
    return held


def check(parameter: str, disk: Mapping[str, Placement], quantizer: Quantizer, inputs: Quantizer) -> None:
    if not quantizer.enabled:
        if inputs.enabled:
            reasons = [
                "checkpoints hold formats of quantized weights; switch its input quantizer off, or its weight's on"
            ]
            raise UnsupportedError(f"{parameter}: its input is rounded and its weight is not", reasons)
        if inputs._pre_quant_scale is not None:
            raise UnsupportedError(f"{parameter}: it was smoothed, and its weight quantizer is off")
        return
    if not disk:
        raise UnsupportedError(f"{parameter}: is saved under another name (tied), and cannot be quantized alone")
    if any(p.group is not None or p.swap or len(p.targets) > 1 for p in disk.values()):
        reasons = [f"on disk it is {', '.join(list(disk)[:3])}"]
        raise UnsupportedError(f"{parameter}: transformers rearranges it when it saves", reasons)


def whole_blocks(parameter: str, spec: QuantSpec | None, w: Tensor) -> Tensor:
    cols = spec.scales[0].block[1] if spec is not None else 0
    if cols and w.shape[-1] % cols:
        reasons = [f"blocks of {cols} do not divide its {w.shape[-1]} inputs; in memory the last one is filled up"]
        raise UnsupportedError(f"{parameter}: cannot be written", reasons)
    return w


def slots(disk: Mapping[str, Placement], state: Mapping[str, Tensor]) -> dict[str, tuple[int | None, int, int]]:
    """Name on disk -> (expert, first row, end) of the parameter."""
    by: dict[int | None, list[str]] = defaultdict(list)
    for name in sorted(disk, key=lambda n: disk[n].part):
        by[disk[name].expert].append(name)
    out = {}
    for expert, names in by.items():
        start = 0
        for name in names:
            stop = start + state[name].shape[-2]
            out[name] = expert, start, stop
            start = stop
    return out


def cut(q: QTensor, expert: int | None, start: int, stop: int) -> QTensor:
    if expert is not None:
        q = QTensor(q.spec, q.shape[1:], {n: p[expert] for n, p in q.planes.items()})
    return q if stop - start == q.shape[-2] else qtensor.slice(q, -2, start, stop)


def lora(module: QuantLinear) -> tuple[Transform, ...]:
    if getattr(module, "svdquant_lora_a", None) is None:
        return ()
    return (Transform("low_rank", {"a": module.svdquant_lora_a, "b": module.svdquant_lora_b}),)


def quantized(
    weight: QTensor, inputs: Quantizer, codec: Codec, more: tuple[Transform, ...] = ()
) -> tuple[Quantized, Format]:
    """-> the module as the dialect holds it, and the format that its config names."""
    assert codec.fit is not None
    smooth = inputs._pre_quant_scale
    transforms = (() if smooth is None else (Transform("input_scale", {"scale": smooth}),)) + more
    act = inputs.spec if inputs.enabled else None
    form = codec.fit(Format(weight.spec, act and named(weight.spec, act), tuple(t.kind for t in transforms)))
    run = replace(form, act=form.act and replace(act, rule=form.act.rule)) if act is not None else form
    planes = inputs.planes if act is not None and not act.scales[-1].dynamic else {}
    return Quantized(run, recast(weight, form.weight), planes, transforms), form


def named(weight: QuantSpec, act: QuantSpec) -> QuantSpec:
    """FP4 weights with inputs in FP8: uncalibrated, they go by the name of the calibrated format."""
    whole = len(act.scales) == 1 and act.scales[0].block == (0, 0)
    if whole and act.dynamic and weight.element.bits == 4:
        return replace(act, scales=(replace(act.scales[0], dynamic=False),))
    return act


def dense_linears(model: Any, dense: Mapping[str, Tensor], places: Mapping[str, Placement | None]) -> list[str]:
    """Modules that a rule on linears would cover and that stay dense: the head, routers, what was switched off."""
    found = []
    for name, tensor in dense.items():
        place = places.get(name)
        if place is None or tensor.dim() != 2 or not name.endswith(".weight"):
            continue
        module = model.get_submodule(place.target.rpartition(".")[0])
        if not isinstance(module, nn.Embedding):
            found.append(name.removesuffix(".weight"))
    return found


def caches(
    model: Any, places: Mapping[str, Placement | None]
) -> tuple[dict[str, tuple[Tensor | None, Tensor | None]], QuantSpec | None]:
    """Attention modules on disk -> the scales of k and v, where they are static; and the spec of all."""
    held, specs = {}, set()
    for path, module in model.named_modules():
        if not is_attention(module):
            continue
        pair = [getattr(module, leaf, None) for leaf in CACHE]
        if any(getattr(getattr(module, leaf, None), "enabled", False) for leaf in OTHERS):
            reasons = ["a checkpoint has no place for their scales"]
            raise UnsupportedError(f"{path}: queries or probabilities are rounded too", reasons)
        if any(q is not None and q.enabled and (q.affine or q.turned) for q in pair):
            reasons = ["a cache with a bias, or one in another basis, has no place in a checkpoint that engines read"]
            raise UnsupportedError(f"{path}: its cache cannot be written", reasons)
        specs.add(tuple(q.spec if q is not None and q.enabled else None for q in pair))
        if any(q is not None and q.enabled for q in pair):
            held[disk_name(path, places)] = pair
    if not held:
        return {}, None
    if len(specs) > 1 or len(set(next(iter(specs)))) > 1:
        reasons = [
            "every attention, and its keys and values, must be rounded alike: a config has one cache for the model"
        ]
        raise UnsupportedError("the cache is quantized in part", reasons)
    spec = next(iter(specs))[0]
    return {name: (scale(k), scale(v)) for name, (k, v) in held.items()}, spec


def scale(quantizer: Any) -> Tensor | None:
    plane = quantizer.planes.get(f"scale{len(quantizer.spec.scales) - 1}")
    return None if plane is None else plane.reshape(())


def disk_name(path: str, places: Mapping[str, Placement | None]) -> str:
    """An attention module's name on disk, by way of a projection that KV scales are named after or stand beside."""
    for name, place in places.items():
        if place is not None and place.target.startswith(f"{path}.") and name.endswith(PROJECTIONS):
            return name.rpartition(".weight")[0].rpartition(".")[0]
    reasons = [f"known: {', '.join(p.split('.')[1] for p in PROJECTIONS)}"]
    raise UnsupportedError(f"{path}: its KV scales have no name, for none of its projections has one", reasons)
