"""What is to be rounded and how, from whatever names it: a preset, a config of ModelOpt's, a format, a recipe."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fewbit.compat.insert import CACHE, Place, disk_modules, places
from fewbit.compat.methods import method_of
from fewbit.compat.modelopt import Found, resolve, role
from fewbit.compat.modelopt_config import Rounding, rules
from fewbit.compat.modelopt_presets import PRESETS
from fewbit.errors import CheckpointError, RequestError, SpecError, UnsupportedError
from fewbit.models.emulation import spec_in, spec_out
from fewbit.models.layers import Layers
from fewbit.quant.formats import FORMATS
from fewbit.quant.formats import get as row
from fewbit.quant.spec import QuantSpec
from fewbit.workflows import recipe as recipes
from fewbit.workflows.job import places_of
from fewbit.workflows.recipe import Recipe
from fewbit.workflows.schemes import resolve as scheme

Asked = str | Path | Mapping[str, Any] | Recipe | None
METHODS = {"auto": "max", "rtn": "max", "gptq": "gptq", "awq": "awq_lite", "smooth": "smoothquant"}
CACHES = {"fp8": "FP8_KV_CFG"}  # of a recipe's kv
ANY = SimpleNamespace(fit=lambda form: form)  # no dialect limits what is emulated


@dataclass(frozen=True, slots=True)
class Wish:
    """found: quantizer -> what it does. algorithm: as in ModelOpt's configs."""

    found: Found
    algorithm: Any


def told(found: Mapping[str, Rounding]) -> dict[str, Any]:
    """What quantizers do, by their names, as JSON."""
    return {name: {"spec": spec_out(w.spec), "constant": w.constant, "affine": w.affine, "turned": w.turned,
                   "outer": w.outer} for name, w in found.items()}  # fmt: skip


def retold(said: Mapping[str, Any], layers: Layers) -> Wish:
    """The inverse, on a model."""
    known = {place.names[0]: place for place in places(layers.model)}
    if unknown := sorted(said.keys() - known.keys()):
        raise CheckpointError(f"the state is of another model: this one has no {', '.join(unknown[:3])}")
    more = ("constant", "affine", "turned", "outer")
    return Wish({known[name]: Rounding(spec_in(held["spec"]), **{key: held[key] for key in more})
                 for name, held in said.items()}, "max")  # fmt: skip


def static(wanted: Wish) -> dict[str, Rounding]:
    """What a wish comes to, by the names of quantizers: without an algorithm inputs are scaled at each call."""
    method, _ = method_of(wanted.algorithm)
    out = {}
    for place, what in wanted.found.items():
        if role(place) == "input" and method is None and not what.constant:
            scales = tuple(replace(scale, dynamic=True) for scale in what.spec.scales)
            what = replace(what, spec=replace(what.spec, scales=scales))
        out[place.names[0]] = what
    return out


def config_of(asked: Asked) -> Mapping[str, Any] | Recipe | None:
    """A config of ModelOpt's, or a recipe; a format or a scheme is the recipe that it alone means."""
    if asked is None or isinstance(asked, Mapping | Recipe):
        return asked
    name = str(asked)
    if name in PRESETS:
        return PRESETS[name]
    if name.endswith((".json", ".yaml", ".yml")):
        return _file(Path(name))
    try:
        scheme(name)
    except SpecError as error:
        near = ", ".join(get_close_matches(name, [*PRESETS, *FORMATS], 4, 0.5))
        raise RequestError(f"fakequant {name!r}: no preset, format, scheme or file is called so"
                           + (f"; near: {near}" if near else "")) from error  # fmt: skip
    return Recipe(name)


def _file(path: Path) -> Mapping[str, Any] | Recipe:
    """ModelOpt's config as JSON or YAML, alone or under `quantize`; or a recipe of ours."""
    import yaml

    try:
        text = path.read_text()
        body = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise RequestError(f"{path}: cannot be read as a config: {error}") from error
    if isinstance(body, dict) and isinstance(body.get("quantize"), dict):
        body = body["quantize"]
    if isinstance(body, dict) and "quant_cfg" in body:
        return {"quant_cfg": body["quant_cfg"], "algorithm": body.get("algorithm")}
    return recipes.read(text, str(path))


