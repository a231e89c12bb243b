"""Documents out of text, JSON, JSON lines and parquet files: strict, and never more of a file than was asked for.

Text is one document however many paragraphs it has, since what follows belongs to what stands before it. A row is a
document: its text, or the messages of a conversation.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewbit.errors import CheckpointError, RequestError, UnsupportedError
from fewbit.files.disk import DiskFile, short
from fewbit.files.text import load_json

LINE = 64 << 20  # bytes of one line, at most
CHUNK = 1 << 20
TEXTS = (".txt", ".md", ".rst")
WHOLE = ("text", "content", "article")
CHATS = ("messages", "conversations", "conversation")
ASKS = ("prompt", "instruction", "question", "problem", "input")
ANSWERS = ("completion", "response", "output", "answer", "generated_solution")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
KNOWN = f"{' | '.join(WHOLE)}, prompt + completion, {' | '.join(CHATS[:2])}"

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Document:
    """where: file and line, for errors. parts: paragraphs of a text. more: its reader stopped before the end."""

    where: str
    text: str
    messages: Messages | None = None
    parts: int = 1
    more: bool = False


def read(path: Path, limit: int, column: str | None = None) -> Iterator[Document]:
    """Documents of a file, in order; about `limit` characters of it and no more."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        yield text_file(path, limit)
        return
    found = 0
    for where, row in reader(path, column):
        document = of_row(row, where, column)
        found += len(document.text)
        if found >= limit:
            yield replace(document, more=True)
            return
        yield document
    if not found:
        raise CheckpointError(f"{path}: no row with any text in it")


def text_file(path: Path, limit: int) -> Document:
    """The file, or its first `limit` bytes up to the end of a paragraph (else of a line)."""
    with closing(DiskFile(path)) as disk:
        data = disk.read(0, min(disk.size, limit), "text")
        whole = len(data) == disk.size
    text = decoded(data, f"{path}", whole)
    if not whole:
        ends = [at for mark in ("\n\n", "\n") if (at := text.rfind(mark)) > 0]
        text = text[: ends[0]] if ends else text
    if not text.strip():
        raise CheckpointError(f"{path}: no text in it")
    parts = sum(1 for part in text.split("\n\n") if part.strip())
    return Document(str(path), text, parts=parts, more=not whole)


def decoded(data: bytes | bytearray, where: str, whole: bool = True, first: int = 1) -> str:
    """UTF-8 text with plain line ends; what is not names its line. whole: False = the last character may be cut."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CheckpointError(f"{where}: line {first}: UTF-16 text; what works: UTF-8")
    if (at := data.find(0)) >= 0:
        raise CheckpointError(f"{where}: line {first + data.count(10, 0, at)}: a zero byte, so this is not text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not whole and error.end == len(data) and error.reason == "unexpected end of data":
            return decoded(data[: error.start], where, True, first)
        line = first + data.count(10, 0, error.start)
        raise CheckpointError(f"{where}: line {line}: not UTF-8 at byte {error.start}") from error
    return text.replace("\r\n", "\n")


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line that is not blank."""
    with closing(DiskFile(path)) as disk:
        held, number = bytearray(), 0
        for start in range(0, disk.size, CHUNK):
            held += disk.read(start, min(CHUNK, disk.size - start), f"line {number + 1}")
            *ready, held = held.split(b"\n")
            for line in ready:
                number += 1
                if line.strip():
                    yield number, bytes(line)
            if len(held) > LINE:
                raise CheckpointError(f"{path}: line {number + 1} is longer than {LINE} bytes: is this JSON lines?")
        if held.strip():
            yield number + 1, bytes(held)


def _jsonl(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    for number, line in lines(path):
        where = f"{path}: line {number}"
        decoded(line, str(path), first=number)
        yield where, load_json(line.removeprefix(b"\xef\xbb\xbf"), where, LINE)


def _json(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    rows = load_json(path, str(path))
    if not isinstance(rows, list):
        kind = "an object" if isinstance(rows, dict) else type(rows).__name__
        raise CheckpointError(f"{path}: want a list of texts or objects, found {kind}; JSON lines end in .jsonl")
    yield from ((f"{path}: item {number}", row) for number, row in enumerate(rows))


def _parquet(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UnsupportedError(
            f"{path}: cannot read parquet", ["pyarrow is missing: pip install fewbit[data]"]
        ) from error
    try:
        with closing(parquet.ParquetFile(path)) as file:
            names = file.schema_arrow.names
            useful = [n for n in names if n in ({column} if column else {*WHOLE, *CHATS, *ASKS, *ANSWERS})]
            number = 0
            for batch in file.iter_batches(64, columns=useful or None):
                for row in batch.to_pylist():
                    yield f"{path}: row {number}", row
                    number += 1
    except (ArrowException, OSError, ValueError, OverflowError) as error:  # also strings that are not UTF-8
        raise CheckpointError(f"{path}: not readable as parquet: {str(error).splitlines()[0]}") from error


READERS: dict[str, Callable[[Path, str | None], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}


def of_row(row: Any, where: str, column: str | None = None) -> Document:
    """A row of whatever kind -> its document."""
    if isinstance(row, str) and column is None:
        return Document(where, row)
    if not isinstance(row, Mapping):
        raise CheckpointError(f"{where}: want an object with {column or KNOWN}, found {short(row)}")
    if column is not None:
        if column not in row:
            raise RequestError(f"{where}: no field {column!r} (--calib-column); found {_fields(row)}")
        return _of_value(row[column], where, column)
    for name in (*CHATS, *WHOLE):
        if row.get(name) is not None:
            return _of_value(row[name], where, name)
    asked, answered = ([row[n] for n in names if isinstance(row.get(n), str) and row[n]] for names in (ASKS, ANSWERS))
    if asked:
        turns = [("user", "\n".join(asked))] + [("assistant", text) for text in answered[:1]]
        return of_messages([{"role": role, "content": text} for role, text in turns], where)
    raise RequestError(
        f"{where}: no field that is known to hold text ({KNOWN}); found {_fields(row)}: name one with --calib-column"
    )


def _fields(row: Mapping[str, Any]) -> str:
    return ", ".join(short(str(name)) for name in list(row)[:16]) or "none"


def _of_value(value: Any, where: str, name: str) -> Document:
    if isinstance(value, str):
        return Document(where, value)
    if isinstance(value, list):
        return of_messages([_message(turn, f"{where}: {name}[{i}]") for i, turn in enumerate(value)], where)
    raise CheckpointError(f"{where}: {name}: want text or a list of messages, found {short(value)}")


def of_messages(messages: Messages, where: str) -> Document:
    """A conversation; as plain text, what was said in it."""
    return Document(where, "\n".join(m["content"] for m in messages), messages)


def _message(turn: Any, where: str) -> dict[str, str]:
    """{role, content}, or ShareGPT's {from, value}."""
    if not isinstance(turn, Mapping):
        raise CheckpointError(f"{where}: want a message with role and content, found {short(turn)}")
    role, content = (turn.get(a, turn.get(b)) for a, b in (("role", "from"), ("content", "value")))
    if isinstance(content, list):
        content = "\n".join(_texts(content))
    if content is None and ("content" in turn or "tool_calls" in turn):  # a turn that only calls tools
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise CheckpointError(f"{where}: want a message with role and content, found fields {_fields(turn)}")
    return {"role": ROLES.get(role, role), "content": content}


def _texts(parts: Iterable[Any]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            yield part["text"]
