"""ModelOpt's quantization API on any transformers model: presets, quantize, a summary, the checkpoint export.

    import fewbit.compat.modelopt as mtq
    from fewbit.compat.modelopt import export_hf_checkpoint

After `quantize` the model computes with rounded weights, inputs and caches, trains straight through the rounding, and
exports what it computes: scales in the file are the planes that rounded.
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from fewbit import codecs
from fewbit.compat.calibrate import Loop, calibrate
from fewbit.compat.collect import collect
from fewbit.compat.insert import (
    CACHE,
    OTHERS,
    Place,
    assign_matrix,
    check_attention,
    insert,
    matrix,
    places,
    quantizers,
    route_attention,
    weights,
)
from fewbit.compat.methods import NEED_STATS, method_of
from fewbit.compat.modelopt_config import Role, Rounding, Rule, preset, rounding, rules
from fewbit.compat.modelopt_presets import PRESETS
from fewbit.compat.quantizer import Quantizer
from fewbit.errors import RequestError, UnsupportedError
from fewbit.quant.elements import E2M1, E4M3
from fewbit.workflows.export import export

Found = dict[Place, Rounding]
SERVED = ("export_hf_vllm_fq_checkpoint", "export_mcore_gpt_to_hf_vllm_fq")


def __getattr__(name: str) -> Any:
    if name in SERVED:
        from fewbit.compat import modelopt_vllm

        return getattr(modelopt_vllm, name)
    return preset(name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PRESETS, *SERVED])


def quantize(model: Any, config: Any, forward_loop: Loop | None = None) -> Any:
    """Insert quantizers as `config` says, in place, and calibrate them on what forward_loop(model) runs. -> model.

    Patterns that match nothing are errors, but for those that every preset carries. A quantizer that no rule speaks of
    is off. Scales that engines fuse (q, k, v; gate, up) are one from the start, as an exported checkpoint has them.
    """
    if any(True for _ in weights(model)):
        raise RequestError("the model is quantized already; load it anew to quantize it another way")
    told = rules(config)
    method, _ = method_of(config.get("algorithm"))
    found = resolve(told, list(places(model)))
    check_data(found, method, forward_loop)
    if any(role(place) in ("cache", "softmax") for place in found):
        check_attention(model)
    for place, what in found.items():
        insert(model, place, made(place, what, found))
    route_attention(model)
    calibrate(model, config.get("algorithm"), forward_loop)
    return model


def check_data(found: Found, method: str | None, loop: Loop | None) -> None:
    """What is static and what algorithms look at must see data; without an algorithm inputs are scaled at each call."""
    waiting = [p.names[0] for p, w in found.items()
               if role(p) in ("input", "cache") and not w.constant and not w.spec.scales[-1].dynamic]  # fmt: skip
    if loop is None and (method in NEED_STATS or (waiting and (method or "bmm" in waiting[0]))):
        what = f"algorithm {method}" if method in NEED_STATS else f"the static scale of {waiting[0]}"
        raise RequestError(f"{what} needs data: give forward_loop, a function that runs the model on some of it")


def resolve(told: Sequence[Rule], candidates: Sequence[Place]) -> Found:
    """What each quantizer does after all rules have spoken."""
    found: Found = {}
    off: Found = {}
    for rule in told:
        hit = [p for p in candidates if rule.hits(p.names, p.classes)]
        if not hit and not rule.may_idle:
            near = ", ".join(p.names[0] for p in candidates[:2]) or "none"
            raise RequestError(f"{rule.where}: {rule.pattern!r} matches no quantizer; there are {near} ...")
        for place in hit:
            apply(rule, place, found, off)
    if not found:
        raise RequestError("config: no rule switches on a quantizer that this model has")
    return found


def apply(rule: Rule, place: Place, found: Found, off: Found) -> None:
    known = found.pop(place, None) or off.pop(place, None)
    if rule.attributes is not None:
        known = described(rule, place) if rule.enable or role(place) is not None else None
    elif rule.enable and known is None:
        raise RequestError(f"{rule.where}: switches on {place.names[0]}, and no rule before it says how it rounds")
    if known is not None:
        (found if rule.enable else off)[place] = known


def described(rule: Rule, place: Place) -> Rounding:
    kind = role(place)
    if kind is None:
        reasons = ["weights, inputs, queries, keys, values and probabilities are rounded here"]
        raise UnsupportedError(f"{rule.where}: {rule.pattern!r} switches on {place.names[0]}", reasons)
    return rounding(rule, kind)


def role(place: Place) -> Role | None:
    leaf = place.leaf.rpartition(".")[2]
    if leaf in CACHE or leaf == OTHERS[0]:
        return "cache"
    roles: dict[str, Role] = {"weight_quantizer": "weight", "input_quantizer": "input", OTHERS[1]: "softmax"}
    return roles.get(leaf)


def made(place: Place, what: Rounding, found: Found) -> Quantizer:
    """The quantizer. The outer scale of two brings 448, not 6 * 448, to 1 where ModelOpt's exporter writes it so."""
    kind = role(place)
    quantizer = Quantizer(what.spec, weight=kind == "weight")
    quantizer.pass_through, quantizer.affine, quantizer.turned = what.pass_through, what.affine, what.turned
    if len(what.spec.scales) == 2 and (kind == "cache" or (kind == "weight" and _beside_fp8(place, found))):
        quantizer.outer = E4M3.max
    if what.constant:
        quantizer.hold(torch.full((1, 1), what.spec.element.max))
    elif kind == "softmax":
        quantizer.hold(torch.ones(1, 1))  # the largest of a row, before division by the sum
    return quantizer


