import random
import time
from typing import Any

import pytest

from fewbit.engine.params import SamplingParams
from fewbit.engine.text import Detokenizer, token_text
from fewbit.engine.text_stop import Stops
from tests.engine.tokenizers import byte_fallback, byte_level
from tests.yardstick import within

TOKENIZERS = [byte_level, byte_fallback]
TEXTS = [
    "plain words, and a few more of them. " * 5,
    "naïve café 漢字かな交じり文 한국어 ไทย \N{REPLACEMENT CHARACTER} x",
    "👩‍👩‍👧‍👦😀 👍🏽🇫🇷 e\u0301 \t\n  indented\n\n",
    " leading and  double  spaces ",
    "<s> not special</s>",
]


def spoken(tokenizer: Any, ids: list[int], **given: Any) -> list[str]:
    stream = Detokenizer(tokenizer, SamplingParams(**given))
    pieces = [stream.push([token]) for token in ids]
    pieces.append(stream.finish())
    assert stream.text == "".join(pieces)
    return pieces


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("skip", [True, False])
def test_pieces_join_to_the_whole(make: Any, skip: bool) -> None:
    tokenizer = make()
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces = spoken(tokenizer, [1, *ids, 2], skip_special_tokens=skip)
        assert "".join(pieces) == tokenizer.decode([1, *ids, 2], skip_special_tokens=skip)


def test_random_bytes_join_to_the_whole() -> None:
    tokenizer, rng = byte_level(), random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(1, 60))]
        assert "".join(spoken(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_lone_bytes_of_byte_fallback() -> None:
    """Between other tokens; a valid character that a broken byte follows at once has gone out already."""
    tokenizer, rng = byte_fallback(), random.Random(1)
    for _ in range(300):
        ids = []
        for _ in range(rng.randrange(1, 60)):
            ids += [rng.randrange(3, len(tokenizer)), rng.randrange(259, len(tokenizer))]
        assert "".join(spoken(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_one_push_is_many_pushes() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("".join(TEXTS), add_special_tokens=False)
    stream = Detokenizer(tokenizer, SamplingParams())
    assert stream.push(ids[:50]) + stream.push(ids[50:]) + stream.finish() == "".join(spoken(tokenizer, ids))


@pytest.mark.parametrize("make", TOKENIZERS)
def test_no_half_characters(make: Any) -> None:
    tokenizer = make()
    ids = tokenizer.encode("a😀漢🇫🇷b", add_special_tokens=False)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in spoken(tokenizer, ids))
    cut = tokenizer.encode("ok👍", add_special_tokens=False)[:-1]
    assert spoken(tokenizer, cut)[-1] == tokenizer.decode(cut)[len("ok") :]


@pytest.mark.parametrize("token", ["</s>", "a", "�", "<0xFF>"])
def test_time_is_linear(token: str) -> None:
    tokenizer = byte_fallback()
    ids = [tokenizer.convert_tokens_to_ids(token)] * 20_000
    start = time.process_time()
    spoken(tokenizer, ids, skip_special_tokens=token != "</s>")
    assert within(time.process_time() - start, 8)


def test_nothing_to_say() -> None:
    assert "".join(spoken(byte_level(), [60, 61], detokenize=False)) == ""
    assert "".join(spoken(None, [60, 61])) == ""


STOPS = [  # pieces, stops, without, found
    (["one STOP two"], ["STOP"], "one ", "STOP"),
    (["one S", "T", "OP two"], ["STOP"], "one ", "STOP"),
    (["one S", "T", "EP"], ["STOP"], "one STEP", None),
    (["aab", "aab", "aaac"], ["aaac"], "aabaab", "aaac"),
    (["x", "abcx"], ["abcd", "c"], "xab", "c"),
    (["xab"], ["b", "ab"], "x", "ab"),
    (["xab"], ["ab", "b"], "x", "ab"),
    (["\n", "\n", "end"], ["\n\n"], "", "\n\n"),
    (["abab", "abac"], ["ababac"], "ab", "ababac"),
    (["the end", ""], ["end."], "the end", None),
    (["😀", "😀👍"], ["😀👍"], "😀", "😀👍"),
]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(("pieces", "stops", "text", "found"), STOPS)
def test_stops(pieces: list[str], stops: list[str], text: str, found: str | None, include: bool) -> None:
    follower, out = Stops(stops, include), ""
    for piece in pieces:
        out += follower.push(piece)
        if follower.found:
            break
    assert (out + follower.finish(), follower.found) == (text + (found or "" if include else ""), found)


def test_stops_against_a_search_of_the_whole() -> None:
    rng = random.Random(2)
    for _ in range(2000):
        text = "".join(rng.choices("ab", k=rng.randrange(30)))
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 6))) for _ in range(rng.randrange(1, 4))]
        follower, out, at = Stops(stops, False), "", 0
        while at < len(text) and follower.found is None:
            step = rng.randrange(1, 5)
            out += follower.push(text[at : at + step])
            at += step
        met = [(text.find(one) + len(one), -len(one)) for one in stops if one in text]
        assert out + follower.finish() == (text[: sum(min(met))] if met else text)


def test_held_back_until_it_cannot_be_a_stop() -> None:
    follower = Stops(["</answer>"], False)
    assert [follower.push(piece) for piece in ["yes <", "/ans", "or>", " </answer", ">"]] == [
        "yes ", "", "</ansor>", " ", ""]  # fmt: skip
    assert follower.found == "</answer>"


def test_long_stops_cost_little() -> None:
    strings = ["a" * 4000 + chr(0x100 + i) for i in range(64)]
    follower = Stops(strings, False)
    start = time.process_time()
    for _ in range(100):
        follower.push("a" * 10)
    assert within(time.process_time() - start, 1)


@pytest.mark.parametrize("least", [0, 4, 6])
def test_stops_wait_for_min_tokens(least: int) -> None:
    tokenizer = byte_fallback()
    ids = tokenizer.convert_tokens_to_ids(list("abcabcab"))
    text = "".join(spoken(tokenizer, ids, stop="bc", min_tokens=least))
    assert text == {0: "a", 4: "abca", 6: "abcabcab"}[least]


def test_stop_strings_through_the_detokenizer() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("first line\nUser: second", add_special_tokens=False)
    for include in (False, True):
        stream = Detokenizer(tokenizer, SamplingParams(stop="\nUser:", include_stop_str_in_output=include))
        for token in ids:
            stream.push([token])
        assert stream.stopped == "\nUser:"
        assert (stream.finish(), stream.text) == ("", "first line" + ("\nUser:" if include else ""))


def test_token_text() -> None:
    assert [token_text(byte_fallback(), token) for token in (2, 261, 263)] == ["</s>", "b", "d"]
