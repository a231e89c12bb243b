"""The text of an evaluation as windows of tokens: non-overlapping, and never across two documents.

A text file is one document, of which every whole window is taken; its windows are then what is resampled. The rows of a
.jsonl, .json or .parquet file are documents, and those are resampled.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import RequestError
from fewbit.workflows.calibration_read import read

ALL = 1 << 40  # characters


@dataclass(frozen=True, slots=True)
class Windows:
    """rows: the ids of every window; documents: which unit of resampling a window belongs to."""

    rows: tuple[Tensor, ...]
    documents: tuple[int, ...]
    label: str

    @property
    def scored(self) -> int:
        """Every token but the first of a window."""
        return sum(len(row) - 1 for row in self.rows)

    @property
    def digest(self) -> str:
        found = hashlib.sha256()
        for row in self.rows:
            found.update(f"{len(row)}:".encode() + row.to(torch.int64).numpy().tobytes())
        return found.hexdigest()

    @property
    def largest(self) -> int:
        return max(int(row.max()) for row in self.rows)

    def batches(self, tokens: int) -> list[list[int]]:
        """Windows of one length together, about `tokens` of them in a batch."""
        by_length: dict[int, list[int]] = {}
        for i, row in enumerate(self.rows):
            by_length.setdefault(len(row), []).append(i)
        out = []
        for length, held in by_length.items():
            step = max(1, tokens // length)
            out += [held[i : i + step] for i in range(0, len(held), step)]
        return out

    def stacked(self, batches: Sequence[Sequence[int]]) -> list[Tensor]:
        return [torch.stack([self.rows[i] for i in batch]) for batch in batches]


def windows_of_text(path: str | Path, tokenizer: Any, context: int, most: int | None = None) -> Windows:
    """A file -> its windows; where the tokenizer begins a text with BOS, every window does."""
    first = beginning(tokenizer)
    documents = read(Path(path), ALL)
    ids = [torch.tensor(tokens(tokenizer, document.text), dtype=torch.int64) for document in documents]
    return cut(ids, context, most, str(path), first)


def windows_of_ids(ids: Tensor | Sequence[Tensor], context: int, most: int | None = None) -> Windows:
    """Ids as they are: one long row, or rows that are documents."""
    rows = [ids] if isinstance(ids, Tensor) and ids.dim() == 1 else list(ids)
    return cut([row.to("cpu", torch.int64) for row in rows], context, most, "ids")


def cut(documents: Sequence[Tensor], context: int, most: int | None, label: str, first: Sequence[int] = ()) -> Windows:
    if context < 2 + len(first):
        raise RequestError(f"context={context}: a window holds at least {2 + len(first)} tokens")
    if most is not None and most < 1:
        raise RequestError(f"windows={most}: at least one is needed")
    pairs = [(d, row) for d, ids in enumerate(documents) for row in pieces(ids, context, first, len(documents) > 1)]
    pairs = pairs[:most]
    if not pairs:
        found = sum(map(len, documents))
        raise RequestError(f"{label}: {found} tokens do not fill a window of context={context}")
    held = [d for d, _ in pairs] if len(documents) > 1 else list(range(len(pairs)))
    return Windows(tuple(row for _, row in pairs), tuple(held), label)


def pieces(ids: Tensor, context: int, first: Sequence[int], rest: bool) -> Iterator[Tensor]:
    """Whole windows; of one document among several, what is left over too."""
    head = torch.tensor(first, dtype=torch.int64)
    for piece in ids.split(context - len(first)):
        row = torch.cat([head, piece])
        if len(row) == context or (rest and len(row) > 1):
            yield row


def tokens(tokenizer: Any, text: str) -> list[int]:
    """verbose=False: a text longer than the model's context is what is meant here."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def beginning(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before a text."""
    with_it, without = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    start = tokenizer.bos_token_id
    return (start,) if start is not None and with_it[:1] == [start] and without[:1] != [start] else ()
