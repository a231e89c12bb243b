"""Tools: what a request offers, how a model's text becomes calls, and the schema that forces one.

hermes: <tool_call>{"name", "arguments"}</tool_call>, as often as wanted. llama3_json: the whole text is
{"name", "parameters"}, several with semicolons between.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fewbit.server.failures import Refusal
from fewbit.server.protocol import Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
TAG = "<|python_tag|>"
ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: str  # JSON

    def object(self) -> dict[str, Any]:
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
                "function": {"name": self.name, "arguments": self.arguments}}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Choosing:
    """What a request says about tools. form: how calls are found in the text."""

    tools: Sequence[Tool]
    form: str  # none, hermes, llama3_json, array (of a forced choice) or the name of one function

    @property
    def forced(self) -> bool:
        return self.form not in ("none", "hermes", "llama3_json")

    def schema(self) -> dict[str, Any] | None:
        if not self.forced:
            return None
        if self.form != "array":
            return parameters(named(self.tools, self.form))
        calls = [_call_schema(tool) for tool in self.tools]
        return {"type": "array", "minItems": 1, "items": calls[0] if len(calls) == 1 else {"anyOf": calls}}


def choosing(tools: Sequence[Tool] | None, choice: str | dict[str, Any] | None, parser: str | None) -> Choosing:
    """tools and tool_choice -> Choosing. parser: hermes or llama3_json, where one is known."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise Refusal(400, "tool_choice is given and tools are not", "tool_choice")
        return Choosing((), "none")
    if choice in (None, "auto"):
        if parser is None:
            raise Refusal(400, "tool_choice auto needs a parser for this model's calls: start the server with "
                               "--tool-call-parser hermes or llama3_json", "tool_choice")  # fmt: skip
        return Choosing(tools, parser)
    if choice == "none":
        return Choosing(tools, "none")
    if choice == "required":
        return Choosing(tools, "array")
    if isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("function"), dict):
        return Choosing(tools, named(tools, str(choice["function"].get("name"))).function.name)
    raise Refusal(400, "tool_choice: auto, none, required and {type: function, function: {name}} are known",
                  "tool_choice")  # fmt: skip


def parser_for(template: str | None) -> str | None:
    """The form of calls that a chat template asks a model for."""
    if template and OPEN in template:
        return "hermes"
    if template and ("python_tag" in template or '"parameters"' in template):
        return "llama3_json"
    return None


def named(tools: Sequence[Tool], name: str) -> Tool:
    for tool in tools:
        if tool.function.name == name:
            return tool
    raise Refusal(400, f"tool_choice names {name[:64]!r}, which is not among the tools", "tool_choice")


def parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}}


def _call_schema(tool: Tool) -> dict[str, Any]:
    fields = {"name": {"type": "string", "enum": [tool.function.name]}, "parameters": parameters(tool)}
    return {"type": "object", "properties": fields, "required": ["name", "parameters"], "additionalProperties": False}


def calls_in(text: str, form: str) -> tuple[str, list[Call]]:
    """What is left of a whole text, and the calls in it; text that only looks like calls stays text."""
    if form == "hermes":
        return _hermes(text)
    if form == "llama3_json":
        found = _objects(text.strip().removeprefix(TAG))
        return ("", found) if found else (text, [])
    if form == "array":
        return _array(text)
    return ("", [Call(form, text)]) if text else ("", [])


def _hermes(text: str) -> tuple[str, list[Call]]:
    before, *parts = text.split(OPEN)
    found, kept = [], [before]
    for part in parts:
        inner, closed, after = part.partition(CLOSE)
        call = call_of(_loaded(inner))
        if call is None:
            kept.append(OPEN + part)
        else:
            found.append(call)
            kept.append(after if closed else "")
    return "".join(kept).strip() if found else text, found


def _objects(text: str) -> list[Call]:
    """Objects with semicolons or white space between them and nothing else; else none."""
    found, at, decoder = [], 0, json.JSONDecoder()
    while at < len(text):
        if text[at] in "; \n\t\r":
            at += 1
            continue
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        call = call_of(value)
        if call is None:
            return []
        found.append(call)
    return found


def _array(text: str) -> tuple[str, list[Call]]:
    value = _loaded(text)
    calls = [call_of(one) for one in value] if isinstance(value, list) else [None]
    good = [call for call in calls if call is not None]
    return ("", good) if len(good) == len(calls) else (text, [])


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def call_of(value: Any) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    for key in ARGUMENTS:
        if key in value:
            given = value[key]
            return Call(value["name"], given if isinstance(given, str) else json.dumps(given, ensure_ascii=False))
    return None
