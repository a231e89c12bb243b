import json
import random
import re
import time
from typing import Any

import pytest
import torch

from fewbit.engine import guided_guard
from fewbit.engine.guided import Grammars, Matcher
from fewbit.engine.guided_source import StructuredOutputs
from fewbit.engine.params import SamplingParams
from fewbit.engine.sampler import Sampler
from fewbit.engine.sampler_row import Row
from fewbit.errors import RequestError
from tests.engine.tokenizers import byte_fallback, byte_level
from tests.yardstick import within

VOCAB = 600  # more logits than tokens, as padded models have
END = 2


def grammars(make: Any = byte_level) -> Grammars:
    return Grammars(make(), VOCAB)


def allowed(matcher: Matcher) -> set[int]:
    words = [word & 0xFFFFFFFF for word in matcher.mask().tolist()]
    return {i for i in range(VOCAB) if words[i // 32] >> (i % 32) & 1}


def answer(matcher: Matcher, make: Any, seed: int, most: int = 400) -> tuple[str, bool]:
    """A random answer through the sampler -> its text, and whether it is whole."""
    sampler, ids = Sampler(VOCAB, "cpu"), []
    values = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))
    values[END] = 5.0
    while len(ids) < most:
        row = Row(SamplingParams(temperature=1.5), [1], ids, seed, matcher.mask())
        found = sampler.sample(values.unsqueeze(0), [row])
        assert found.bad == [False]
        if found.tokens[0] == END:
            return make().decode(ids), True
        matcher.accept(found.tokens[0])
        ids = [*ids, found.tokens[0]]
        if matcher.finished:
            return make().decode(ids), True
    return make().decode(ids), False


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
GBNF = 'root ::= "yes" | "no" " "? item\nitem ::= [0-9]+\n'


def person(text: str) -> bool:
    found = json.loads(text)
    fields = set(found) <= {"name", "age", "tags"} and len(found["name"]) <= 6 and 0 <= found["age"] <= 120
    return fields and set(found.get("tags", [])) <= {"a", "b"}


GOOD: list[tuple[dict[str, Any], Any]] = [
    ({"json": PERSON}, person),
    ({"json": json.dumps(PERSON)}, person),
    ({"json": PERSON, "disable_any_whitespace": True}, lambda t: person(t) and not re.search(r"[:,]\s", t)),
    ({"json_object": True}, lambda t: isinstance(json.loads(t), dict)),
    ({"regex": r"[a-c]{2,5}-\d\d/\.x"}, lambda t: re.fullmatch(r"[a-c]{2,5}-\d\d/\.x", t)),
    ({"choice": ["red", "green", 'a "quoted" \\ one', "漢字😀\n"]},
     lambda t: t in {"red", "green", 'a "quoted" \\ one', "漢字😀\n"}),
    ({"choice": ["ab", "abc", "a"]}, lambda t: t in {"ab", "abc", "a"}),
    ({"grammar": 'start: "f(" NUM ("," NUM)* ")"\nNUM: /[0-9]{1,3}/'},
     lambda t: re.fullmatch(r"f\(\d{1,3}(,\d{1,3})*\)", t)),
    ({"grammar": GBNF}, lambda t: re.fullmatch(r"yes|no ?[0-9]+", t)),
]  # fmt: skip


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize(("given", "fits"), GOOD, ids=lambda x: str(x)[:30] if isinstance(x, dict) else "fits")
def test_answers_fit(given: dict[str, Any], fits: Any, make: Any) -> None:
    grammar = grammars(make).compile(StructuredOutputs(**given))
    found = [answer(grammar.start(), make, seed) for seed in range(5)]
    assert any(whole for _, whole in found)
    assert all(fits(text.lstrip() if make is byte_fallback else text) for text, whole in found if whole), found


@pytest.mark.parametrize("given", [{"json": PERSON}, {"json_object": True}])
def test_white_space_ends(given: dict[str, Any]) -> None:
    """A model that would rather write white space than anything has to go on in the end; JSON in lines still fits."""
    grammar = grammars().compile(StructuredOutputs(**given))
    tokenizer, matcher, text = byte_level(), grammar.start(), ""
    blank = {t for t in range(len(tokenizer)) if (piece := tokenizer.decode([t])) and not piece.strip(" \n\t")}
    for _ in range(200):
        may = allowed(matcher) - {END}
        if matcher.finished or not may:
            break
        token = min(may & blank, default=min(may))
        text += tokenizer.decode([token])
        matcher.accept(token)
    before, *more = text.split('"')  # a string may hold as much as its schema allows
    assert more and len(before) <= 34, text
    lines, whole = grammar.start(), json.dumps({"name": "x", "age": 3, "tags": ["a"]}, indent=4)
    for token in tokenizer.encode(whole, add_special_tokens=False):
        lines.accept(token)
    assert lines.error is None


