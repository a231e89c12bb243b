"""Calls found in texts: the whole text and every way to cut it into pieces say the same."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbit.server.failures import Refusal
from fewbit.server.protocol import Tool
from fewbit.server.tool_stream import Calls
from fewbit.server.tools import calls_in, choosing, parser_for

A = '<tool_call>\n{"name": "f", "arguments": {"x": "}{\\"", "y": [1, {"z": 2}]}}\n</tool_call>'
B = '<tool_call>{"arguments": {"q": 1}, "name": "g"}</tool_call>'
ARGS = {"x": '}{"', "y": [1, {"z": 2}]}

# form, text, what is left as text, calls
WHOLE: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    ("hermes", "just text", "just text", []),
    ("hermes", A, "", [("f", ARGS)]),
    ("hermes", "so: " + A, "so:", [("f", ARGS)]),
    ("hermes", A + "\n" + B, "", [("f", ARGS), ("g", {"q": 1})]),
    ("hermes", A.removesuffix("\n</tool_call>"), "", [("f", ARGS)]),
    ("hermes", "<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", []),
    ("hermes", "a <tool and <tool_calls", "a <tool and <tool_calls", []),
    ("hermes", "", "", []),
    ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', "", [("f", {"a": 1})]),
    ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": {}}}', "", [("f", {"a": {}})]),
    ("llama3_json", '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"b": 2}}', "",
     [("f", {}), ("g", {"b": 2})]),
    ("llama3_json", '{"parameters": {"a": 1}, "name": "f"}', "", [("f", {"a": 1})]),
    ("llama3_json", "plain text {", "plain text {", []),
    ("llama3_json", '{"answer": 1}', '{"answer": 1}', []),
    ("array", '[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {}}]', "",
     [("f", {"a": 1}), ("g", {})]),
    ("array", '[{"name": "f", "par', '[{"name": "f", "par', []),
    ("f", '{"a": 1}', "", [("f", {"a": 1})]),
    ("none", A, A, []),
]  # fmt: skip


def put_together(form: str, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    stream, text = Calls(form), ""
    calls: list[list[str]] = []
    for i, piece in enumerate(pieces):
        for kind, *rest in stream.push(piece, i == len(pieces) - 1):
            if kind == "text":
                text += rest[0]
            elif kind == "call":
                assert rest[0] == len(calls)
                calls.append([rest[1], ""])
            else:
                calls[rest[0]][1] += rest[1]
    return text, [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize(("form", "text", "left", "calls"), [row for row in WHOLE if row[0] != "none"])
def test_whole(form: str, text: str, left: str, calls: list[tuple[str, Any]]) -> None:
    found_left, found = calls_in(text, form)
    assert (found_left, [(call.name, json.loads(call.arguments)) for call in found]) == (left, calls)


@pytest.mark.parametrize(("form", "text", "left", "calls"), WHOLE)
def test_pieces(form: str, text: str, left: str, calls: list[tuple[str, Any]]) -> None:
    cuts = [[text], [*text, ""], *([text[:i], text[i:]] for i in range(len(text)))]
    for pieces in cuts:
        found_left, found = put_together(form, pieces)
        assert (found_left.strip(), found) == (left.strip(), calls), pieces


@given(st.sampled_from(["hermes", "llama3_json", "array"]),
       st.lists(st.sampled_from(["<tool_call>", "</tool_call>", '{"name": "f", ', '"arguments": {', "}", "}}", '"', "a",
                                 " ", ";", "[", "]", "\\"]), max_size=12))  # fmt: skip
def test_any_text_ends(form: str, pieces: list[str]) -> None:
    stream = Calls(form)
    for piece in pieces:
        stream.push(piece)
    stream.push("", True)
    calls_in("".join(pieces), form)


TOOLS = [Tool.model_validate({"type": "function", "function": {"name": name}}) for name in ("f", "g")]


def test_choices() -> None:
    assert choosing(None, None, None).form == choosing(TOOLS, "none", None).form == "none"
    assert choosing(TOOLS, None, "hermes").form == choosing(TOOLS, "auto", "hermes").form == "hermes"
    assert choosing(TOOLS, {"type": "function", "function": {"name": "g"}}, None).form == "g"
    forced = choosing(TOOLS, "required", None)
    assert forced.forced and len(forced.schema()["items"]["anyOf"]) == 2  # type: ignore[index]
    for wrong in ("auto", "maybe", {"type": "function", "function": {"name": "h"}}):
        with pytest.raises(Refusal):
            choosing(TOOLS, wrong, None)


def test_parser_by_template() -> None:
    assert parser_for("... <tool_call> ...") == "hermes"
    assert parser_for('... "parameters" ...') == "llama3_json"
    assert parser_for("plain") is parser_for(None) is None
