"""Recipe: what quantize is asked to do, as a value that reads from and writes to YAML. Unknown keys are errors.

Rules are tried in order and the first that matches a module decides; every rule must match something.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from re import error as RegexError
from re import fullmatch
from typing import Any

from fewbit import algos
from fewbit.algos.algo import Algo, options
from fewbit.errors import RequestError, SpecError, UnsupportedError
from fewbit.quant import formats
from fewbit.quant.spec import Format
from fewbit.workflows.schemes import DENSE, EMBEDS, Mixture, Place, resolve

VERSION = 1
AUTO = "auto"
KV_FORMATS = ("fp8", "fp8-head", "none")


@dataclass(frozen=True, slots=True)
class Rule:
    """match: a glob over module names, or a regular expression after `re:`."""

    match: str
    format: str | None = None  # a format, a scheme, or "dense"
    algo: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def hits(self, name: str) -> bool:
        if self.match.startswith("re:"):
            try:
                return fullmatch(self.match[3:], name) is not None
            except RegexError as error:
                raise SpecError(f"rule {self.match!r} is not a regular expression: {error}") from None
        return fnmatchcase(name, self.match)


@dataclass(frozen=True, slots=True)
class Recipe:
    """format and algo are what every linear gets that no rule speaks of."""

    format: str
    algo: str = AUTO
    options: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    kv: str = "none"
    group_size: int | None = None

    def to_yaml(self) -> str:
        import yaml

        body = {k: v for k, v in asdict(self).items() if v not in (None, {}, (), "none")}
        if "rules" in body:
            body["rules"] = [{k: v for k, v in rule.items() if v not in (None, {})} for rule in body["rules"]]
        return str(yaml.safe_dump({"version": VERSION, **body}, sort_keys=False))


@dataclass(frozen=True, slots=True)
class Target:
    """What one module becomes. chain: the transforms and scalings before the algorithm that encodes."""

    format: Format
    row: str
    chain: tuple[Algo, ...]
    options: Any
    rule: str  # the rule that said so

    @property
    def algo(self) -> Algo:
        return self.chain[-1]


def read(text: str, where: str) -> Recipe:
    """A recipe file's text."""
    import yaml

    try:
        body = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RequestError(f"{where}: not YAML: {error}") from None
    if not isinstance(body, dict):
        raise RequestError(f"{where}: a recipe is a mapping with version, format, algo, rules; found {type(body)}")
    if body.get("version") != VERSION:
        raise RequestError(f"{where}: version {body.get('version')!r}; this package reads version: {VERSION}")
    body = {k: v for k, v in body.items() if k != "version"}
    _known(body, Recipe, where)
    if "format" not in body:
        raise RequestError(f"{where}: no format: say what every linear becomes ('dense' for nothing)")
    rules = body.pop("rules", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise RequestError(f"{where}: rules is a list of mappings")
    for i, rule in enumerate(rules):
        _known(rule, Rule, f"{where}: rules[{i}]")
        if not isinstance(rule.get("match"), str) or not {"format", "algo"} & rule.keys():
            raise RequestError(f"{where}: rules[{i}]: a rule has a match, and a format or an algo")
    return Recipe(**body, rules=tuple(Rule(**rule) for rule in rules))


def _known(body: Mapping[str, Any], cls: type, where: str) -> None:
    types = {f.name: str(f.type) for f in fields(cls)}
    if unknown := sorted(map(str, set(body) - set(types))):
        raise RequestError(f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(types)}")
    for key, value in body.items():
        if types[key].startswith("str") and not isinstance(value, str | None):
            raise RequestError(f"{where}: {key} is a word, found {value!r}")
        if "Mapping" in types[key] and not isinstance(value, dict):
            raise RequestError(f"{where}: {key} is a mapping, found {value!r}")


def load(format: str | Path) -> Recipe:
    """A recipe file, or the recipe that a format or scheme alone means."""
    if str(format).endswith((".yaml", ".yml")):
        path = Path(format)
        try:
            return read(path.read_text(), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{path}: cannot be read as a recipe: {error}") from None
    return Recipe(str(format))


def targets(recipe: Recipe, places: Iterable[Place], codec: Any) -> dict[str, Target]:
    """Module -> what it becomes, in the dialect's form; every problem at once. Modules that stay dense are left out."""
    out: dict[str, Target] = {}
    problems: list[str] = []
    idle = list(recipe.rules)
    for at in places:
        rule = next((r for r in recipe.rules if r.hits(at.name)), None)
        idle = [r for r in idle if not r.hits(at.name)]
        if rule is None and not _by_default(recipe.format, at):
            continue
        try:
            found = _target(recipe, rule, at, codec)
        except (SpecError, UnsupportedError) as error:
            problems.append(f"{at.name}: {error}")
            continue
        if found is not None:
            out[at.name] = found
    problems += [f"rule {rule.match!r} matches no module" for rule in idle]
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise RequestError("\n".join(["the recipe does not fit this model:", *(f"  - {p}" for p in shown)]))
    return out


def _by_default(format: str, at: Place) -> bool:
    """Linears and experts; the head and the embedding only where a file type of llama.cpp says so."""
    if at.kind in ("head", "embedding"):
        return format.upper() in EMBEDS and not (at.kind == "head" and at.tied)
    return at.kind in ("linear", "expert")


def _target(recipe: Recipe, rule: Rule | None, at: Place, codec: Any) -> Target | None:
    asked = rule.format if rule is not None and rule.format else recipe.format
    found = resolve(asked, recipe.group_size if asked == recipe.format else None)
    row = _mixed(found, at)
    if row == DENSE:
        return None
    form: Format = codec.fit(formats.get(row))
    fits(form, at, row)
    algo = rule.algo if rule is not None and rule.algo else recipe.algo
    chain = chain_of(algo, form)
    given = options(chain[-1], rule.options if rule is not None and rule.algo else recipe.options)
    if left := chain[-1].leaves(given):
        codec.fit(replace(formats.get(row), transforms=left))  # or the reasons why not, before any work
    return Target(form, row, chain, given, rule.match if rule else "default")


def _mixed(found: str | Mixture, at: Place) -> str:
    return found if isinstance(found, str) else found(at)


def fits(form: Format, at: Place, row: str) -> None:
    """Refuse blocks that do not divide the rows of a module: no engine reads a torn block."""
    k = at.shape[-1]
    for scale in (*form.weight.scales, *form.weight.zeros):
        rows, cols = scale.block
        if rows >= 0 and cols and k % cols:
            near = [g for g in (128, 64, 32, 16) if g < cols and k % g == 0]
            hint = f"; {near[0]} does: --group-size {near[0]}" if near and "-g" in row else ""
            raise SpecError(f"{row}: blocks of {cols} do not divide rows of {k}{hint}")


def chain_of(algo: str, form: Format) -> tuple[Algo, ...]:
    """`smooth+gptq` -> the algorithms; `auto`: gptq below 5 bits, else rounding to nearest."""
    if algo == AUTO:
        algo = "gptq" if form.weight.element.bits < 5 and form.weight.scales else "rtn"
    return tuple(algos.get(name) for name in algo.split("+"))


def with_options(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with what the command line says on top."""
    return replace(recipe, **{k: v for k, v in changes.items() if v is not None})
