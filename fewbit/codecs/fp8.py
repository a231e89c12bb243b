"""quant_method fp8: three families share the name, and a scale's name says the opposite of two of them.

AutoFP8 keeps one scale per tensor (`weight_scale`, static inputs `input_scale`; transformers spells them
`weight_scale_inv` and `activation_scale`). DeepSeek keeps `weight_scale_inv` per 128 x 128 block; both multiply,
despite the name. gptqmodel's `weight_scale_inv` is a true inverse, which the config says (weight_scale_semantics) and
which divides; taking one for the other is off by a factor of a million. fbgemm_fp8 has a scale per row.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fewbit.codecs.codec import Codec, Config, Tensors, by_header, by_method, refuse
from fewbit.codecs.planes import FP8, bound, matrix, need, raw, static_act, stored_act, weight_matrix
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.elements import E4M3, E5M2, E8M0, F32, Element
from fewbit.quant.formats import TENSOR_FP8, TOKEN_FP8
from fewbit.quant.plan import Plan, Rule
from fewbit.quant.qtensor import Quantized
from fewbit.quant.spec import Format, QuantSpec, Scale, describe, spec

WHERE = "config.json: quantization_config"
WEIGHT, SCALE, INVERSE = ".weight", ".weight_scale", ".weight_scale_inv"
INPUTS = (".input_scale", ".activation_scale")
DTYPES: dict[Element, torch.dtype] = {E4M3: FP8, E5M2: torch.float8_e5m2}
NAMES = {"e4m3": E4M3, "float8_e4m3fn": E4M3, "e5m2": E5M2, "float8_e5m2": E5M2}
# the scheme "dynamic" means one scale for the whole input, as its paper and AutoFP8 have it; some engines take one per
# token, which is finer and gives other numbers
DYNAMIC_FP8 = spec(E4M3, (F32, 0, 0), dynamic=1)
CACHE = spec(E4M3, (F32, 0, 0))


def _plan(config: Config) -> Plan:
    for key, value in (("store_dtype", "mxfp4"), ("expert_dtype", "fp4")):
        if config.get(key) == value:
            reasons = [f"experts in FP4 inside an fp8 checkpoint ({key} = {value}) have no published layout to read"]
            raise UnsupportedError(f"{WHERE}.{key} = {value} is not read", reasons)
    form, why = _inverse(config) if _is_inverse(config) else _multiplied(config)
    rules = [*_dynamic(config, form), *_ignored(config), Rule("Linear", "class", form, f"{WHERE}.{why}")]
    return Plan(tuple(rules), CACHE if config.get("kv_cache_scheme") == "static" else None, "fp8")


def _is_inverse(config: Config) -> bool:
    semantics = config.get("weight_scale_semantics")
    return semantics == "inverse" or (semantics is None and "weight_scale_method" in config)


def _inverse(config: Config) -> tuple[Format, str]:
    """gptqmodel: inputs stay as they are."""
    blocks = {"tensor": (0, 0), "row": (1, 0)}
    method = str(config.get("weight_scale_method") or ("block" if config.get("weight_block_size") else "row"))
    if method != "block" and method not in blocks:
        raise CheckpointError(f"{WHERE}.weight_scale_method = {method!r}; known: tensor, row, block")
    block = _block(config) if method == "block" else blocks[method]
    return Format(QuantSpec(_element(config), (Scale(F32, block, "div"),))), "weight_scale_method"


def _multiplied(config: Config) -> tuple[Format, str]:
    element = _element(config)
    if config.get("weight_block_size"):
        rows, cols = _block(config)
        powers = config.get("scale_fmt") == "ue8m0"  # then scales of inputs are powers of two as well
        act = spec(E4M3, (E8M0 if powers else F32, 1, cols), rule="mx-ceil" if powers else "amax", dynamic=1)
        static = config.get("activation_scheme") == "static"
        return Format(spec(element, (F32, rows, cols)), TENSOR_FP8 if static else act), "weight_block_size"
    scheme = config.get("activation_scheme")
    if scheme not in ("static", "dynamic"):
        raise CheckpointError(f"{WHERE}.activation_scheme must be static or dynamic, found {scheme!r}")
    return Format(spec(element, (F32, 0, 0)), TENSOR_FP8 if scheme == "static" else DYNAMIC_FP8), "activation_scheme"


def _element(config: Config) -> Element:
    name = str(config.get("fmt") or config.get("format") or "e4m3").lower()
    if name not in NAMES:
        raise UnsupportedError(f"{WHERE}: weights of {name}", [f"known: {', '.join(NAMES)}"])
    return NAMES[name]


def _block(config: Config) -> tuple[int, int]:
    block = config.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(b, int) and b > 0 for b in block):
        raise CheckpointError(f"{WHERE}.weight_block_size must be two positive numbers, found {block!r}")
    return block[0], block[1]


def _ignored(config: Config) -> Iterable[Rule]:
    """Full names, last parts of names (MiniMax: "gate"), or parents: whole parts between dots."""
    for key in ("ignored_layers", "modules_to_not_convert"):
        for i, name in enumerate(config.get(key) or []):
            if not isinstance(name, str):
                raise CheckpointError(f"{WHERE}.{key}[{i}] must be a string, found {name!r}")
            escaped = re.escape(name).replace(r"\*", ".*")
            plain = rf"(?:.*\.)?{escaped}(?:\..*)?$"
            pattern = name[3:] if name.startswith("re:") else plain
            yield Rule(pattern, "regex", None, f"{WHERE}.{key}[{i}]")


def _dynamic(config: Config, form: Format) -> Iterable[Rule]:
    """gptqmodel's rules: `-:` leaves a module dense, anything else overrides the scales."""
    for pattern, changes in (config.get("dynamic") or {}).items():
        where = f"{WHERE}.dynamic[{pattern!r}]"
        if pattern.startswith("-:"):
            yield Rule(pattern[2:], "regex", None, where)
        else:
            yield Rule(pattern.removeprefix("+:"), "regex", _inverse({**config, **changes})[0], where)


