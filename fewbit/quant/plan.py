"""Plan: which module gets which format, as rules on the names found on disk. The first rule that matches wins."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from fewbit.errors import SpecError
from fewbit.quant.spec import Format, QuantSpec

Match = Literal["exact", "regex", "glob", "substring", "class", "any"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a quantization config: what it matches, and the format it gives (None = leave dense)."""

    pattern: str
    match: Match
    format: Format | None
    where: str = ""  # the file and key it came from

    def hits(self, name: str, kind: str) -> bool:
        return MATCHERS[self.match](self.pattern, name, kind)


MATCHERS: Mapping[Match, Callable[[str, str, str], bool]] = {
    "exact": lambda pattern, name, kind: pattern == name,
    "regex": lambda pattern, name, kind: re.match(pattern, name) is not None,
    "glob": lambda pattern, name, kind: fnmatchcase(name, pattern),
    "substring": lambda pattern, name, kind: pattern in name,
    "class": lambda pattern, name, kind: pattern == kind,
    "any": lambda pattern, name, kind: True,
}

# how any quantization_config becomes a plan; fewbit.codecs, which imports this module, puts its reader here
READERS: list[Callable[[dict[str, Any]], "Plan"]] = []


@dataclass(frozen=True, slots=True)
class Plan:
    """Ordered rules, and the format of the KV cache."""

    rules: tuple[Rule, ...] = ()
    kv: QuantSpec | None = None
    dialect: str = ""
    # a config may name each of 20,000 experts: exact names are looked up, only the other rules are tried in turn
    _exact: dict[str, int] = field(init=False, repr=False, compare=False)
    _others: tuple[tuple[int, Rule], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        places = {rule.pattern: i for i, rule in reversed(tuple(enumerate(self.rules))) if rule.match == "exact"}
        object.__setattr__(self, "_exact", places)
        object.__setattr__(self, "_others", tuple((i, r) for i, r in enumerate(self.rules) if r.match != "exact"))
        for _, rule in self._others:
            if rule.match == "regex":
                _compile(rule)

    def for_module(self, name: str, kind: str = "Linear") -> tuple[Format | None, Rule | None]:
        """The format of a module and the rule that gave it; (None, None) when no rule speaks of it."""
        first = self._exact.get(name, len(self.rules))
        for i, rule in self._others:
            if i > first:
                break
            if rule.hits(name, kind):
                return rule.format, rule
        return (self.rules[first].format, self.rules[first]) if first < len(self.rules) else (None, None)

    def idle(self, names: Iterable[str], kind: str = "Linear") -> list[Rule]:
        """Rules that no name would hit even alone; what everything matches is never idle."""
        names = set(names)
        return [r for r in self.rules if r.match != "any" and not _hits_any(r, names, kind)]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Plan":
        """A quantization_config of any dialect (or a config.json that holds one) -> its plan."""
        for key in ("quantization_config", "compression_config"):
            if isinstance(config.get(key), dict):
                config = config[key]
        if not READERS:
            raise SpecError("no dialect is known yet: import fewbit.codecs")
        return READERS[0](config)


def _hits_any(rule: Rule, names: set[str], kind: str) -> bool:
    return rule.pattern in names if rule.match == "exact" else any(rule.hits(name, kind) for name in names)


def _compile(rule: Rule) -> None:
    try:
        re.compile(rule.pattern)
    except re.error as error:
        raise SpecError(f"{rule.where or 'rule'}: {rule.pattern!r} is not a regular expression: {error}") from None
