"""Calibration data of all kinds: files, files that are not what they claim to be, folders, data sets by name."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fewbit.errors import CheckpointError, RequestError, UnsupportedError
from fewbit.workflows import calibration_read, calibration_sets
from fewbit.workflows.calibration import calibration
from fewbit.workflows.calibration_read import read
from tests.workflows.calibrating import TOKENIZER, Bytes, texts, write

# --- files


def test_rows_of_all_kinds(tmp_path: Path) -> None:
    rows = [
        {"text": "a"}, {"content": "b"}, {"prompt": "c", "completion": "d"},
        {"instruction": "e", "input": "f", "output": "g"},
        {"messages": [{"role": "user", "content": "h"}, {"role": "assistant", "content": "i"}], "prompt": "x"},
        {"conversations": [{"from": "human", "value": "j"}, {"from": "gpt", "value": "k"}]}, "l", {"article": "m"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "n"}, {"type": "image"}]},
                      {"role": "assistant", "content": None, "tool_calls": []}]},
    ]  # fmt: skip
    want = ["a", "b", "c\nd", "e\nf\ng", "h\ni", "j\nk", "l", "m", "n\n"]
    assert texts(write(tmp_path / "a.jsonl", *rows)) == want
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert texts(tmp_path / "a.json") == want
    found = list(read(tmp_path / "a.json", 1 << 20))
    assert found[5].messages == [{"role": "user", "content": "j"}, {"role": "assistant", "content": "k"}]
    assert found[2].messages == [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    assert texts(write(tmp_path / "b.jsonl", {"text": "no", "story": "yes"}), column="story") == ["yes"]


def test_text_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\nlines\n\n\n\nthree")
    (document,) = read(tmp_path / "a.md", 1 << 20)
    assert document.text == "one\n\ntwo\nlines\n\n\n\nthree" and document.parts == 3 and not document.more
    (document,) = read(tmp_path / "a.md", 18)
    assert document.text == "one" and document.more


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b", "c"] * 100, "n": list(range(300))}), path)
    assert texts(path) == ["a", "b", "c"] * 100 and len(texts(path, 5)) == 5
    with pytest.raises(RequestError, match="found 'n': name one with --calib-column"):
        parquet.write_table(pyarrow.table({"n": [1]}), path)
        texts(path)
    path.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    with pytest.raises(CheckpointError, match="not readable as parquet"):
        texts(path)


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UnsupportedError, match=r"pip install fewbit\[data\]"):
        texts(tmp_path / "a.parquet")


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / ".hidden.txt").write_text("hidden " * 500)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "b.txt").write_text("beta " * 2000)
    (tmp_path / "deep" / "c.txt").write_text("gamma " * 2000)
    write(tmp_path / "a.jsonl", *([{"text": "alpha " * 50}] * 40))
    found = calibration(TOKENIZER, tmp_path, samples=30, length=100)
    seen = " ".join(TOKENIZER.text(row) for row in found.ids)
    assert all(word in seen for word in ("alpha", "beta", "gamma")) and "hidden" not in seen
    first = calibration(TOKENIZER, tmp_path, samples=30, length=100, order="first")
    assert "gamma" not in " ".join(TOKENIZER.text(row) for row in first.ids)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match=r"no file to read; what works: files that end in \.txt"):
        calibration(TOKENIZER, tmp_path / "empty")


BROKEN: list[tuple[str, bytes, str]] = [
    ("a.txt", b"", "no text in it"),
    ("a.txt", b" \n\n \n", "no text in it"),
    ("a.txt", b"one\ntwo\n\xff\n", r"line 3: not UTF-8 at byte 8"),
    ("a.txt", b"one\ntwo\0\n", r"line 2: a zero byte"),
    ("a.txt", "text".encode("utf-16"), "UTF-16 text"),
    ("a.txt", b"cut \xe2\x82", "line 1: not UTF-8"),
    ("a.jsonl", b"", "no row with any text"),
    ("a.jsonl", b'{"text": ""}\n', "no row with any text"),
    ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"line 3: .*not JSON|line 3: JSON nested"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"line 2: not UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n[1, 2]\n', r"line 2: want an object with text"),
    ("a.jsonl", b'{"text": 5}\n', r"line 1: text: want text or a list of messages"),
    ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', r"line 1: messages\[0\]: want a message .* found fields 'role'"),
    ("a.jsonl", b'{"messages": ["hi"]}\n', r"line 1: messages\[0\]: want a message"),
    ("a.jsonl", b'{"text": "a", "text": "b"}\n', "line 1: duplicate key"),
    ("a.jsonl", b'{"text": NaN}\n', "line 1: NaN"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "lone surrogate"),
    ("a.jsonl", b"[" * 100_000, "line 1: JSON nested deeper"),
    ("a.jsonl", b"\x1f\x8b\x08\x00", r"line 1: a zero byte"),
    ("a.json", b'{"text": "a"}', r"want a list of texts or objects, found an object"),
    ("a.json", b'[{"text": "a"}, 7]', r"item 1: want an object"),
    ("a.json", b"[1, 2", "nested|brackets"),
    ("a.json", b"[]", "no row with any text"),
]


@pytest.mark.parametrize(("name", "data", "text"), BROKEN)
def test_broken_files(tmp_path: Path, name: str, data: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=text) as failure:
        calibration(TOKENIZER, tmp_path / name, samples=1, length=2)
    assert name in str(failure.value)


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"story": "once", "id": 3})
    with pytest.raises(RequestError, match=r"line 1: .*found 'story', 'id': name one with --calib-column"):
        calibration(TOKENIZER, path)
    with pytest.raises(RequestError, match=r"line 1: no field 'tale' .*; found 'story', 'id'"):
        calibration(TOKENIZER, path, column="tale")
    with pytest.raises(CheckpointError, match=r"line 1: id: want text"):
        calibration(TOKENIZER, path, column="id")


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_read, "LINE", 5000)
    monkeypatch.setattr(calibration_read, "CHUNK", 1000)
    write(tmp_path / "a.jsonl", {"text": "short"}, {"text": "x" * 9000})
    with pytest.raises(CheckpointError, match=r"line 2 is longer than 5000 bytes"):
        texts(tmp_path / "a.jsonl")
    assert texts(write(tmp_path / "b.jsonl", *({"text": f"{i}" * 300} for i in range(20)))) == [
        f"{i}" * 300 for i in range(20)
    ]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_no_more_is_read_than_needed(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(b'{"text": "one two three"}\n' * 200_000 if name == "a.jsonl" else b"one two three\n\n" * 200_000)
        file.truncate(1 << 40)  # a hole that would be found to be binary, and takes no room
    got: list[int] = []
    fill = calibration_read.DiskFile._fill
    monkeypatch.setattr(
        calibration_read.DiskFile, "_fill", lambda self, view, *rest: got.append(len(view)) or fill(self, view, *rest)
    )
    assert len(calibration(TOKENIZER, path, samples=8, length=64).ids) == 8
    assert sum(got) <= 2 << 20


def test_text_of_many_bytes_a_token_is_read_on(tmp_path: Path) -> None:
    """A tokenizer that makes one token of 100 letters finds its text all the same."""

    class Wide(Bytes):
        def __call__(self, text: Any, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
            if isinstance(text, list):
                return {"input_ids": [self(t)["input_ids"] for t in text]}
            return {"input_ids": [3] * (len(text) // 100 or len(text) == 1)}

    (tmp_path / "a.txt").write_text(("x" * 99 + "\n") * 5000)
    write(tmp_path / "a.jsonl", *([{"text": "x" * 1000}] * 500))
    for name in ("a.txt", "a.jsonl"):
        for order in ("first", "shuffled"):
            assert len(calibration(Wide(), tmp_path / name, samples=40, length=100, order=order).ids) == 40  # type: ignore[arg-type]


def test_not_a_file(tmp_path: Path) -> None:
    for name in (tmp_path / "none.txt", "nothing-like-it", "x" * 5000, "a\0b", "../up/and/away.txt"):
        with pytest.raises(RequestError, match="neither a file or folder nor the name of a data set"):
            calibration(TOKENIZER, name)
    with pytest.raises(RequestError, match="near are cnn_dailymail"):
        calibration(TOKENIZER, "cnn_dailymial")


# --- data sets by name


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Any]]]:
    """A hub of one's own: what it is asked is noted, what it answers is given."""
    asked: list[Any] = []

    def answer(rows: Any) -> list[Any]:
        def load(repo: str, config: str | None, *, split: str, streaming: bool) -> Any:
            asked.append((repo, config, split, streaming))
            if isinstance(rows, Exception):
                raise rows
            return ({**row, "text": row["text"] + split} if "text" in row else row for row in rows)

        info = SimpleNamespace(card_data=SimpleNamespace(license="cc0-1.0"))
        api = SimpleNamespace(dataset_info=lambda repo, timeout: info)
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
        monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=lambda: api))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        return asked

    yield answer