def _row_plan(config: Config) -> Plan:
    """fbgemm_fp8. `activation_scale_ub` caps the scale of an outlying token; it is not applied here."""
    form = Format(spec(E4M3, (F32, 1, 0)), TOKEN_FP8)
    return Plan((*_ignored(config), Rule("Linear", "class", form, f"{WHERE}.quant_method")), None, "fbgemm-fp8")


def _read(form: Format, tensors: Mapping[str, Tensor]) -> Quantized:
    element = form.weight.element
    weight = matrix(WEIGHT, need(tensors, WEIGHT, "every module has one"), DTYPES[element])
    ending = SCALE if SCALE in tensors else INVERSE
    if form.weight.scales[0].op == "div":
        ending = INVERSE
    scale = need(tensors, ending, f"{SCALE} or {INVERSE} goes with every FP8 weight")
    held = bound(form.weight, weight.shape, raw(weight), (ending, scale))
    if form.act is None or form.act.dynamic:
        return Quantized(Format(held.spec, form.act), held)
    given = next((e for e in INPUTS if e in tensors), INPUTS[0])
    stored = need(tensors, given, "activation_scheme = static asks for it")
    act, planes = static_act(form.act, {0: (given, stored)})
    return Quantized(Format(held.spec, act), held, planes)


def _fit(form: Format) -> Format:
    """Weights per tensor with inputs rounded whole, or per block with inputs per token and block; or weights alone."""
    w, act, reasons = form.weight, form.act, [f"it has no place for {kind}" for kind in form.transforms]
    block = w.scales[0].block if len(w.scales) == 1 else (-1, 0)
    if w.element != E4M3 or len(w.scales) != 1 or w.zeros or w.scales[0].element.kind not in ("native", "exponent"):
        reasons.append(f"it holds e4m3 with one level of scales, not {describe(w)}")
    elif act is None and block not in ((0, 0), (1, 0)) and min(block) < 2:
        reasons.append(f"weights alone have scales per tensor, row or block, not {block}")
    elif act is not None and not _goes_with(act, block):
        reasons.append(f"beside weight blocks of {block} it does not round inputs to {describe(act)}")
        reasons.append("it rounds whole inputs (static or dynamic) beside (0, 0), and 1 x c beside blocks of r x c")
    if reasons:
        raise refuse("fp8", describe(w), *reasons)
    return Format(_weight_scale(w, act), _act_scale(act) if act else None)


def _goes_with(act: QuantSpec, block: tuple[int, int]) -> bool:
    if act.element != E4M3 or len(act.scales) != 1 or act.zeros:
        return False
    scale = act.scales[0]
    if block == (0, 0):
        return scale.block == (0, 0) and scale.element.kind == "native"
    return min(block) > 1 and act.dynamic and scale.block == (1, block[1])