def test_mask_and_place() -> None:
    grammar = grammars().compile(StructuredOutputs(choice=["ab", "cd"]))
    tokenizer = byte_level()
    a, b, c = tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    one, other = grammar.start(), grammar.start()
    assert one.mask().shape == ((VOCAB + 31) // 32,) and one.mask().dtype == torch.int32
    assert {a, c} <= allowed(one) and not {b, END} & allowed(one)
    one.accept(a)
    assert b in allowed(one) and c not in allowed(one) and a in allowed(other)
    one.accept(b)
    assert one.finished and allowed(one) == {END} and one.error is None
    assert not other.finished
    other.accept(b)
    assert other.error and other.finished and not allowed(other)


def test_an_end_of_the_model() -> None:
    grammar = Grammars(byte_level(), VOCAB, ends=[7, 9]).compile(StructuredOutputs(regex="a?"))
    assert {7, 9} <= allowed(grammar.start())


def test_compiled_once() -> None:
    mine = grammars()
    first = mine.compile(StructuredOutputs(json=PERSON))
    assert mine.compile(StructuredOutputs(json=json.loads(json.dumps(PERSON)))) is first
    with pytest.raises(RequestError) as once:
        mine.compile(StructuredOutputs(regex="("))
    start = time.perf_counter()
    with pytest.raises(RequestError) as twice:
        mine.compile(StructuredOutputs(regex="("))
    assert within(time.perf_counter() - start, 0.5) and str(once.value) == str(twice.value)


def nested(depth: int, wrap: Any, core: Any) -> Any:
    for _ in range(depth):
        core = wrap(core)
    return core


def shared(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value, value]
    return value


def chain(name: str) -> str:
    rules = [f'{name}{i}: {name}{i + 1} "b"' for i in range(5000)]
    return "\n".join([f"start: {name}0", *rules, f'{name}5000: "a"'])


CYCLE: dict[str, Any] = {"type": "object"}
CYCLE["properties"] = {"a": CYCLE}

HOSTILE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "two": {"regex": "a", "choice": ["a"]},
    "json_object false": {"json_object": False},
    "open regex": {"regex": "("},
    "look-ahead": {"regex": "(?=a)b"},
    "deep regex": {"regex": "(" * 20_000 + "a" + ")" * 20_000},
    "long regex": {"regex": "a" * 10**6},
    "surrogate": {"regex": "\ud800"},
    "not text": {"regex": 5},
    "huge count": {"regex": "a{99999999999}"},
    "pattern product": {"json": {"allOf": [{"type": "string", "pattern": f".*a{i}.*"} for i in range(30)]}},
    "number product": {"json": {"type": "integer", "multipleOf": 999999937}},
    "allOf of anyOf": {"json": {"allOf": [{"anyOf": [
        {"type": "object", "properties": {f"p{i}{j}": {"type": "string"}}} for j in range(4)]} for i in range(20)]}},
    "deep schema": {"json": nested(500, lambda core: {"type": "object", "properties": {"a": core}}, {})},
    "deep value": {"json": {"enum": nested(100_000, lambda core: [core], [])}},
    "deep text": {"json": "[" * 100_000},
    "shared": {"json": {"enum": shared(80)}},
    "cycle": {"json": CYCLE},
    "references": {"json": {"$ref": "#/$defs/a0", "$defs": {
        f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(3000)} | {"a3000": {"type": "integer"}}}},
    "remote": {"json": {"$ref": "http://example.com/schema.json"}},
    "endless": {"json": {"$ref": "#"}},
    "large enum": {"json": {"enum": [f"value {i}" for i in range(40_000)]}},
    "unknown format": {"json": {"type": "string", "format": "no such"}},
    "false": {"json": "false"},
    "list": {"json": "[]"},
    "no json": {"json": "{"},
    "not a number": {"json": {"minimum": float("nan")}},
    "no json value": {"json": {"a": object()}},
    "no json key": {"json": {(1, 2): 1}},
    "set": {"json": {"enum": {1, 2}}},
    "giant choice": {"choice": [f"choice {i}" for i in range(500_000)]},
    "long choice": {"choice": ["a" * 10**7]},
    "empty choice": {"choice": []},
    "empty text": {"choice": [""]},
    "number choice": {"choice": [5]},
    "no start": {"grammar": 'other: "a"'},
    "chain of terminals": {"grammar": chain("A")},
    "chain of rules": {"grammar": chain("a")},
    "doubling": {"grammar": "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(60)) + '\nA60: "a"'},
    "only itself": {"grammar": "start: start"},
    "parentheses": {"grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "bad gbnf": {"grammar": "root ::= ((("},
    "deep gbnf": {"grammar": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "long gbnf": {"grammar": "root ::= " + " | ".join(f'"w{i}"' for i in range(13_000))},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name: str) -> None:
    guided_guard.guard().check('{"grammars": [{"lark_grammar": "start: \\"a\\""}]}')  # the process is up
    mine = grammars()
    start = time.perf_counter()
    with pytest.raises(RequestError) as error:
        mine.compile(StructuredOutputs(**HOSTILE[name]))
    assert within(time.perf_counter() - start, guided_guard.SECONDS)
    assert len(str(error.value)) < 700
    assert mine.compile(StructuredOutputs(choice=["yes"])).start().mask().any()


def test_what_grows_while_it_answers_ends_that_answer() -> None:
    """A pattern whose states double with each letter."""
    matcher = grammars().compile(StructuredOutputs(regex="(.*a.{500}){20}")).start()
    rng, start = random.Random(0), time.perf_counter()
    for _ in range(3000):
        choices = sorted(allowed(matcher) - {END})
        if not choices:
            break
        matcher.accept(rng.choice(choices))
    assert matcher.error is not None and matcher.finished
    assert within(time.perf_counter() - start, 30)


def test_the_process_ends_with_its_owner() -> None:
    guard = guided_guard.Guard()
    guard.check('{"grammars": [{"lark_grammar": "start: \\"a\\""}]}')
    child = guard._child
    assert child is not None and child.poll() is None
    del guard
    assert child.poll() is not None


def test_tokenizers_that_do_not_tell_bytes() -> None:
    with pytest.raises(RequestError, match="tokenizer"):
        Grammars(object(), VOCAB).compile(StructuredOutputs(regex="a"))
