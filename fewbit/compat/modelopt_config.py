"""ModelOpt's quantizer configs, both forms, as ordered rules; and their attributes as specs of ours.

Rules are wildcards on the names of quantizers, and later ones win. A rule that hits nothing is an error, unless
it is one of those that every preset carries for layers which most models do not have.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from fewbit.compat.modelopt_presets import ELSEWHERE, MAMBA_OFF, MIXER_OFF, OFF, PRESETS
from fewbit.errors import RequestError, UnsupportedError
from fewbit.quant.elements import E2M1, E2M3, E3M2, E4M3, E5M2, E8M0, ELEMENTS, F32, Element
from fewbit.quant.formats import TENSOR_FP8
from fewbit.quant.spec import QuantSpec, Scale, describe

Role = Literal["weight", "input", "cache", "softmax"]
Attributes = Mapping[str, Any]

FLOATS: dict[tuple[int, int], Element] = {(4, 3): E4M3, (5, 2): E5M2, (2, 1): E2M1, (3, 2): E3M2, (2, 3): E2M3}
ATTRIBUTES = {
    "num_bits", "axis", "block_sizes", "type", "enable", "fake_quant", "unsigned", "narrow_range", "calibrator", "bias",
    "rotate", "pass_through_bwd", "use_constant_amax", "effective_bits", "learn_amax", "backend",
    "trt_high_precision_dtype",
}  # fmt: skip
BLOCK_KEYS = {"type", "scale_bits", "scale_block_sizes", "four_over_six"}
PLAIN = {  # attributes that may be named, with the one value that is done here
    "fake_quant": (True,), "unsigned": (False,), "narrow_range": (False,), "calibrator": ("max", None),
    "learn_amax": (False,), "backend": (None,),
    "trt_high_precision_dtype": ("Float", None),
}  # fmt: skip
MEANS = {-2: None, -4: None}  # of a bias: one for each head and channel


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry. attributes: None only switches what earlier entries said; several follow one another."""

    pattern: str
    parent: str | None  # class of the module, "nn.Linear"
    attributes: tuple[Attributes, ...] | None
    enable: bool
    where: str

    def hits(self, names: Sequence[str], classes: frozenset[str]) -> bool:
        """names: the quantizer's path in the model, then its names on disk, several where one parameter holds many."""
        if self.parent is not None and self.parent not in classes:
            return False
        own, others = fnmatchcase(names[0], self.pattern), [fnmatchcase(n, self.pattern) for n in names[1:]]
        if own or not any(others):
            return own
        if not all(others):
            reasons = [f"{names[0]} is one quantizer for all of {names[1]} ... {names[-1]}"]
            raise UnsupportedError(f"{self.where}: {self.pattern!r} is about a part of what is one here", reasons)
        return True

    @property
    def may_idle(self) -> bool:
        if not self.enable:
            return self.parent is not None or self.pattern in {"*", *OFF, *MAMBA_OFF, *MIXER_OFF}
        return self.pattern.startswith(ELSEWHERE)


@dataclass(frozen=True, slots=True)
class Rounding:
    """What one quantizer does. constant: scales of 1, not calibrated. static: the blocks of a two-level weight too.

    affine: of a cache, the mean of each channel is taken out first. turned: it is rounded in another basis.
    outer: what the outer scale of two brings to 1; 0 = the reach of the element and the inner scale.
    """

    spec: QuantSpec
    constant: bool = False
    static: bool = False
    pass_through: bool = False
    affine: bool = False
    turned: bool = False
    outer: float = 0.0
    second: QuantSpec | None = None  # of a kernel's later stage (W4A8): named in configs, no part of the weight


def rules(config: Any) -> list[Rule]:
    """A whole config -> its rules in the order they are applied."""
    if not isinstance(config, Mapping) or "quant_cfg" not in config:
        raise RequestError("config: want a dict with quant_cfg and algorithm, such as mtq.FP8_DEFAULT_CFG")
    if unknown := sorted(set(config) - {"quant_cfg", "algorithm"}):
        raise RequestError(f"config: unknown key {', '.join(unknown)}; known: quant_cfg, algorithm")
    entries = config["quant_cfg"]
    if isinstance(entries, Mapping):
        return list(_from_dict(entries))
    if isinstance(entries, list | tuple):
        return [_from_entry(entry, f"quant_cfg[{i}]") for i, entry in enumerate(entries)]
    raise RequestError(f"config: quant_cfg must be a dict or a list, found {type(entries).__name__}")