def _beside_fp8(place: Place, found: Found) -> bool:
    """FP4 weights whose inputs are FP8."""
    beside = place.leaf.replace("weight_quantizer", "input_quantizer")
    inputs = next((w.spec.element for p, w in found.items() if p.owner == place.owner and p.leaf == beside), None)
    return found[place].spec.element == E2M1 and inputs == E4M3


def export_hf_checkpoint(
    model: Any,
    export_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 10_000_000_000,
    overwrite: bool = False,
) -> None:
    """Write the quantized model as ModelOpt's unified checkpoint: codes, scales, KV scales, both configs.

    dtype: of what is not quantized; None = as it is. A tokenizer in the folder is left alone.
    """
    held = collect(model, codecs.CODECS["modelopt"])
    export(model, export_dir, held, dtype=dtype, max_shard=max_shard_size, overwrite=overwrite)


def print_quant_summary(model: Any) -> None:
    """One line for each quantizer, and their number."""
    found = quantizers(model)
    for name, quantizer in found.items():
        print(f"{name:80} {quantizer.extra_repr()}")
    print(f"{len(found)} quantizers found in model")


def disable_quantizer(model: Any, pattern: str | Callable[[str], bool]) -> None:
    """Let what these quantizers see pass unrounded; their scales stay."""
    _switch(model, pattern, False)


def enable_quantizer(model: Any, pattern: str | Callable[[str], bool]) -> None:
    _switch(model, pattern, True)


def fold_weight(model: Any) -> None:
    """Put the rounded values in the place of the weights, and round them no more: faster, and for evaluation only."""
    for _, name, module, quantizer, _ in weights(model):
        if quantizer.enabled:
            assign_matrix(module, name, quantizer.value(matrix(module, name)))
            quantizer.enabled = False


def _switch(model: Any, pattern: str | Callable[[str], bool], on: bool) -> None:
    found = quantizers(model)
    hit = [n for n in found if (pattern(n) if callable(pattern) else fnmatchcase(n, pattern))]
    if not hit:
        raise RequestError(f"{pattern!r} matches none of the model's {len(found)} quantizers")
    for name in hit:
        if on and found[name].spec is None and not isinstance(pattern, str):
            continue
        found[name].enabled = on and found[name].spec is not None


__all__ = [
    "PRESETS",
    "disable_quantizer",
    "enable_quantizer",
    "export_hf_checkpoint",
    "fold_weight",
    "print_quant_summary",
    "quantize",
]
