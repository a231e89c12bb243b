"""calibration: the shipped text, exact lengths, determinism, conversations, token ids."""

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit.errors import RequestError
from fewbit.workflows import calibration_read
from fewbit.workflows.calibration import LICENCE, Samples, calibration
from tests.workflows.calibrating import TOKENIZER, WORDS, Bytes, texts, write

DATA = Path(calibration_read.__file__).parents[1] / "data" / "calibration"


# --- the shipped text


def test_default_needs_nothing_and_is_the_same_every_time() -> None:
    state, python = torch.get_rng_state(), random.getstate()
    a, b, c = (calibration(TOKENIZER, samples=64, length=100, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    assert a.digest == b.digest != c.digest
    assert (len(a.ids), a.tokens, a.source, a.licence) == (64, 6400, "shipped", LICENCE)
    assert all(row.dtype == torch.long and len(row) == 100 for row in a.ids) and a.documents > 1000


def test_every_part_is_among_the_samples() -> None:
    whole = {path.stem: path.read_text().replace("\n", "") for path in DATA.glob("*.txt")}
    assert sorted(whole) == ["1-english", "2-code", "3-languages"]
    found = calibration(TOKENIZER, samples=30, length=120)
    inside = [
        next((n for n, t in whole.items() if TOKENIZER.text(r[8:-8])[4:-4].replace("\n", "") in t), "")
        for r in found.ids
    ]
    size = sum(map(len, whole.values()))
    for name, text in whole.items():
        assert inside.count(name) >= 30 * len(text) / size - 3, name


def test_shipped_files() -> None:
    stated = (DATA / "README.md").read_text()
    total = 0
    for path in DATA.glob("*.txt"):
        text = path.read_text(encoding="utf-8")
        total += path.stat().st_size
        assert f"## {path.name} ({round(path.stat().st_size / 1000)} kB)" in stated
        assert "\r" not in text and "\0" not in text and "Gutenberg" not in text and "Northanger" not in text
    assert 1_000_000 < total < 1_200_000
    evaluation = Path(__file__).parents[3] / "shared" / "text" / "eval_public.txt"
    if evaluation.exists():
        lines = {line for line in evaluation.read_text().splitlines() if len(line) > 60}
        assert not lines & set((DATA / "1-english.txt").read_text().splitlines())


# --- packing


@pytest.mark.parametrize(("first", "last"), [(False, False), (True, False), (True, True), (False, True)])
@pytest.mark.parametrize("length", [2, 17, 64])
def test_samples_are_exact_and_begin_as_documents_do(tmp_path: Path, first: bool, last: bool, length: int) -> None:
    path = write(tmp_path / "a.jsonl", *({"text": f"document {i} " + "x" * (i % 37)} for i in range(300)))
    tokenizer = Bytes(first, last)
    found = calibration(tokenizer, path, samples=40, length=length)
    assert [len(row) for row in found.ids] == [length] * 40
    if first:
        assert all(row[0] == 1 and (length < 3 or row[1] != 1) for row in found.ids)
    joined = "".join(
        tokenizer.text(row) for row in calibration(tokenizer, path, samples=9, length=64, order="first").ids
    )
    between = "" if first or last else "\n\n"
    assert (between.join(texts(path)) + between).startswith(joined)


def test_first_is_the_text_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(WORDS[i : i + 200] for i in range(0, len(WORDS), 200)))
    for tokenizer in (Bytes(), Bytes(first=True, last=True)):
        found = calibration(tokenizer, path, samples=10, length=300, order="first")
        want = tokenizer(path.read_text())["input_ids"][:3000]
        assert torch.cat(found.ids).tolist() == want
        assert found.digest != calibration(tokenizer, path, samples=10, length=300).digest


def test_samples_are_spread_over_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(WORDS)
    places = sorted(
        WORDS.index(TOKENIZER.text(row)) for row in calibration(TOKENIZER, path, samples=16, length=100).ids
    )
    whole = len(WORDS) // 100
    assert all(i * whole // 16 <= at // 100 < (i + 1) * whole // 16 for i, at in enumerate(places))


def test_too_little_says_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("seven..\n\n" * 100)
    with pytest.raises(RequestError, match=r"the text has 900 tokens; .*--calib-samples 9, --calib-len 81, more text"):
        calibration(TOKENIZER, path, samples=10, length=100)
    with pytest.raises(RequestError, match=r"--calib-samples 9, --calib-len 81"):
        calibration(TOKENIZER, path, samples=10, length=100, order="first")
    assert len(calibration(TOKENIZER, path, samples=9, length=100).ids) == 9
    assert len(calibration(TOKENIZER, path, samples=10, length=81).ids) == 10
    for bad in ({"samples": 0}, {"length": 1}, {"order": "last"}):
        with pytest.raises(RequestError):
            calibration(TOKENIZER, path, **bad)


def test_batches_of_equal_length_longest_first() -> None:
    rows = [torch.arange(n) for n in (3, 5, 3, 3, 5, 4)]
    found = Samples(tuple(rows), "", "").batches(2)
    assert [list(batch.shape) for batch in found] == [[2, 5], [1, 4], [2, 3], [1, 3]]
    with pytest.raises(RequestError, match="want at least 1"):
        Samples(tuple(rows), "", "").batches(0)
    state = hashlib.sha256()
    for row in rows:
        state.update(len(row).to_bytes(8, "little") + b"".join(int(i).to_bytes(8, "little") for i in row))
    assert Samples(tuple(rows), "", "").digest == state.hexdigest()


def test_token_ids_are_taken_as_they_are() -> None:
    for rows in ([[1, 2, 3], [4, 5]], [torch.tensor([1, 2, 3]), torch.tensor([4, 5], dtype=torch.int32)]):
        found = calibration(TOKENIZER, rows, samples=128, length=512)
        assert [row.tolist() for row in found.ids] == [[1, 2, 3], [4, 5]] and found.tokens == 5
    assert len(calibration(None, torch.zeros(3, 7, dtype=torch.long)).ids) == 3


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([], "no row"), ([[]], r"row 0: want \[T\]"), ([[1], [2, 999]], "row 1: 999 is not a token"),
        ([[-1]], "row 0: -1 is not a token"), ([[0.5]], "want .* whole numbers"), ([["a"]], "whole numbers, found"),
        ([[[1]]], "want .*T"), ([5], "want .*T"), ([[True]], "bool"), ([["text"], [1]], "row 0"), ([None], "row 0"),
    ],
)  # fmt: skip
def test_token_ids_that_are_none(rows: Any, text: str) -> None:
    with pytest.raises(RequestError, match=text):
        calibration(TOKENIZER, rows)


