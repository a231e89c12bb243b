"""The JSON that QUANT_CONFIG points to: every key that INC documents, with its default; what is not known is an error.

What a key means here is in docs/inc.md. Keys that speak of Gaudi's own workings are read and change nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.errors import RequestError, UnsupportedError
from fewbit.files.text import load_json
from fewbit.inc.nodes import TYPES
from fewbit.inc.scales import METHODS, REFUSED, UNITS, Method, Unit, rule_from
from fewbit.inc.words import choice, known_keys, near

MODES = ("NONE", "QUANTIZE", "MEASURE", "SHAPE", "LOAD")
OBSERVERS = ("maxabs", "maxabs_per_channel", "save", "shape")
WORDS: dict[str, tuple[str, tuple[str, ...]]] = {  # key -> default, what it may be
    "method": ("HOOKS", ("HOOKS",)),
    "mode": ("QUANTIZE", MODES),
    "observer": ("maxabs", OBSERVERS),
    "fp8_config": ("E4M3", ("E4M3", "E5M2")),
    "hp_dtype": ("BF16", ("BF16", "FP16", "FP32")),
    "scale_format": ("scalar", ("scalar", "const")),
    "device_for_scales": ("GAUDI3", ("GAUDI2", "GAUDI3")),
    "measure_exclude": ("OUTPUT", ("NONE", "INPUT", "OUTPUT", "PARAMS", "ALL")),
}
FLAGS: dict[str, bool] = {
    "dynamic_quantization": False,
    "use_qdq": False,
    "fake_quant": False,
    "recalc_scales": False,
    "ignore_modules_wo_measures": False,
    "seperate_measure_files": True,
    "measure_on_hpu": True,
    "row_parallel_linear_allreduce_quantization": False,
}
LISTS = {"allowlist": "allowlist", "whitelist": "allowlist", "blocklist": "blocklist", "blacklist": "blocklist"}
OTHERS = ("dump_stats_path", "scale_method", "scale_params", "calibration_sample_interval")
KEYS = (*WORDS, *FLAGS, *LISTS, *OTHERS)
BACKOFFS = {"input_backoff": 0.25, "weight_backoff": 0.5}
DTYPES = {"BF16": "bfloat16", "FP16": "float16", "FP32": "float32"}
LARGEST = 1 << 20  # bytes of a config
LAYER = re.compile(r"layers[./](\d+)")


@dataclass(frozen=True, slots=True)
class Lists:
    """types: names of classes. names: regular expressions, searched for in a node's name."""

    types: tuple[str, ...] = ()
    names: tuple[re.Pattern[str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.types or self.names)

    def names_one(self, names: tuple[str, ...]) -> bool:
        return any(pattern.search(name) for pattern in self.names for name in names)


@dataclass(frozen=True, slots=True)
class Methods:
    """Which scale method a node has: its own, its layer's, its type's, or the default."""

    default: Method
    name: str  # of the default, for the names of files
    nodes: Mapping[str, Method]
    layers: Mapping[str, Method]
    types: Mapping[str, Method]

    def of(self, node: str, kind: str) -> Method:
        layer = LAYER.search(node)
        for table, key in ((self.nodes, node), (self.layers, layer[1] if layer else ""), (self.types, kind)):
            if key in table:
                return table[key]
        return self.default

    @property
    def all(self) -> tuple[Method, ...]:
        return (self.default, *self.nodes.values(), *self.layers.values(), *self.types.values())


@dataclass(frozen=True, slots=True)
class Config:
    where: str
    mode: str
    observer: str
    unit: Unit
    allow: Lists
    block: Lists
    methods: Methods
    input_backoff: float
    weight_backoff: float
    stats: str  # dump_stats_path: a folder and the beginning of every file's name
    exclude: str
    interval: int  # samples between dumps; 0: at the end only
    asked_dtype: str | None  # hp_dtype where the file names it
    flags: Mapping[str, bool]
    keeps: bool  # recalc_scales is false in so many words: scales of an earlier run are taken as they are

    def takes(self, names: tuple[str, ...], types: frozenset[str]) -> bool:
        """Whether the lists leave a node to be measured or quantized."""
        if types & set(self.block.types) or self.block.names_one(names):
            return False
        return not self.allow or bool(types & set(self.allow.types)) or self.allow.names_one(names)


def read(path: str | Path) -> Config:
    """From a file."""
    if not Path(path).is_file():
        raise RequestError(f"QUANT_CONFIG={str(path)!r}: there is no such file")
    return parsed(load_json(Path(path), str(path), LARGEST), str(path))


def parsed(given: Any, where: str = "QUANT_CONFIG") -> Config:
    """given: the object of the file."""
    if not isinstance(given, dict):
        raise RequestError(f"{where}: want a JSON object with mode and its other keys")
    known_keys(given, KEYS, where)
    words = {key: choice(given.get(key, default), known, f"{where}: {key}") for key, (default, known) in WORDS.items()}
    flags = {key: flag(given.get(key, default), f"{where}: {key}") for key, default in FLAGS.items()}
    lists = {key: of_lists(given, key, where) for key in ("allowlist", "blocklist")}
    backoffs = shares(given.get("scale_params", {}), f"{where}: scale_params")
    methods = methods_of(given.get("scale_method", "MAXABS_HW"), f"{where}: scale_method")
    stats = given.get("dump_stats_path", "stats")
    if not isinstance(stats, str) or not stats or "\0" in stats:
        raise RequestError(f"{where}: dump_stats_path={stats!r}: want a path; its last part begins the names of files")
    observer = "shape" if words["mode"] == "SHAPE" else words["observer"]
    config = Config(
        where, words["mode"], observer, UNITS[words["device_for_scales"], words["fp8_config"]],
        lists["allowlist"], lists["blocklist"], methods, backoffs["input_backoff"], backoffs["weight_backoff"], stats,
        words["measure_exclude"], count(given.get("calibration_sample_interval", 0), where),
        DTYPES[words["hp_dtype"]] if "hp_dtype" in given else None, flags,
        "recalc_scales" in given and not flags["recalc_scales"],
    )  # fmt: skip
    agrees(config)
    return config


def agrees(config: Config) -> None:
    """Refuse what is known and cannot be done, or not together."""
    where, flags = config.where, config.flags
    if config.mode == "LOAD":
        reason = "a checkpoint that INC has saved says itself what it is: serve it without QUANT_CONFIG"
        raise UnsupportedError(f"{where}: mode LOAD", [reason])
    if flags["row_parallel_linear_allreduce_quantization"]:
        raise UnsupportedError(f"{where}: row_parallel_linear_allreduce_quantization",
                               ["ranks add up their sums in the model's own type here"])  # fmt: skip
    if flags["dynamic_quantization"] and not all(method.dynamic for method in config.methods.all):
        named = [name for name, method in METHODS.items() if method.dynamic]
        raise RequestError(f"{where}: dynamic_quantization needs a scale_method of tokens: {', '.join(named)}")
    if flags["use_qdq"] and any(rule.per != "tensor" for m in config.methods.all for rule in (m.act, m.weight)):
        raise RequestError(f"{where}: use_qdq knows one scale per tensor, and scale_method={config.methods.name} "
                           "has more")  # fmt: skip
    if config.mode == "QUANTIZE" and config.observer in ("save", "shape"):
        raise RequestError(f"{where}: observer={config.observer!r} leaves no maxima to make scales of; "
                           "measure with maxabs or maxabs_per_channel")  # fmt: skip
    if config.mode == "MEASURE" and not any(method.measures for method in config.methods.all):
        raise RequestError(f"{where}: scale_method={config.methods.name} reads no measurements; "
                           "leave it out to measure, or set mode to QUANTIZE")  # fmt: skip


def flag(value: Any, where: str) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise RequestError(f"{where}={value!r}: want true or false")
    return value


def count(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RequestError(f"{where}: calibration_sample_interval={value!r}: want a whole number, 0 for never")
    return value


def shares(given: Any, where: str) -> dict[str, float]:
    if not isinstance(given, dict):
        raise RequestError(f"{where}: want an object with {' and '.join(BACKOFFS)}")
    known_keys(given, tuple(BACKOFFS), where)
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise RequestError(f"{where}.{key}={value!r}: want a share, above 0 up to 1")
    return BACKOFFS | {key: float(value) for key, value in given.items()}


def of_lists(given: Mapping[str, Any], key: str, where: str) -> Lists:
    """A list under its name or under the one that INC had for it before."""
    said = [name for name, new in LISTS.items() if new == key and name in given]
    if len(said) > 1:
        raise RequestError(f"{where}: {said[0]} and {said[1]} are one key under two names; give one")
    if not said:
        return Lists()
    where, value = f"{where}: {said[0]}", given[said[0]]
    if not isinstance(value, dict):
        raise RequestError(f"{where}: want an object with types and names")
    known_keys(value, ("types", "names"), where)
    for held in value.values():
        if not isinstance(held, list) or not all(isinstance(word, str) for word in held):
            raise RequestError(f"{where}: types and names are lists of text")
    types = tuple(value.get("types", ()))
    for name in types:
        if name not in TYPES:
            raise RequestError(f"{where}.types: INC has no type {name!r}; {near(name, TYPES)}")
    return Lists(types, tuple(pattern(text, where) for text in value.get("names", ()) if text))


def pattern(text: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise RequestError(f"{where}.names: {text!r} is no regular expression: {error}") from error


def methods_of(given: Any, where: str) -> Methods:
    """A name, or an object with default, nodes, layers and layer_types."""
    if not isinstance(given, dict) or not given.keys().isdisjoint(("activation", "weight")):
        return Methods(method(given, where), given.upper() if isinstance(given, str) else "CUSTOM", {}, {}, {})
    known_keys(given, ("default", "nodes", "layers", "layer_types"), where)
    default = given.get("default", "MAXABS_HW")
    tables = {}
    for key in ("nodes", "layers", "layer_types"):
        if not isinstance(given.get(key, {}), dict):
            raise RequestError(f"{where}.{key}: want an object from names to methods")
        tables[key] = {str(k): method(v, f"{where}.{key}[{k!r}]") for k, v in given.get(key, {}).items()}
    return Methods(method(default, f"{where}.default"), "CUSTOM", tables["nodes"], tables["layers"],
                   tables["layer_types"])  # fmt: skip


def method(given: Any, where: str) -> Method:
    if isinstance(given, dict):
        known_keys(given, ("activation", "weight"), where)
        halves = [given.get(half, {}) for half in ("activation", "weight")]
        if not all(isinstance(half, dict) for half in halves):
            raise RequestError(f"{where}: activation and weight are objects")
        act, weight = (rule_from(half, where) for half in halves)
        if act.per == "channel" or act.choose == "opt":
            raise UnsupportedError(f"{where}: activation", ["one maximum per tensor is what activations are scaled by"])
        return Method(act, weight)
    if isinstance(given, str) and given.upper() in REFUSED:
        raise UnsupportedError(f"{where}={given!r}", [REFUSED[given.upper()]])
    return METHODS[choice(given, tuple(METHODS), where)]