def test_a_data_set(hub: Callable[..., list[Any]]) -> None:
    asked = hub([{"article": "once upon a time " * 50, "highlights": "x"}] * 500)
    found = calibration(TOKENIZER, "cnn_dailymail", samples=8, length=64)
    assert asked == [("abisee/cnn_dailymail", "3.0.0", "train", True)]
    assert (found.source, found.licence) == ("abisee/cnn_dailymail", "cc0-1.0") and 0 < found.documents < 40
    asked = hub([{"messages": [{"role": "user", "content": "hello " * 200}]}] * 500)
    calibration(TOKENIZER, "mgoin/ultrachat_2k", samples=8, length=64, chat=True, split="test_sft")
    assert asked[-1] == ("mgoin/ultrachat_2k", None, "test_sft", True)


def test_splits_in_turns_and_any_repository(hub: Callable[..., list[Any]]) -> None:
    asked = hub([{"text": "abc " * 20}] * 900)
    calibration_sets.SETS["of-two"] = calibration_sets.DataSet("a/b", None, ("one", "two"))
    try:
        found = calibration(TOKENIZER, "of-two", samples=8, length=64, order="first")
    finally:
        del calibration_sets.SETS["of-two"]
    seen = "".join(map(TOKENIZER.text, found.ids))
    assert abs(seen.count("one") - seen.count("two")) <= 1 and [a[2] for a in asked] == ["one", "two"]
    calibration(TOKENIZER, "someone/something", samples=2, length=64)
    assert asked[-1] == ("someone/something", None, "train", True)


def test_a_hub_that_does_not_answer(hub: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    hub(ConnectionError("no route\nto it"))
    with pytest.raises(RequestError, match=r"cannot be fetched: ConnectionError: no route; what works: no --calib"):
        calibration(TOKENIZER, "c4")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RequestError, match=r"pip install fewbit\[data\]; what works"):
        calibration(TOKENIZER, "c4")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RequestError, match=r"HF_HUB_OFFLINE forbids to ask one; what works"):
        calibration(TOKENIZER, "ultrachat")


def test_a_row_that_breaks_while_streaming(hub: Callable[..., list[Any]]) -> None:
    def rows() -> Iterator[Any]:
        yield {"text": "fine"}
        raise ValueError("a shard that does not parse")

    hub(rows())
    with pytest.raises(RequestError, match="cannot be fetched: ValueError: a shard"):
        calibration(TOKENIZER, "c4")