def wish(fakequant: Asked, kv_fakequant: Asked, layers: Layers) -> Wish:
    """Both, resolved on a model. layers: with transformers' own linears."""
    main, cache = config_of(fakequant), config_of(kv_fakequant)
    candidates = list(places(layers.model))
    if isinstance(main, Recipe) and cache is None and main.kv != "none":
        if main.kv not in CACHES:
            raise UnsupportedError(f"kv {main.kv!r} of the recipe", [f"emulated here: {', '.join(CACHES)}, none"])
        cache = PRESETS[CACHES[main.kv]]
    told = [rule for each in (main, cache) if isinstance(each, Mapping) for rule in rules(each)]
    found = resolve(told, candidates) if told else {}
    if isinstance(main, Recipe):
        found = by_recipe(main, layers, candidates) | found
    if isinstance(cache, Recipe):
        spec = of_cache(row(_one(cache)).weight)
        found |= {place: Rounding(spec) for place in candidates if place.leaf in CACHE}
    algorithm = main.get("algorithm") if isinstance(main, Mapping) else method(main) if main is not None else "max"
    return Wish(found, algorithm)


def _one(recipe: Recipe) -> str:
    """The row of a recipe that is a single format."""
    found = scheme(recipe.format, recipe.group_size)
    if not isinstance(found, str) or recipe.rules:
        raise RequestError(f"kv_fakequant {recipe.format!r}: want one format for all keys and values")
    return found


def of_cache(spec: QuantSpec) -> QuantSpec:
    """A format of weights as one of keys and values: scales of blocks and tokens at each call, of the whole static."""
    scales = tuple(replace(s, dynamic=s.block != (0, 0)) for s in spec.scales)
    if spec.zeros or any(s.block[0] not in (0, 1) for s in spec.scales) or spec.element.kind == "run":
        raise UnsupportedError("keys and values in this format", ["symmetric ones by tensor, token or block are"])
    return replace(spec, scales=scales)


def by_recipe(recipe: Recipe, layers: Layers, candidates: list[Place]) -> Found:
    """A recipe's targets, which are modules on disk, as quantizers of the model."""
    targets = recipes.targets(recipe, places_of(layers).values(), ANY)
    disk = disk_modules(layers.model)
    found: Found = {}
    for place in candidates:
        kind = role(place)
        if kind not in ("weight", "input"):
            continue
        projection = place.leaf.rpartition(".")[0]
        parameter = f"{place.owner}.{projection or 'weight'}"
        forms = {targets[n].format if n in targets else None for n in disk.get(parameter, [])}
        if len(forms) > 1:
            raise UnsupportedError(f"{parameter}: the recipe is about a part of what is one here")
        form = next(iter(forms), None)
        spec = None if form is None else form.weight if kind == "weight" else form.act
        if spec is not None:
            found[place] = Rounding(spec)
    return found


def method(recipe: Recipe) -> Any:
    """A recipe's algorithm by ModelOpt's name."""
    asked = {recipe.algo, *(rule.algo for rule in recipe.rules if rule.algo)}
    if len(asked) > 1 or recipe.algo not in METHODS:
        reasons = [
            f"emulated here: one of {', '.join(METHODS)}, for all modules",
            "fewbit quantize does the others, and fewbit serve --kernels decoded runs the result",
        ]
        raise UnsupportedError(f"algorithm {', '.join(sorted(asked))} of the recipe", reasons)
    known = {"alpha"} if recipe.algo == "smooth" else set()
    if more := sorted(set(recipe.options) - known):
        raise RequestError(f"algorithm {recipe.algo}: option {', '.join(more)} cannot be given here")
    return {"method": METHODS[recipe.algo], **recipe.options} if recipe.options else METHODS[recipe.algo]
