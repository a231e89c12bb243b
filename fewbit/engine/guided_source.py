"""StructuredOutputs: what an answer must look like; `source` says it as one text for the grammar compiler.

Every check here is bounded: nesting, entries and characters are counted before anything recursive sees the input.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewbit.engine import params_fields as check
from fewbit.engine.params_names import named
from fewbit.errors import RequestError

CHARACTERS = 1 << 17
NESTING = 64
GBNF = CHARACTERS // 2  # is translated first, which costs as much again
NODES = 50_000
CHOICES = 4096
WHITESPACE = r"[ ]|\n[ \t]{0,32}"  # between two parts of JSON, once: without a bound a weak model writes nothing else

KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """Exactly one of: a JSON schema (dict or text), a pattern, some strings, a Lark or GBNF grammar, any object."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "json_object", _wanted(self.json_object))
        check.flag("disable_any_whitespace", self.disable_any_whitespace)
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise RequestError(f"structured_outputs takes exactly one of {', '.join(KINDS)}; it has {found}")
        source(self)


named(StructuredOutputs, {}, {
    "disable_fallback": "there is one grammar compiler",
    "disable_additional_properties": "say additionalProperties in the schema",
    "whitespace_pattern": "use disable_any_whitespace",
    "structural_tag": "use a grammar",
    "backend": "there is one grammar compiler",
})  # fmt: skip


def given(value: Any) -> StructuredOutputs:
    """As a keyword takes it: a StructuredOutputs, or a mapping with its fields."""
    if isinstance(value, StructuredOutputs):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return StructuredOutputs(**value)
    raise RequestError(f"structured_outputs is {check.shown(value)}; it takes one of {', '.join(KINDS)} by name")


def source(wanted: StructuredOutputs) -> tuple[str, str]:
    """-> "json_schema", "regex", "lark" or "gbnf", and the text of it."""
    if wanted.json is not None:
        return "json_schema", _schema(wanted.json, wanted.disable_any_whitespace)
    if wanted.json_object:
        return "json_schema", _schema({"type": "object"}, wanted.disable_any_whitespace)
    if wanted.regex is not None:
        return "regex", _text("regex", wanted.regex)
    if wanted.choice is not None:
        return "lark", "start: " + " | ".join(_choices(wanted.choice))
    grammar = _text("grammar", wanted.grammar)
    if "::=" not in grammar:
        return "lark", grammar
    _small("grammar", grammar, GBNF)
    return "gbnf", grammar


def _wanted(value: Any) -> bool | None:
    return None if value is None else (check.flag("json_object", value) or None)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise RequestError(f"{name} is {check.shown(value)}; it takes text")
    _small(name, value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} holds half a character at {error.start}, which no text can match") from error
    return value


def _small(name: str, text: str, most: int = CHARACTERS) -> None:
    if len(text) > most:
        raise RequestError(f"{name} has {len(text)} characters; at most {most} are taken")


def _choices(value: Any) -> list[str]:
    found = check.listed("choice", value, CHOICES)
    if not found:
        raise RequestError("choice is empty; it takes at least one string")
    _small("choice", "".join(_text("an entry of choice", one) for one in found))
    return [json.dumps(one, ensure_ascii=False) for one in found]


def _schema(value: Any, tight: bool) -> str:
    schema = _read(_text("json", value)) if isinstance(value, str) else value
    if not isinstance(schema, Mapping):
        raise RequestError(f"json is {check.shown(schema)}; it takes a JSON schema, which is an object")
    _bounded(schema)
    space = {"whitespace_flexible": False} if tight else {"whitespace_pattern": WHITESPACE}
    schema = {**schema, "x-guidance": space}
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RequestError(f"json cannot be written as JSON: {str(error)[:200]}") from error
    _small("json", text)
    return text


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"json is no JSON text: {str(error)[:200]}") from error


def _bounded(schema: Any) -> None:
    """Nothing recursive may see a value that is deep, cyclic, or shares its parts so often that it is large."""
    seen, left = 0, [(schema, 1)]
    while left:
        value, depth = left.pop()
        children = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        seen += 1 + len(children)
        if depth > NESTING or seen > NODES:
            raise RequestError(f"json is too large: at most {NESTING} levels and {NODES} values are taken")
        left += [(child, depth + 1) for child in children if isinstance(child, Mapping | list | tuple)]
