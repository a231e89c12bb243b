"""torchao checkpoints in safetensors: its tensor classes taken apart, `weight` as `_weight_qdata`, `_weight_scale` ...

The config is torchao's own, as nested {"_type", "_data"}. Read are the plain layouts: INT8, FP8, and integers of 1 to 8
bits that lie unpacked in int8. What a kernel has repacked (Int4WeightOnlyConfig) is refused.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fewbit.codecs.codec import Codec, Config, by_header, by_method
from fewbit.codecs.int_config import names
from fewbit.codecs.planes import FP8, bound, matrix, need, raw
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.elements import E4M3, E5M2, ELEMENTS, F32, INT8, UINT8, Element
from fewbit.quant.plan import Plan, Rule
from fewbit.quant.qtensor import Quantized, grid, store
from fewbit.quant.spec import Format, QuantSpec, Scale

Block = tuple[int, int]
ENDINGS = ("._weight_qdata", "._weight_scale", "._weight_zero_point")
FLOATS = {"float8_e4m3fn": E4M3, "float8_e5m2": E5M2}
READ = (
    "Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig",
    "Float8DynamicActivationFloat8WeightConfig", "IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig",
)  # fmt: skip


def _plan(config: Config) -> Plan:
    top = config.get("quant_type")
    if isinstance(top, dict) and set(top) == {"default"}:
        top = top["default"]
    if not isinstance(top, dict) or "_type" not in top:
        raise UnsupportedError(f"quant_type {top!r} cannot be read", ["torchao 0.13 and later write an object"])
    return Plan((*_skipped(config), *_rules(top)), dialect="torchao")


def _skipped(config: Config) -> Iterator[Rule]:
    for i, name in enumerate(names(config, "modules_to_not_convert")):
        pattern = rf"(?:{name})(?:\.|$)|.*{re.escape(name)}$"
        yield Rule(pattern, "regex", None, f"quantization_config.modules_to_not_convert[{i}]")


def _rules(top: Config) -> Iterator[Rule]:
    """One config for every linear; or one per name, then per pattern (of the whole name), then the default."""
    if top["_type"] not in ("FqnToConfig", "ModuleFqnToConfig"):
        yield Rule("Linear", "class", _format(top), "quantization_config.quant_type")
        return
    data = top.get("_data") or {}
    table = data.get("fqn_to_config") or data.get("module_fqn_to_config") or {}
    table = table.get("_data", table)
    for name in sorted(table, key=lambda key: (key == "_default", key.startswith("re:"))):
        form = None if table[name] is None else _format(table[name])
        where = f"quantization_config.quant_type[{name!r}]"
        if name == "_default":
            yield Rule("Linear", "class", form, where)
        elif name.startswith("re:"):
            yield Rule(rf"(?:{name[3:]})$", "regex", form, where)
        else:
            yield Rule(name.removesuffix(".weight"), "exact", form, where)


def _format(config: Config) -> Format:
    kind, data = config.get("_type"), config.get("_data") or {}
    if kind not in READ:
        raise UnsupportedError(f"torchao's {kind} cannot be read", [f"read are {', '.join(READ)}"])
    if config.get("_version", 2) < 2:
        raise UnsupportedError(f"torchao's {kind} of version 1 cannot be read", ["version 2 has the plain tensors"])
    if kind.startswith("Float8"):
        return _float8(data, dynamic="Dynamic" in kind)
    intx = kind in ("IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig")
    element = _int_element(data) if intx else INT8
    key = "weight_mapping_type" if kind.endswith("IntxWeightConfig") else "mapping_type"
    block = _blocks(data.get("weight_granularity") or data.get("granularity"), data.get("group_size"))[-1]
    weight = _integers(element, block, _value(data.get(key)) not in (None, "SYMMETRIC"))
    return Format(weight, _int8_act(data) if "Dynamic" in kind else None)


def _value(entry: Any) -> Any:
    return entry.get("_data") if isinstance(entry, dict) else entry


def _int_element(data: Config) -> Element:
    name = str(_value(data.get("weight_dtype")) or "int8")
    if not re.fullmatch(r"int[1-8]", name):
        raise CheckpointError(f"quantization_config.quant_type: weight_dtype: want int1 to int8, found {name!r}")
    return ELEMENTS[name]


def _integers(element: Element, block: Block, asym: bool) -> QuantSpec:
    scale = (Scale(F32, block),)
    if not asym:
        return QuantSpec(element, scale, rule="range")
    unsigned = ELEMENTS[f"u{element.name}"]
    return QuantSpec(unsigned, scale, (Scale(unsigned, block),), "range")


def _int8_act(data: Config) -> QuantSpec:
    """Per token, unless the config says per tensor; asymmetric codes are INT8 with a zero, which is UINT8 with one."""
    block = _blocks(data.get("granularity"), None)[0] if "weight_granularity" not in data else (1, 0)
    scale = (Scale(F32, block, dynamic=True),)
    if _value(data.get("act_mapping_type")) == "ASYMMETRIC":
        return QuantSpec(UINT8, scale, (Scale(UINT8, block, dynamic=True),), "range")
    return QuantSpec(INT8, scale, rule="range")


def _float8(data: Config, dynamic: bool) -> Format:
    element = FLOATS.get(str(_value(data.get("weight_dtype")) or "float8_e4m3fn"))
    if element is None:
        raise CheckpointError(f"quantization_config.quant_type: weight_dtype: want one of {', '.join(FLOATS)}")
    act, weight = _blocks(data.get("granularity"), None, "PerTensor" if dynamic else "PerRow")
    spec = QuantSpec(element, (Scale(F32, weight),))
    return Format(spec, QuantSpec(E4M3, (Scale(F32, act, dynamic=True),)) if dynamic else None)


def _blocks(granularity: Any, group: object, default: str = "PerRow") -> tuple[Block, Block]:
    """-> (of activations, of weights)."""
    if isinstance(group, int) and not isinstance(group, bool) and group > 0:
        return (1, 0), (1, group)
    both = granularity if isinstance(granularity, list) else [granularity, granularity]
    if len(both) != 2:
        raise CheckpointError(f"quantization_config.quant_type: granularity: want one or two, found {len(both)}")
    return _block(both[0], default), _block(both[1], default)


def _block(entry: Any, default: str) -> Block:
    kind, data = (entry.get("_type"), entry.get("_data") or {}) if isinstance(entry, dict) else (default, {})
    sizes = data.get("block_size")
    if kind == "PerBlock" and isinstance(sizes, list) and len(sizes) == 2 and all(isinstance(s, int) for s in sizes):
        return sizes[0], sizes[1]
    if kind == "PerGroup" and isinstance(data.get("group_size"), int) and data["group_size"] > 0:
        return 1, data["group_size"]
    plain = {"PerTensor": (0, 0), "PerToken": (1, 0)}
    if kind == "PerRow" and data.get("dim", -1) in (-1, 1):
        return 1, 0
    if kind == "PerAxis" and data.get("axis") == 0:
        return 1, 0
    if kind not in plain:
        raise UnsupportedError(f"torchao's granularity {entry!r} cannot be read", ["rows, groups, blocks, tensors can"])
    return plain[kind]


def _read(form: Format, tensors: Mapping[str, Tensor]) -> Quantized:
    stored = need(tensors, "._weight_qdata", "it holds the codes")
    element = form.weight.element
    scale = ("._weight_scale", need(tensors, "._weight_scale", "it scales the codes"))
    if element.kind == "float":
        codes = matrix("._weight_qdata", stored, FP8 if element == E4M3 else torch.float8_e5m2)
        weight = bound(form.weight, codes.shape, raw(codes), scale)
        return Quantized(Format(weight.spec, form.act), weight)
    codes = matrix("._weight_qdata", stored, torch.int8)
    zero = _zero(form.weight, tensors, tuple(codes.shape))
    weight = bound(form.weight, codes.shape, _codes("._weight_qdata", codes, element), scale, zero=zero)
    return Quantized(Format(weight.spec, form.act), weight)


def _codes(ending: str, values: Tensor, element: Element) -> Tensor:
    """int8 values in the range of the element, signed -> a plane of its codes."""
    bits = int(element.bits)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if not values.is_meta and bool(((values < low) | (values > high)).any()):
        raise CheckpointError(f"{ending}: values outside {low} ... {high}, the range of {bits} bits")
    codes = values.view(torch.uint8) & (2**bits - 1)
    return store(codes if element.signed else codes ^ (1 << (bits - 1)), element)


def _zero(weight: QuantSpec, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor | None:
    ending = "._weight_zero_point"
    if ending not in tensors:
        if weight.zeros:
            raise CheckpointError(f"{ending} is missing: the config says the mapping is asymmetric")
        return None
    zeros = tensors[ending]
    rows, cols = grid(shape, weight.scales[0].block)
    if zeros.dtype != torch.int8 or zeros.numel() != rows * cols:
        raise CheckpointError(f"{ending}: want {rows * cols} int8, found {list(zeros.shape)} {zeros.dtype}")
    if weight.zeros:
        return _codes(ending, zeros.reshape(rows, cols), weight.zeros[0].element)
    if not zeros.is_meta and bool(zeros.any()):
        raise CheckpointError(f"{ending}: the config says the mapping is symmetric, and some zeros are not 0")
    return None


CODECS = (
    Codec(
        "torchao", by_method("torchao"), _plan, ENDINGS, ("._weight_qdata",), by_header(_read), _read,
        explicit=False, summary="torchao: INT8, FP8 and unpacked integers; read only",
    ),
)  # fmt: skip
