"""AutoRound checkpoints: one config, and the tensors of other dialects. packing_format says whose.

auto_round:auto_gptq (the default) is GPTQ v1; auto_round and auto_round:gptqmodel are GPTQ v2; auto_round:auto_awq is
AWQ's gemm layout; auto_round:fp8 and auto_round:llm_compressor hold floats: FP8, MX and NVFP4.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fewbit.codecs.codec import Codec, Config, Located, Tensors, by_header, refuse
from fewbit.codecs.int_config import fit_int, flag, group_size, int_format, integer, names, setting
from fewbit.codecs.int_packing import GPTQ_ENDINGS, read_awq, read_gptq, write_gptq
from fewbit.codecs.planes import FP8, bound, matrix, need, raw, static_act
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.elements import E2M1, E4M3, E5M2, E8M0, F32
from fewbit.quant.plan import Plan, Rule
from fewbit.quant.qtensor import Quantized
from fewbit.quant.spec import Format, QuantSpec, Scale

METHODS = ("auto-round", "intel/auto-round", "autoround")
FLOAT_ENDINGS = (
    ".weight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_global_scale", ".input_scale",
    ".input_global_scale",
)  # fmt: skip
KEYS = ("bits", "group_size", "sym", "data_type", "act_bits", "act_group_size", "act_dynamic", "act_data_type")
MX_RULES = {"mx_fp": "mx-floor", "mx_fp_rceil": "mx-ceil"}


def _packing(config: Config) -> str:
    """The dialect whose tensors the file holds."""
    found = str(config.get("packing_format") or config.get("backend") or "auto_round:auto_gptq").lower()
    if "llm_compressor" in found or "fp8" in found:
        return "auto-round-float"
    if "awq" in found:
        return "auto-round-awq"
    return "auto-round" if "gptq" in found and "gptqmodel" not in found else "auto-round-v2"


def _claims(located: Located, name: str) -> str | None:
    method = str(located.config.get("quant_method") or "").lower().replace("_", "-")
    if method not in METHODS or _packing(located.config) != name:
        return None
    packing = located.config.get("packing_format", "absent")
    return f"{located.where}: quant_method = {method}, packing_format = {packing}"


def _plan(config: Config) -> Plan:
    if config.get("rotation_config") or config.get("hadamard_config"):
        raise UnsupportedError("AutoRound's rotations cannot be read", ["their matrices are not part of the file"])
    return Plan((*_extra(config), *_covered(config)), dialect=_packing(config))


def _extra(config: Config) -> Iterator[Rule]:
    """Per module: full names first, then the patterns, which match anywhere in a name."""
    extra = config.get("extra_config") or {}
    if not isinstance(extra, dict) or not all(isinstance(own, dict) for own in extra.values()):
        raise CheckpointError("quantization_config.extra_config: want an object of objects")
    plain = {name for name in extra if re.fullmatch(r"[\w.-]+", name)}
    for name in sorted(extra, key=lambda name: name not in plain):
        form = _format(config | {key: value for key, value in extra[name].items() if key in KEYS})
        where = f"quantization_config.extra_config[{name!r}]"
        yield Rule(name, "exact", form, where) if name in plain else Rule(f".*(?:{name})", "regex", form, where)
    for i, name in enumerate(names(config, "modules_to_not_convert")):
        yield Rule(f".*(?:{name})", "regex", None, f"quantization_config.modules_to_not_convert[{i}]")


def _covered(config: Config) -> Iterator[Rule]:
    """The blocks, as beginnings of names; every linear where none are listed."""
    form = _format(config)
    for key in ("block_name_to_quantize", "to_quant_block_names", "quant_block_list"):
        if config.get(key):
            value = config[key].split(",") if isinstance(config[key], str) else config[key]
            for i, name in enumerate(names({key: value}, key)):
                yield Rule(re.escape(name.strip()), "regex", form, f"quantization_config.{key}[{i}]")
            return
    yield Rule("Linear", "class", form, "quantization_config.bits")


def _format(config: Config) -> Format | None:
    bits = integer(config, "bits", None)
    kind = str(config.get("data_type") or "int").lower()
    if bits >= 16:
        return None
    if kind.startswith("int"):
        return _integers(config)
    return _floats(config, bits, kind)


def _integers(config: Config) -> Format:
    if _rounds_input(config):
        raise UnsupportedError("AutoRound's integer activations cannot be read", ["its file has no scale for them"])
    bits = integer(config, "bits", None, (2, 3, 4, 5, 6, 7, 8))
    return int_format(bits, group_size(config), flag(config, "sym", True))


def _floats(config: Config, bits: int, kind: str) -> Format:
    quantized = _rounds_input(config)
    rule = MX_RULES.get(str(config.get("act_data_type") or kind).lower(), "mx-floor")
    if kind.startswith("mx_fp") and bits in (4, 8):
        weight = QuantSpec(E2M1 if bits == 4 else E4M3, (Scale(E8M0, (1, 32)),), rule=rule)
        return Format(weight, _dynamic(weight) if quantized else None)
    if kind.startswith("nv_fp") and bits == 4:
        weight = QuantSpec(E2M1, (Scale(E4M3, (1, 16)), Scale(F32, (0, 0), "div")))
        act = replace(weight, scales=(replace(weight.scales[0], dynamic=True), weight.scales[1]))
        return Format(weight, act if quantized else None)
    if kind.startswith("fp") and bits == 8:
        element = E5M2 if "e5m2" in kind or config.get("fmt") == "e5m2" else E4M3
        weight = QuantSpec(element, (Scale(F32, _block(config.get("group_size"))),))
        return Format(weight, _fp8_act(config) if quantized else None)
    raise UnsupportedError(f"AutoRound's {kind} of {bits} bits cannot be read", ["int, fp, mx_fp and nv_fp can"])


def _rounds_input(config: Config) -> bool:
    return config.get("act_bits") is not None and integer(config, "act_bits", None) <= 8


def _dynamic(weight: QuantSpec) -> QuantSpec:
    return replace(weight, scales=tuple(replace(scale, dynamic=True) for scale in weight.scales))


def _fp8_act(config: Config) -> QuantSpec:
    dynamic = flag(config, "act_dynamic", config.get("activation_scheme") == "dynamic")
    group = config.get("act_group_size")
    block = _block(group) if group is not None else (1, 0) if dynamic else (0, 0)
    return QuantSpec(E4M3, (Scale(F32, block, dynamic=dynamic),))


def _block(group: object) -> tuple[int, int]:
    """0 = the whole tensor, -1 = a row, n = n columns, [r, c] = a rectangle."""
    if isinstance(group, list | tuple) and len(group) == 2 and all(isinstance(g, int) and g > 0 for g in group):
        return group[0], group[1]
    if isinstance(group, int) and not isinstance(group, bool) and group >= -1:
        return (0, 0) if group == 0 else (1, max(group, 0))
    raise CheckpointError(f"quantization_config.group_size: want -1, 0, a number or [rows, columns], found {group!r}")


def _read_float(form: Format, tensors: Mapping[str, Tensor]) -> Quantized:
    codes, shape = _codes(form.weight, tensors)
    ending = ".weight_scale_inv" if ".weight_scale_inv" in tensors else ".weight_scale"
    scales = [(ending, need(tensors, ending, "it scales the codes"))]
    if len(form.weight.scales) == 2:
        outer = ".weight_global_scale"
        scales.append((outer, need(tensors, outer, "NVFP4 has a scale of scales")))
    weight = bound(form.weight, shape, codes, *scales)
    if form.act is None or form.act.scales[-1].dynamic:
        return Quantized(Format(weight.spec, form.act), weight)
    level = len(form.act.scales) - 1
    name = ".input_global_scale" if level else ".input_scale"
    act, planes = static_act(form.act, {level: (name, need(tensors, name, "the config says act_dynamic = false"))})
    return Quantized(Format(weight.spec, act), weight, planes)


def _codes(weight: QuantSpec, tensors: Mapping[str, Tensor]) -> tuple[Tensor, tuple[int, int]]:
    if weight.element == E2M1:
        packed = matrix(".weight_packed", need(tensors, ".weight_packed", "FP4 comes in bytes"), torch.uint8)
        return packed, (packed.shape[0], packed.shape[1] * 2)
    dtype = torch.float8_e5m2 if weight.element == E5M2 else FP8
    stored = matrix(".weight", need(tensors, ".weight", "FP8 codes"), dtype)
    return raw(stored), (stored.shape[0], stored.shape[1])


def _fit(form: Format) -> Format:
    if form.transforms:
        raise refuse("auto-round", f"the transforms {', '.join(form.transforms)}", "gptq holds an order of the columns")
    return fit_int("auto-round", form, (2, 3, 4, 8))


def _write(q: Quantized) -> Tensors:
    """GPTQ v1 without g_idx: the columns are always in order."""
    return {ending: tensor for ending, tensor in write_gptq(q, "auto-round", less=1).items() if ending != ".g_idx"}


def _config(formats: Mapping[str, Format], dense: list[str], kv: QuantSpec | None) -> dict[str, Config]:
    if not formats:
        raise refuse("auto-round", "a checkpoint without quantized modules", "--to dense writes one")
    settings = {module: setting(form) for module, form in formats.items()}
    all_settings = list(settings.values())
    base = max(all_settings, key=all_settings.count)
    extra = {m: {k: v for k, v in own.items() if v != base[k]} for m, own in settings.items() if own != base}
    extra |= {module: {"bits": 16} for module in dense}
    whole: Config = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "data_type": "int"}
    blocks = sorted({match[0] for module in formats if (match := re.match(r".*?(?=\.\d+\.)", module))})
    whole |= base | {"block_name_to_quantize": ",".join(blocks) or None, "extra_config": extra}
    return {"quantization_config": whole}


def _reader(
    name: str,
    read: Callable[[Format, Mapping[str, Tensor]], Quantized],
    endings: tuple[str, ...],
    marker: tuple[str, ...],
    summary: str,
) -> Codec:
    claims = partial(_claims, name=name)
    return Codec(name, claims, _plan, endings, marker, by_header(read, ".g_idx"), read, explicit=False, summary=summary)


_V1, _V2 = partial(read_gptq, less=1), partial(read_gptq, less=0)
_INT = GPTQ_ENDINGS, (".qweight", ".qzeros")
CODECS = (
    replace(
        _reader("auto-round", _V1, *_INT, "AutoRound with GPTQ's tensors"),
        fit=_fit, write=_write, config=_config,
    ),
    _reader("auto-round-v2", _V2, *_INT, "AutoRound with GPTQ v2's tensors; read only"),
    _reader("auto-round-awq", read_awq, GPTQ_ENDINGS[:3], _INT[1], "AutoRound with AWQ's tensors; read only"),
    _reader(
        "auto-round-float", _read_float, FLOAT_ENDINGS, (".weight_packed", ".weight_scale", ".weight_scale_inv"),
        "AutoRound with floats: FP8, MX, NVFP4; read only",
    ),
)  # fmt: skip
