"""Strict JSON: UTF-8, no duplicate keys, no NaN, no Infinity unless asked for, nesting and size bounded before parsing.

Used for safetensors headers, index files and configs, all of which may come from strangers.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from fewbit.errors import CheckpointError
from fewbit.files.disk import DiskFile, short

MAX_DEPTH = 64

# the closing quote is optional, so that a string without one ends the search
_STRING = re.compile(rb'"[^"]*"?')
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_SQUARE = bytes.maketrans(b"{}", b"[]")
_OTHERS = bytes(set(range(256)) - set(b'[]{}"'))


def load_json(
    source: Path | str | bytes | bytearray, where: str, max_bytes: int = 100 << 20, infinite: bool = False
) -> Any:
    """The value in a file (a path) or in bytes; `where` names it in errors. infinite: Infinity is a number."""
    data = source if isinstance(source, (bytes, bytearray)) else _read(Path(source), where, max_bytes)
    _check_size(len(data), where, max_bytes)
    _check_depth(data, where)
    value = _parse(_decode(data, where), where, infinite)
    if _SURROGATE.search(data):
        _check_surrogates(value, where)
    return value


def _read(path: Path, where: str, max_bytes: int) -> bytearray:
    disk = DiskFile(path)
    try:
        _check_size(disk.size, where, max_bytes)
        return disk.read(0, disk.size, where)
    finally:
        disk.close()


def _check_size(size: int, where: str, max_bytes: int) -> None:
    if size > max_bytes:
        raise CheckpointError(f"{where}: {size} bytes of JSON, at most {max_bytes} are read")


def _check_depth(data: bytes | bytearray, where: str) -> None:
    """Peel one level of brackets per pass: what is left after MAX_DEPTH passes is too deep or unbalanced."""
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"")  # without escapes
    marks = plain.translate(_SQUARE, _OTHERS).replace(b'""', b"")  # each quote still opens or closes what it did
    brackets = _STRING.sub(b"", marks)
    for _ in range(MAX_DEPTH):
        if not brackets:
            return
        brackets = brackets.replace(b"[]", b"")
    if brackets:
        raise CheckpointError(f"{where}: JSON nested deeper than {MAX_DEPTH} levels, or its brackets do not match")


def _decode(data: bytes | bytearray, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise CheckpointError(f"{where}: not UTF-8 at byte {e.start}") from e


def _parse(text: str, where: str, infinite: bool) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise CheckpointError(f"{where}: duplicate key {short(_first_repeated([key for key, _ in pairs]))}")
        return found

    def constant(word: str) -> float:
        if infinite and word in ("Infinity", "-Infinity"):
            return float(word)
        raise CheckpointError(f"{where}: {word} is not a JSON number")

    def finite(word: str) -> float:
        value = float(word)
        return value if math.isfinite(value) else constant(word[:40])

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=constant, parse_float=finite)
    except ValueError as e:  # JSONDecodeError, or an integer of more than 4300 digits
        raise CheckpointError(f"{where}: not JSON: {e}") from e


def _first_repeated(keys: list[str]) -> str:
    seen: set[str] = set()
    return next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]


def _check_surrogates(value: Any, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as e:
        raise CheckpointError(f"{where}: a string holds a lone surrogate, which no text can") from e
