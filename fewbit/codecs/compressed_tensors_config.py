"""The quantization_config of compressed-tensors: its groups as rules, and back.

The library matches a module by exact name before regular expressions (in alphabetical order) before classes, and
`ignore` before all of them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from fewbit.codecs import compressed_tensors_args as args
from fewbit.codecs.codec import EMBEDDINGS, Config, kind_of
from fewbit.codecs.compressed_tensors_args import Args, args_of
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.elements import E2M1, E4M3, E8M0, F32
from fewbit.quant.plan import Match, Plan, Rule
from fewbit.quant.spec import Format, QuantSpec

WHERE = "config.json: quantization_config"
PACKINGS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense", "fakequant",
)  # fmt: skip
SPARSE = ("dense", "sparse-24-bitmask", "sparse-bitmask")
ORDER = ("exact", "regex", "class")
SCORES = ("q_attn", "k_cache")
Rotation = tuple[str, str, list[str]]  # target, kind (see `rotation`), ignored


def plan(config: Config) -> Plan:
    """Ignored names, then targets from the most to the least specific, then the cache."""
    config = _current(config)
    _refuse_old(config)
    rules = [_rule(target, None, f"{WHERE}.ignore[{i}]") for i, target in enumerate(config.get("ignore") or [])]
    kv = config.get("kv_cache_scheme")
    cache = args.cache_spec(kv, f"{WHERE}.kv_cache_scheme") if kv else None
    found: dict[str, Rule] = {}
    for name, group in _groups(config):
        where = f"{WHERE}.config_groups.{name}"
        cache = cache or _output_cache(group, where)
        if not _is_attention(group):
            form = _format(group, str(group.get("format") or config.get("format") or ""), where)
            targets = enumerate(group.get("targets") or [])
            found |= {str(target): _rule(target, form, f"{where}.targets[{i}]") for i, target in targets}
    ordered = sorted(found.values(), key=lambda r: (ORDER.index(r.match), r.pattern if r.match == "regex" else ""))
    online = rotations(config.get("transform_config") or {}, cache is not None)
    return Plan((*rules, *_rotated(ordered, online), *ordered), cache, "compressed-tensors")


def _current(config: Config) -> Config:
    """Old files nest the quantization under compression_config, beside the sparsity."""
    inner = config.get("quantization_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def _refuse_old(config: Config) -> None:
    packing = str(config.get("format") or "dense")
    sparse = str((config.get("sparsity_config") or {}).get("format") or "dense")
    if "marlin-24" in (packing, sparse):
        reason = "it holds weights in the order of one GPU kernel, and the library has removed it"
        raise UnsupportedError(f"{WHERE}: format marlin-24 is not read", [reason, "the uncompressed model would work"])
    if sparse not in SPARSE:
        raise UnsupportedError(f"{WHERE}.sparsity_config.format = {sparse}", [f"known: {', '.join(SPARSE)}"])
    if sparse != "dense" and not config.get("config_groups"):
        raise UnsupportedError(f"{WHERE}: a {sparse} model without quantization", ["only quantized ones are read"])
    if packing not in PACKINGS:
        raise CheckpointError(f"{WHERE}.format = {packing!r} is not known; known: {', '.join(PACKINGS)}")
    status = str(config.get("quantization_status") or "compressed")
    if packing in ("dense", "fakequant") and status in ("initialized", "calibration"):
        reasons = ["its scales were never set: calibrate first"]
        raise UnsupportedError(f"{WHERE}.quantization_status = {status}", reasons)


def _groups(config: Config) -> Iterable[tuple[str, Args]]:
    groups = config.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise CheckpointError(f"{WHERE}.config_groups must be an object, found {type(groups).__name__}")
    for name, group in groups.items():
        if isinstance(group, list):
            yield name, _preset(name, group)
        elif isinstance(group, dict):
            yield name, group
        else:
            raise CheckpointError(f"{WHERE}.config_groups.{name} must be an object, found {type(group).__name__}")


def _preset(name: str, targets: list[str]) -> Args:
    if name.upper() not in args.PRESETS:
        raise CheckpointError(f"{WHERE}.config_groups.{name} is no preset; presets: {', '.join(sorted(args.PRESETS))}")
    weights, act = args.PRESETS[name.upper()]
    return {"targets": targets, "weights": weights, "input_activations": act}


def _rule(target: object, form: Format | None, where: str) -> Rule:
    if not isinstance(target, str):
        raise CheckpointError(f"{where} must be a string, found {target!r}")
    if target.startswith("re:"):
        return Rule(target[3:], "regex", form, where)
    match: Match = "class" if "." not in target and target[:1].isupper() else "exact"
    return Rule(target, match, form, where)


def _is_attention(group: Args) -> bool:
    """A group that speaks of attention modules alone: what it rounds is the cache or the queries, no linear."""
    targets = group.get("targets") or []
    of_attention = all(re.search(r"(Attention|attn|attention)\W*$", str(t)) for t in targets)
    return not group.get("weights") and bool(targets) and of_attention


def _output_cache(group: Args, where: str) -> QuantSpec | None:
    """Old files speak of the cache as the output of k_proj and v_proj."""
    output, targets = group.get("output_activations"), group.get("targets") or []
    if not output:
        return None
    if all(re.search(r"[kv]_proj\W*$", str(t)) for t in targets):
        return args.cache_spec(output, f"{where}.output_activations")
    reasons = ["what a linear returns is not rounded here; of k_proj and v_proj alone it would mean the cache"]
    raise UnsupportedError(f"{where}.output_activations is set for {targets}", reasons)


def _format(group: Args, packing: str, where: str) -> Format | None:
    weights, act = group.get("weights"), group.get("input_activations")
    if weights:
        kinds = ("permute",) if args.is_reordered(weights) else ()
        rounded = args.act_spec(act, f"{where}.input_activations") if act else None
        return Format(args.weight_spec(weights, f"{where}.weights", packing), rounded, kinds)
    if act:
        reasons = ["the input of a weight that is not quantized is not rounded here"]
        raise UnsupportedError(f"{where} has input_activations and no weights", reasons)
    return None


def rotations(config: Config, cached: bool) -> list[Rotation]:
    """Rotations of inputs at run time; those fused into weights need nothing.

    Queries and keys turned by one matrix give the same scores: that matters only where the cache rounds keys.
    """
    found = []
    for name, scheme in (config.get("config_groups") or {}).items():
        kind, run, random = str(scheme.get("type")), int(scheme.get("head_dim") or 0), scheme.get("randomize")
        known = kind in ("hadamard", "random-hadamard")
        computed = kind == "hadamard" and not random
        scores = [bool(step.get("inverse")) for step in scheme.get("apply") or [] if step.get("location") in SCORES]
        cancels = known and not cached and len(scores) == 2 and scores[0] == scores[1]
        for step in scheme.get("apply") or []:
            location = step.get("location")
            if location in ("weight_input", "weight_output") or (cancels and location in SCORES):
                continue
            if location != "input" or not known:
                where = f"{WHERE}.transform_config.config_groups.{name}: location {location}"
                reasons = [f"a {kind} transform of {step.get('targets')} at run time has no form here"]
                raise UnsupportedError(where, [*reasons, "known: location input, type hadamard and random-hadamard"])
            words = (f".{name}_input", str(run), "inverse" if step.get("inverse") else "", "" if computed else "stored")
            turned = ":".join(("rotate", *words))
            found += [(target, turned, _names(step.get("ignore"))) for target in _names(step.get("targets"))]
    return found


def shared(config: Config) -> tuple[str, ...]:
    """Endings of the matrices of transforms, which stand under one module of many that use them."""
    schemes = (_current(config).get("transform_config") or {}).get("config_groups") or {}
    steps = {f".{name}_{step.get('location')}" for name, s in schemes.items() for step in s.get("apply") or []}
    return tuple(f"{step}.{tensor}" for step in sorted(steps) for tensor in ("weight", "perm"))


def _names(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _rotated(rules: Iterable[Rule], online: list[Rotation]) -> Iterable[Rule]:
    """For each rule and each rotation, a rule for the modules that both speak of; `read` finds the run in the kind."""
    for rule in rules:
        for target, kind, ignored in online if rule.format else ():
            assert rule.format is not None
            without = "".join(f"(?!{_pattern(_rule(name, None, ''))})" for name in ignored)
            pattern = f"{without}(?={_pattern(_rule(target, None, ''))}){_pattern(rule)}"
            kinds = (*rule.format.transforms, kind)
            yield Rule(pattern, "regex", replace(rule.format, transforms=kinds), rule.where)


def _pattern(rule: Rule) -> str:
    """As a regular expression; a class stands for every module of its kind that has a format."""
    of_kind = f"(?{'=' if rule.pattern == 'Embedding' else '!'}{EMBEDDINGS.pattern})"
    return {"regex": rule.pattern, "exact": re.escape(rule.pattern) + "$"}.get(rule.match, of_kind)


def config(formats: Mapping[str, Format], ignored: list[str], kv: QuantSpec | None) -> dict[str, Config]:
    """The quantization_config of modules in these formats."""
    members: dict[Format, list[str]] = {}
    for name, form in formats.items():
        members.setdefault(_plain(form), []).append(name)
    groups: dict[str, Args] = {}
    for form, names in sorted(members.items(), key=lambda item: -len(item[1])):
        # the largest group takes what no other one names
        others = names if groups else ["Linear", *(name for name in names if kind_of(name) != "Linear")]
        groups[f"group_{len(groups)}"] = _group(form, others)
    packings = {group["format"] for group in groups.values()} or {"dense"}
    whole = {
        "quant_method": "compressed-tensors",
        "format": packings.pop() if len(packings) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": args_of(kv, per_head=kv.scales[0].block == (1, 0)) if kv else None,
    }
    return {"quantization_config": whole}


def _group(form: Format, targets: list[str]) -> Args:
    return {
        "targets": targets,
        "weights": args_of(form.weight),
        "input_activations": args_of(form.act) if form.act else None,
        "output_activations": None,
        "format": packing_of(form),
    }


def _plain(form: Format) -> Format:
    """The format whatever float type its scales are kept in: what one group of modules shares."""
    return replace(form, weight=_in_f32(form.weight), act=_in_f32(form.act) if form.act else None)


def _in_f32(s: QuantSpec) -> QuantSpec:
    chain = (replace(c, element=F32) if c.element.kind == "native" else c for c in s.scales)
    return replace(s.stored, scales=tuple(chain))


def packing_of(form: Format) -> str:
    """The name of the layout that `write` uses."""
    element, scale = form.weight.element, form.weight.scales[0].element
    if element.kind == "int":
        # int4 with FP8 activations is packed, as engines expect it; with integer ones it lies in int8
        return "int-quantized" if form.act and form.act.element.kind == "int" else "pack-quantized"
    if element == E2M1:
        return "nvfp4-pack-quantized" if scale == E4M3 else "mxfp4-pack-quantized"
    if scale == E8M0:
        return "mxfp8-quantized"
    return "float-quantized" if form.act else "naive-quantized"
