"""Packing: documents -> one stream of tokens -> samples of one exact length."""

import random
from typing import Any

from jinja2 import TemplateError

from fewbit.errors import RequestError
from fewbit.workflows.calibration_read import Document

BLOCK = 1 << 16  # characters given to the tokenizer at once


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    plain, framed = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    for at in range(len(framed) - len(plain) + 1):
        if framed[at : at + len(plain)] == plain:
            return framed[:at], framed[at + len(plain) :]
    return [], []


def tokens(tokenizer: Any, documents: list[Document], chat: bool, cut: bool) -> list[int]:
    """All documents as one stream. cut: hand long ones to the tokenizer in blocks."""
    before, after = frame(tokenizer)
    stream: list[int] = []
    for at, document in enumerate(documents):
        if chat:
            stream += _ids(tokenizer, _templated(tokenizer, document), cut)
        elif document.text.strip():
            between = "" if before or after or at == len(documents) - 1 else "\n\n"
            stream += before + _ids(tokenizer, document.text + between, cut) + after
    return stream


def _ids(tokenizer: Any, text: str, cut: bool) -> list[int]:
    blocks = _blocks(text) if cut else [text]
    found = tokenizer(blocks, add_special_tokens=False, verbose=False)["input_ids"]
    return [token for block in found for token in block]


def _templated(tokenizer: Any, document: Document) -> str:
    if document.messages is None:
        raise RequestError(f"{document.where}: chat: no messages here; what works: rows with messages or conversations")
    try:
        return str(tokenizer.apply_chat_template(document.messages, tokenize=False))
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise RequestError(f"{document.where}: the chat template refuses these messages: {error}") from error


def _blocks(text: str) -> list[str]:
    """About BLOCK characters each, cut before an empty line (else a line's end, else anywhere)."""
    found, start = [], 0
    while len(text) - start > BLOCK:
        ends = [at for mark in ("\n\n", "\n", " ") if (at := text.rfind(mark, start + 1, start + BLOCK)) > 0]
        stop = ends[0] if ends else start + BLOCK
        found.append(text[start:stop])
        start = stop
    return [*found, text[start:]]


def first(stream: list[int], samples: int, length: int) -> list[list[int]]:
    """The stream's beginning in order."""
    return [stream[at : at + length] for at in range(0, min(len(stream) - length + 1, samples * length), length)]


def evenly(starts: list[int], stream: list[int], samples: int, length: int, seed: int) -> list[list[int]]:
    """Cut the stream; of as many equal runs of samples as are wanted take one each, and shuffle them."""
    starts = starts if len(starts) < length else []
    rows, at = [], 0
    while True:
        before = [] if stream[at : at + len(starts)] == starts else starts
        step = length - len(before)
        if at + step > len(stream):
            break
        rows.append(before + stream[at : at + step])
        at += step
    if len(rows) < samples:
        return rows
    draw = random.Random(seed)
    chosen = [rows[draw.randrange(i * len(rows) // samples, (i + 1) * len(rows) // samples)] for i in range(samples)]
    draw.shuffle(chosen)
    return chosen