def _weight_scale(w: QuantSpec, act: QuantSpec | None) -> QuantSpec:
    powers = act is not None and w.scales[0].element == act.scales[0].element == E8M0
    return QuantSpec(E4M3, (Scale(E8M0 if powers else F32, w.scales[0].block, "mul" if act else "div"),))


def _act_scale(act: QuantSpec) -> QuantSpec:
    powers = act.scales[0].element == E8M0
    scale = act.scales[0] if powers else replace(act.scales[0], element=F32)
    return QuantSpec(E4M3, (scale,), rule="mx-ceil" if powers else "amax")


def _write(q: Quantized) -> Tensors:
    weight_matrix(q, "fp8")
    scale, plane = q.format.weight.scales[0], q.weight.planes["scale0"]
    if scale.element == E8M0:
        plane = plane.view(torch.float8_e8m0fnu)
    out = {WEIGHT: q.weight.planes["codes"].view(FP8)}
    if scale.op == "div":
        return out | {INVERSE: plane.reshape({(0, 0): (), (1, 0): (-1,)}.get(scale.block, plane.shape))}
    if scale.block != (0, 0):
        return out | {INVERSE: plane}
    out[SCALE] = plane.reshape(())
    assert q.format.act is not None
    return out if q.format.act.dynamic else out | {INPUTS[0]: stored_act(q, "fp8", "scale0").reshape(())}


def _config(formats: Mapping[str, Format], ignored: list[str], kv: QuantSpec | None) -> dict[str, Config]:
    kinds = set(formats.values())
    if len(kinds) != 1:
        shown = sorted(f"{describe(f.weight)}, inputs {describe(f.act) if f.act else 'as they are'}" for f in kinds)
        raise refuse("fp8", "several formats at once", "it has one for the whole model", *shown)
    if kv is not None and kv.stored != CACHE.stored:
        raise refuse("fp8", f"a cache of {describe(kv)}", "it has e4m3 with one scale per tensor")
    form = kinds.pop()
    scale, act = form.weight.scales[0], form.act
    cache = {"kv_cache_scheme": "static"} if kv else {}
    if scale.op == "div":
        config = _inverse_config(scale.block, ignored) | cache
        return {"quantization_config": config, "quantize_config.json": config}
    assert act is not None
    config = {"quant_method": "fp8", "activation_scheme": "dynamic" if act.dynamic else "static", **cache}
    if scale.block == (0, 0):
        return {"quantization_config": {**config, "ignored_layers": ignored}}
    powers = {"scale_fmt": "ue8m0"} if act.scales[0].element == E8M0 else {}
    block = {"fmt": "e4m3", "weight_block_size": list(scale.block), **powers, "modules_to_not_convert": ignored}
    return {"quantization_config": config | block}


def _inverse_config(block: tuple[int, int], ignored: list[str]) -> Config:
    method = {(0, 0): "tensor", (1, 0): "row"}.get(block, "block")
    return {
        "quant_method": "fp8",
        "method": "fp8",
        "format": "float8_e4m3fn",
        "checkpoint_format": "float8_e4m3fn",
        "bits": 8,
        "group_size": -1,
        "desc_act": False,
        "lm_head": "lm_head" not in ignored,
        "pack_dtype": "int32",
        "weight_scale_method": method,
        "weight_scale_semantics": "inverse",
        **({"weight_block_size": list(block)} if method == "block" else {}),
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in ignored},
    }


_ENDINGS = (WEIGHT, SCALE, INVERSE, *INPUTS)
CODECS = (
    Codec(
        "fp8",
        by_method("fp8"),
        _plan,
        _ENDINGS,
        (SCALE, INVERSE),
        by_header(_read),
        _read,
        _fit,
        _write,
        _config,
        kv_endings={"k": ".k_scale", "v": ".v_scale", "kv": ".kv_scale"},
        explicit=False,  # lm_head is dense by habit, whether a list names it or not
        summary="AutoFP8, DeepSeek and transformers FP8, gptqmodel's FP8",
    ),
    Codec(
        "fbgemm-fp8",
        by_method("fbgemm-fp8"),
        _row_plan,
        _ENDINGS,
        (SCALE,),
        by_header(_read),
        _read,
        unused=(".input_scale_ub",),
        explicit=False,
        summary="FBGEMM FP8 per row, read only",
    ),
)
