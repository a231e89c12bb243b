"""Strict JSON agrees with the standard library on sound text and refuses the rest in linear time."""

import json
import math
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.errors import CheckpointError
from fewbit.files.text import MAX_DEPTH, load_json
from tests.yardstick import within

SIMPLE = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SIMPLE, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=30)

BAD = {
    b"": "not JSON",
    b"{": "not JSON|brackets",
    b"[}": "not JSON|brackets",
    b"[1,]": "not JSON",
    b"\xef\xbb\xbf{}": "not JSON",
    b'"\xff"': "not UTF-8 at byte 1",
    b"NaN": "NaN",
    b"[-Infinity]": "Infinity",
    b"-1e400": "1e400",
    b'{"a": 1, "a": 1}': "duplicate key 'a'",
    b'{"\\u0061": 1, "a": 1}': "duplicate key 'a'",
    b'["\\ud800"]': "surrogate",
    b'"\\udc00\\ud800"': "surrogate",
    b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1): "nested deeper",
    b'"a\nb"': "not JSON",
}

GOOD = [
    b'"[[[[ {{{{ \\" ]]"',
    b'"\\\\"',
    b'"\\ud83d\\ude00"',
    b'{"\\\\ud800": "]"}',
    b"[" * MAX_DEPTH + b"]" * MAX_DEPTH,
    b" [1, 2.5, true, null] ",
]


@pytest.mark.parametrize("text", BAD)
def test_refused(text: bytes) -> None:
    with pytest.raises(CheckpointError, match=f"x.json: .*({BAD[text]})"):
        load_json(text, "x.json")


@pytest.mark.parametrize("text", GOOD)
def test_accepted(text: bytes) -> None:
    assert load_json(text, "x.json") == json.loads(text)


@given(VALUES, st.booleans())
def test_same_as_the_standard_library(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        with pytest.raises(CheckpointError):
            load_json(text, "x")
    else:
        assert load_json(text, "x") == value


@given(st.binary(max_size=200) | st.text(alphabet='{}[]",:\\u d8019a', max_size=60).map(str.encode))
@settings(max_examples=300)
def test_only_checkpoint_errors(text: bytes) -> None:
    try:
        load_json(text, "x")
    except CheckpointError as e:
        assert str(e).startswith("x: ")


@pytest.mark.parametrize(
    "text", [b"[" * 5_000_000, b'"' + b'\\"' * 2_500_000, b'{"a":' * 1_000_000, b'"' * 5_000_001], ids=range(4)
)
def test_hostile_text_takes_linear_time(text: bytes) -> None:
    start = time.process_time()
    with pytest.raises(CheckpointError):
        load_json(text, "x")
    assert within(time.process_time() - start, 3)


def test_infinity_where_it_is_asked_for() -> None:
    text = b'{"limit": [0.0, Infinity, -Infinity]}'
    assert load_json(text, "x.json", infinite=True) == {"limit": [0.0, math.inf, -math.inf]}
    for other in (b"[NaN]", b"[1e400]"):
        with pytest.raises(CheckpointError, match="is not a JSON number"):
            load_json(other, "x.json", infinite=True)


def test_size_is_bounded_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(CheckpointError, match=rf"config.json: {1 << 40} bytes"):
        load_json(path, str(path))
    with pytest.raises(CheckpointError, match="at most 3"):
        load_json(b"[1, 2]", "x", max_bytes=3)