# --- conversations


def test_chat_template(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "yes"}]}
        for i in range(50)
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    found = calibration(Bytes(first=True, last=True), path, samples=5, length=30, chat=True, order="first")
    assert "".join(map(TOKENIZER.text, found.ids)).startswith("<user>hi 0<assistant>yes<user>hi 1<assistant>yes")
    assert 1 not in torch.cat(found.ids) and 2 not in torch.cat(found.ids)
    plain = calibration(TOKENIZER, path, samples=5, length=30, order="first")
    assert TOKENIZER.text(plain.ids[0]).startswith("hi 0\nyes\n\nhi 1\nyes")


def test_chat_that_cannot_be(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "plain"})
    with pytest.raises(RequestError, match=r"line 1: chat: no messages here"):
        calibration(TOKENIZER, path, chat=True)
    bare = Bytes()
    bare.chat_template = None
    with pytest.raises(RequestError, match="has no chat template"):
        calibration(bare, path, chat=True)
    path = write(tmp_path / "b.jsonl", {"messages": [{"role": "assistant", "content": "me first"}]})
    with pytest.raises(RequestError, match=r"line 1: the chat template refuses these messages: conversations start"):
        calibration(TOKENIZER, path, chat=True)


# --- a real tokenizer


def test_real_tokenizer_and_its_first_tokens(tmp_path: Path) -> None:
    from fewbit.models.text import tokenizer
    from tests.real import smollm2

    words = tokenizer(smollm2())
    (tmp_path / "a.txt").write_text(WORDS)
    found = calibration(words, tmp_path / "a.txt", samples=10, length=128, order="first")
    assert torch.cat(found.ids).tolist() == words(WORDS, verbose=False)["input_ids"][:1280]
    shuffled = calibration(words, samples=16, length=256)
    assert (
        all(len(row) == 256 for row in shuffled.ids)
        and shuffled.digest == calibration(words, samples=16, length=256).digest
    )
