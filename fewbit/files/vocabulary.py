"""Traps in a GGUF vocabulary: pieces and tables that break the tokenizers built from them."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

MAX_PIECE = 64 << 10
BYTE_TYPE = 6

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LIKE_BYTE = re.compile(r"<0x[^<>]*>")


def check_vocabulary(kv: Mapping[str, Any]) -> list[str]:
    """Problems of `tokenizer.ggml.*`, one line each; an absent vocabulary has none."""
    key = "tokenizer.ggml.tokens"
    if key not in kv:
        return []
    pieces = kv[key]
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
        return [f"{key}: is not an array of strings"]
    return [*_piece_problems(key, pieces), *_table_problems(kv, pieces), *_id_problems(kv, len(pieces))]


def _piece_problems(key: str, pieces: list[str]) -> list[str]:
    empty = [i for i, piece in enumerate(pieces) if not piece]
    huge = [i for i, piece in enumerate(pieces) if len(piece) > MAX_PIECE // 4 and len(piece.encode()) > MAX_PIECE]
    bad_byte = [
        i for i, p in enumerate(pieces) if p.startswith("<0x") and _LIKE_BYTE.fullmatch(p) and not _BYTE.fullmatch(p)
    ]
    repeated: list[int] = []
    if len(set(pieces)) < len(pieces):
        count = Counter(pieces)
        repeated = [i for i, piece in enumerate(pieces) if count[piece] > 1]
    named = {
        "empty pieces": empty,
        "duplicate pieces": repeated,
        f"pieces over {MAX_PIECE} bytes": huge,
        "malformed byte pieces (<0x00> to <0xFF> are meant)": bad_byte,
    }
    return [_line(key, words, found, pieces) for words, found in named.items() if found]


def _table_problems(kv: Mapping[str, Any], pieces: list[str]) -> list[str]:
    problems = []
    for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
        table = kv.get(key)
        if table is None:
            continue
        if not isinstance(table, list) or len(table) != len(pieces):
            found = f"{len(table)} entries" if isinstance(table, list) else repr(table)[:40]
            problems.append(f"{key}: {found} for {len(pieces)} pieces")
        elif key.endswith("token_type"):
            wrong = [i for i, kind in enumerate(table) if kind == BYTE_TYPE and not _BYTE.fullmatch(pieces[i])]
            problems += [_line(key, "byte tokens whose piece is no byte", wrong, pieces)] if wrong else []
    return problems


def _id_problems(kv: Mapping[str, Any], size: int) -> list[str]:
    keys = [key for key in kv if key.startswith("tokenizer.ggml.") and key.endswith("_token_id")]
    outside = [key for key in keys if not isinstance(kv[key], int) or not 0 <= kv[key] < size]
    return [f"{key}: {kv[key]!r} is not an id of a vocabulary of {size}" for key in outside]


def _line(key: str, words: str, found: Sequence[int], pieces: Sequence[str]) -> str:
    return f"{key}: {len(found)} {words}, first at {found[0]}: {pieces[found[0]][:40]!r}"
