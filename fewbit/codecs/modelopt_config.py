"""ModelOpt's two configs, flat (config.json) and nested (hf_quant_config.json), as rules, and back.

The name of an algorithm says everything but the group size, and the flat form drops that for most of them: a block of
(1, 0) then stands for what the scales in the file say. `quantized_layers` of MIXED_PRECISION names the algorithm of
each module; what it does not name is dense.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from fewbit.codecs.codec import Config, Located, refuse
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.elements import E2M1, E4M3, E8M0, F32, INT4, INT8, Element
from fewbit.quant.formats import TENSOR_FP8, TOKEN_FP8
from fewbit.quant.plan import Plan, Rule
from fewbit.quant.spec import Format, QuantSpec, Scale, describe, spec

FLAT, NESTED = "config.json: quantization_config", "hf_quant_config.json: quantization"
VISION = r"(?!(?:model\.)?(?:vision_tower|vision_model|vit_large_projector))"  # never quantized, and never listed
NVFP4 = spec(E2M1, (E4M3, 1, 16), (F32, 0, 0))
NVFP4_ACT = QuantSpec(E2M1, (Scale(E4M3, (1, 16), dynamic=True), Scale(F32, (0, 0))))
INT4_ROWS = spec(INT4, (F32, 1, 128))


def _mx(element: Element, dynamic: int = 0) -> QuantSpec:
    return spec(element, (E8M0, 1, 32), rule="mx-ceil", dynamic=dynamic)


ALGORITHMS: dict[str, Format] = {
    "FP8": Format(spec(E4M3, (F32, 0, 0)), TENSOR_FP8),
    "FP8_PER_CHANNEL_PER_TOKEN": Format(spec(E4M3, (F32, 1, 0)), TOKEN_FP8),
    "FP8_PB_WO": Format(spec(E4M3, (F32, 128, 128))),  # weights only, as the name says, whatever engines make of it
    "NVFP4": Format(NVFP4, NVFP4_ACT),
    "W4A16_NVFP4": Format(NVFP4),
    "NVFP4_AWQ": Format(NVFP4, NVFP4_ACT, ("input_scale",)),
    "NVFP4_SVD": Format(NVFP4, NVFP4_ACT, ("input_scale", "low_rank")),
    "W4A8_NVFP4_FP8": Format(spec(E2M1, (E4M3, 1, 32), (F32, 0, 0)), TENSOR_FP8),
    "MXFP4": Format(_mx(E2M1), _mx(E2M1, 1)),  # no tensor tells whether inputs are rounded; the tool's recipe does
    "W4A8_MXFP4_FP8": Format(_mx(E2M1), TENSOR_FP8),
    "MXFP8": Format(_mx(E4M3), _mx(E4M3, 1)),
    "W4A16_AWQ": Format(INT4_ROWS, None, ("input_scale",)),
    "W4A8_AWQ": Format(INT4_ROWS, TENSOR_FP8, ("input_scale",)),
    "W8A16": Format(spec(INT8, (F32, 1, 0))),
    "W8A8_SQ_PER_CHANNEL": Format(spec(INT8, (F32, 1, 0)), spec(INT8, (F32, 0, 0)), ("input_scale",)),
}
ALIASES = {
    "FP8_BLOCK_SCALES": "FP8_PB_WO", "FP8_PB_REAL": "FP8_PB_WO", "FP8_PC_PT": "FP8_PER_CHANNEL_PER_TOKEN",
    "INT4_AWQ": "W4A16_AWQ", "NVFP4_STATIC": "NVFP4", "NVFP4_SVDQUANT": "NVFP4_SVD",
}  # fmt: skip
CACHES: dict[str, QuantSpec | None] = {
    "NONE": None,
    "FP8": spec(E4M3, (F32, 0, 0)),
    "INT8": spec(INT8, (F32, 0, 0)),
    "NVFP4": NVFP4_ACT,
}


def claims(located: Located) -> str | None:
    """quant_method modelopt (modelopt_fp4 ...), or the nested file with its producer."""
    method, producer = str(located.config.get("quant_method") or ""), located.config.get("producer")
    if method:
        return f"{located.where}.quant_method = {method}" if method.lower().startswith("modelopt") else None
    if isinstance(producer, dict) and producer.get("name") == "modelopt":
        return f"{located.where}: producer.name = modelopt"
    nested = located.config.get("quantization")
    return f"{located.where}: quantization.quant_algo" if isinstance(nested, dict) and "quant_algo" in nested else None


def plan(config: Config) -> Plan:
    """Excluded names, then the algorithm of each module, or of all."""
    nested = config.get("quantization")
    where, config = (NESTED, nested) if isinstance(nested, dict) else (FLAT, config)
    algorithm = str(config.get("quant_algo") or "").upper()
    rules = list(_excluded(config, where))
    if algorithm == "MIXED_PRECISION":
        rules += _layers(config, where)
    elif algorithm:
        rules.append(Rule(VISION, "regex", _whole(algorithm, config, where), f"{where}.quant_algo"))
    return Plan(tuple(rules), _cache(config, where), "modelopt")


def _excluded(config: Config, where: str) -> Iterable[Rule]:
    """Wildcards of fnmatch, mostly the start of a name and `*`; a name without one also covers its children."""
    for key in ("exclude_modules", "ignore"):
        for i, name in enumerate(config.get(key) or []):
            if not isinstance(name, str):
                raise CheckpointError(f"{where}.{key}[{i}] must be a string, found {name!r}")
            if re.search(r"[*?\[]", name):
                yield Rule(name, "glob", None, f"{where}.{key}[{i}]")
            else:
                yield Rule(re.escape(name) + r"(?:\..*)?$", "regex", None, f"{where}.{key}[{i}]")


def _whole(algorithm: str, config: Config, where: str) -> Format:
    groups = config.get("config_groups") or {}
    first: Any = next(iter(groups.values()), {}) if isinstance(groups, dict) else {}
    size = config.get("group_size") or (first.get("weights") or {}).get("group_size")
    form = _format(algorithm, size, f"{where}.quant_algo")
    bare = groups and all("input_activations" in g and not g["input_activations"] for g in groups.values())
    return replace(form, act=None) if bare else form


def _layers(config: Config, where: str) -> list[Rule]:
    layers = config.get("quantized_layers")
    if not isinstance(layers, dict):
        raise CheckpointError(f"{where}.quantized_layers must be an object: MIXED_PRECISION names every module")
    rules, parents = [], []
    for name, layer in layers.items():
        here = f"{where}.quantized_layers[{name!r}]"
        if not isinstance(layer, dict) or not layer.get("quant_algo"):
            raise CheckpointError(f"{here}.quant_algo is missing")
        form = _format(str(layer["quant_algo"]).upper(), layer.get("group_size"), here)
        rules.append(Rule(name, "exact", form, here))
        if name.endswith("experts"):  # named as one module, stored one by one
            parents.append(Rule(re.escape(name) + r"\..*", "regex", form, here))
    return rules + parents


def _format(algorithm: str, size: Any, where: str) -> Format:
    algorithm = ALIASES.get(algorithm, algorithm)
    if algorithm not in ALGORITHMS:
        raise UnsupportedError(f"{where}: {algorithm} is not known", [f"known: {', '.join(sorted(ALGORITHMS))}"])
    form = ALGORITHMS[algorithm]
    if not has_groups(form.weight):
        return form
    if size is not None and (not isinstance(size, int) or size <= 0):
        raise CheckpointError(f"{where}: group_size must be a positive number, found {size!r}")
    return replace(form, weight=with_group(form.weight, size or 0))


def has_groups(weight: QuantSpec) -> bool:
    """Formats whose group size is a choice."""
    return weight.element == INT4 or len(weight.scales) == 2


def with_group(weight: QuantSpec, size: int) -> QuantSpec:
    return replace(weight, scales=(replace(weight.scales[0], block=(1, size)), *weight.scales[1:]))


def _cache(config: Config, where: str) -> QuantSpec | None:
    """A name, or in flat configs a dict, which always means FP8."""
    found = config.get("kv_cache_quant_algo") or config.get("kv_cache_scheme") or "NONE"
    if isinstance(found, dict):
        kind = f"{found.get('type')}{found.get('num_bits')}"
        name = {"float8": "FP8", "int8": "INT8"}.get(kind, kind)
    else:
        name = str(found).upper()
    if name not in CACHES:
        reasons = [f"known: {', '.join(CACHES)}", "affine caches take a bias from keys and values"]
        raise UnsupportedError(f"{where}: a cache of {name} is not known", reasons)
    return CACHES[name]


def algorithm_of(form: Format) -> str | None:
    """The algorithm that holds a fitted format."""
    return next((name for name, row in ALGORITHMS.items() if _same(row, form)), None)


def _same(row: Format, form: Format) -> bool:
    weight = row.weight
    rows, cols = form.weight.scales[0].block
    if weight.element == INT4 and rows == 1 and cols:
        weight = with_group(weight, cols)
    inputs = (row.act and row.act.stored) == (form.act and form.act.stored)
    # integers are smoothed or not under one name
    kinds = form.transforms == row.transforms or (weight.element.kind == "int" and not form.transforms)
    return weight.stored == form.weight.stored and inputs and kinds


def config(formats: Mapping[str, Format], ignored: list[str], kv: QuantSpec | None) -> dict[str, Config]:
    """Both spellings: the flat one for config.json, the nested one as its own file."""
    algorithms = {name: _layer(form) for name, form in formats.items()}
    names = {layer["quant_algo"]: layer for layer in algorithms.values()}
    if names.keys() == {"NVFP4", "NVFP4_AWQ"}:  # smoothing may be folded into a norm, and then leaves nothing here
        algorithms = dict.fromkeys(algorithms, names["NVFP4_AWQ"])
    kinds = {tuple(layer.items()) for layer in algorithms.values()}
    cache = next((name for name, s in CACHES.items() if (s and s.stored) == (kv and kv.stored)), None)
    if cache is None:
        raise refuse("modelopt", f"a cache of {describe(kv) if kv else 'nothing'}", f"known: {', '.join(CACHES)}")
    nested: Config = {"quant_algo": None, "kv_cache_quant_algo": None if cache == "NONE" else cache, "group_size": None}
    if len(kinds) > 1:
        nested |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": algorithms, "exclude_modules": []}
    else:
        nested |= dict(kinds.pop()) if kinds else {}
        nested["exclude_modules"] = ignored
    producer = {"name": "modelopt", "version": "0.47.0"}
    flat = _flat(nested, algorithms) | {"producer": producer}
    return {"quantization_config": flat, "hf_quant_config.json": {"producer": producer, "quantization": nested}}


def _layer(form: Format) -> Config:
    name = algorithm_of(form)
    if name is None:
        raise refuse("modelopt", describe(form.weight), "no algorithm of its is this format")
    if form.weight.scales[0].block[0] != 1 or not form.weight.scales[0].block[1]:
        return {"quant_algo": name}
    scaled = {"has_zero_point": False, "pre_quant_scale": True} if "input_scale" in ALGORITHMS[name].transforms else {}
    return {"quant_algo": name, "group_size": form.weight.scales[0].block[1], **scaled}


def _flat(nested: Config, layers: Mapping[str, Config]) -> Config:
    groups: dict[str, Config] = {}
    if nested["quant_algo"] == "MIXED_PRECISION":
        members: dict[tuple[tuple[str, Any], ...], list[str]] = {}
        for name, layer in layers.items():
            members.setdefault(tuple(layer.items()), []).append(name)
        groups = {f"group_{i}": _group(dict(key), names) for i, (key, names) in enumerate(members.items())}
    elif nested["quant_algo"]:
        groups = {"group_0": _group(nested, ["Linear"])}
    cache = nested["kv_cache_quant_algo"]
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"} if cache == "FP8" else cache
    return {
        "quant_method": "modelopt",
        "quant_algo": nested["quant_algo"],
        "config_groups": groups,
        "ignore": nested["exclude_modules"],
        **({"quantized_layers": nested["quantized_layers"]} if "quantized_layers" in nested else {}),
        **({"kv_cache_scheme": scheme} if cache else {}),
    }


def _group(layer: Config, targets: list[str]) -> Config:
    """An entry of config_groups; null activations mean that inputs stay as they are."""
    form = ALGORITHMS[layer["quant_algo"]]
    size = {"group_size": layer["group_size"]} if layer.get("group_size") else {}
    return {
        "targets": targets,
        "weights": _args(form.weight) | size,
        "input_activations": _args(form.act) | (size if form.act.scales[0].block[1] else {}) if form.act else None,
    }


def _args(s: QuantSpec) -> Config:
    return {
        "dynamic": False,
        "num_bits": int(s.element.bits),
        "type": "int" if s.element.kind == "int" else "float",
    }