def _from_dict(entries: Mapping[str, Any]) -> Iterator[Rule]:
    """The older form: pattern -> attributes, or class -> patterns, or pattern -> classes; `default` comes first."""
    if "default" in entries:
        yield _rule("*", None, entries["default"], "quant_cfg['default']")
    for name, value in entries.items():
        where = f"quant_cfg[{name!r}]"
        if name == "default":
            continue
        if name.startswith("nn."):
            yield from (_rule(pattern, name, held, f"{where}[{pattern!r}]") for pattern, held in value.items())
        elif isinstance(value, Mapping) and value and all(str(key).startswith("nn.") for key in value):
            yield from (_rule(name, parent, held, f"{where}[{parent!r}]") for parent, held in value.items())
        else:
            yield _rule(name, None, value, where)


def _from_entry(entry: Any, where: str) -> Rule:
    known = {"quantizer_name", "parent_class", "cfg", "enable"}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("quantizer_name"), str):
        raise RequestError(f"{where}: want a dict with quantizer_name, found {entry!r}")
    if unknown := sorted(set(entry) - known):
        raise RequestError(f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    held = entry.get("cfg")
    switch = {"enable": entry.get("enable", True)} if held is None or "enable" in entry else {}
    value = switch if held is None else held if isinstance(held, list | tuple) else {**held, **switch}
    rule = _rule(entry["quantizer_name"], entry.get("parent_class"), value, where)
    return replace(rule, enable=switch["enable"]) if switch else rule


def _rule(pattern: str, parent: str | None, value: Any, where: str) -> Rule:
    parts = tuple(value) if isinstance(value, list | tuple) else (value,)
    for part in parts:
        if not isinstance(part, Mapping):
            raise RequestError(f"{where}: want a dict of attributes, found {part!r}")
        if unknown := sorted(map(str, set(part) - ATTRIBUTES)):
            raise RequestError(
                f"{where}: unknown attribute {', '.join(unknown)}; known: {', '.join(sorted(ATTRIBUTES))}"
            )
    told = tuple({k: v for k, v in part.items() if k != "enable"} for part in parts)
    enable = all(part.get("enable", True) for part in parts)
    return Rule(pattern, parent, told if any(told) else None, enable, where)


def rounding(rule: Rule, role: Role) -> Rounding:
    """The attributes of a rule as what a quantizer of this role does."""
    assert rule.attributes is not None
    first, *rest = (_one(part, role, rule.where) for part in rule.attributes)
    if not rest:
        return first
    if role != "weight" or len(rest) > 1 or rest[0].spec.element != E4M3 or first.spec.element.kind != "int":
        raise UnsupportedError(
            f"{rule.where}: quantizers one after another", ["int4 weights with an e4m3 stage are known"]
        )
    return replace(first, second=rest[0].spec)


def _one(part: Attributes, role: Role, where: str) -> Rounding:
    for key, allowed in PLAIN.items():
        if key in part and part[key] not in allowed:
            reasons = [f"done here: {' or '.join(map(str, allowed))}"]
            raise UnsupportedError(f"{where}: {key} = {part[key]!r}", reasons)
    element = _element(part.get("num_bits", 8), where)
    blocks = part.get("block_sizes")
    dynamic = _dynamic(part.get("type", "static"), f"{where}.type")
    if blocks:
        if part.get("axis") is not None:
            raise RequestError(f"{where}: axis and block_sizes exclude each other")
        spec, static = _blocked(element, blocks, role, dynamic, where)
    else:
        spec, static = QuantSpec(element, (Scale(F32, _axis(part.get("axis"), role, where), dynamic=dynamic),)), False
    if role == "softmax" and spec != TENSOR_FP8:
        raise UnsupportedError(f"{where}: probabilities as {describe(spec)}", ["e4m3 with one scale is done here"])
    constant = bool(part.get("use_constant_amax"))
    return Rounding(spec, constant, static, bool(part.get("pass_through_bwd")), *_cache_only(part, role, where))


def _cache_only(part: Attributes, role: Role, where: str) -> tuple[bool, bool]:
    """bias and rotate."""
    bias, rotate = part.get("bias"), part.get("rotate")
    if (bias or rotate) and role != "cache":
        raise UnsupportedError(f"{where}: {'bias' if bias else 'rotate'}", ["of queries, keys and values alone"])
    if bias:
        axes = {int(k): v for k, v in bias.items() if str(k).lstrip("-").isdigit()}
        more = {k: v for k, v in bias.items() if not str(k).lstrip("-").isdigit()}
        if axes != MEANS or more.pop("type", "static") != "static" or more.pop("method", "mean") != "mean" or more:
            raise UnsupportedError(f"{where}: bias = {bias!r}", [f"done here: {MEANS}, the static mean"])
    return bool(bias), bool(rotate)


def _element(num_bits: Any, where: str) -> Element:
    if isinstance(num_bits, str) and num_bits[:1] == "e" and len(num_bits) == 4:
        num_bits = (num_bits[1], num_bits[3])
    if isinstance(num_bits, list | tuple) and tuple(map(int, num_bits)) in FLOATS:
        return FLOATS[tuple(map(int, num_bits))]  # type: ignore[index]
    if isinstance(num_bits, int) and 2 <= num_bits <= 8:
        return ELEMENTS[f"int{num_bits}"]
    known = f"2 to 8, or {', '.join(map(str, FLOATS))}"
    raise UnsupportedError(f"{where}.num_bits = {num_bits!r}", [f"known: {known}"])


def _dynamic(kind: Any, where: str) -> bool:
    if kind not in ("static", "dynamic"):
        raise RequestError(f"{where} must be static or dynamic, found {kind!r}")
    return bool(kind == "dynamic")


def _axis(axis: Any, role: Role, where: str) -> tuple[int, int]:
    """Which values share a scale: all, or those of one output channel."""
    axis = axis[0] if isinstance(axis, tuple | list) and len(axis) == 1 else axis
    if axis is None:
        return (0, 0)
    if role == "weight" and axis in (0, -2):
        return (1, 0)
    raise UnsupportedError(f"{where}.axis = {axis!r}", ["None is one scale per tensor; 0, of weights, one per output"])


def _blocked(element: Element, blocks: Any, role: Role, dynamic: bool, where: str) -> tuple[QuantSpec, bool]:
    """-> the spec, and whether the blocks of a two-level weight keep their scales."""
    where = f"{where}.block_sizes"
    sizes = {int(k): v for k, v in blocks.items() if k not in BLOCK_KEYS and str(k).lstrip("-").isdigit()}
    if (
        not isinstance(blocks, Mapping)
        or set(map(str, blocks)) - BLOCK_KEYS - set(map(str, sizes))
        or set(sizes) - {-1, -2}
    ):
        raise RequestError(f"{where}: want -1 and -2 with sizes, and {', '.join(sorted(BLOCK_KEYS))}; found {blocks!r}")
    static = not (dynamic or _dynamic(blocks.get("type", "static"), f"{where}.type"))
    each_call = role != "weight" and not static
    block = (sizes.get(-2, 1) or 0, sizes.get(-1) or 0)
    bits = tuple(blocks["scale_bits"]) if blocks.get("scale_bits") else None
    if bits == (8, 0):
        return QuantSpec(element, (Scale(E8M0, block, dynamic=each_call),), rule="mx-ceil"), False
    if bits is None:
        if role != "weight" and static and block != (1, 0):
            raise UnsupportedError(f"{where} of inputs", ["blocks of inputs are chosen at each call: type = dynamic"])
        return QuantSpec(element, (Scale(F32, block, dynamic=each_call),)), False
    if bits != (4, 3) or block[0] != 1 or (role != "weight" and static):
        raise UnsupportedError(
            f"{where} = {blocks!r}", ["two levels: scale_bits (4, 3) over blocks of -1, dynamic for inputs"]
        )
    rule = "four-over-six" if blocks.get("four_over_six") else "amax"
    scales = (Scale(E4M3, block, dynamic=each_call), Scale(F32, (0, 0)))
    return QuantSpec(element, scales, rule=rule), static


def preset(name: str) -> Any:
    if name in PRESETS:
        return PRESETS[name]
    from difflib import get_close_matches

    near = ", ".join(get_close_matches(name, PRESETS, 4, 0.5)) or ", ".join(PRESETS)
    raise AttributeError(f"module 'fewbit.compat.modelopt' has no attribute {name!r}; near: {near}")
