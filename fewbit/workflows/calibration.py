"""calibration: the token ids that calibration runs on, from the shipped text, files, or a data set by name.

Documents are tokenized with the special tokens that the tokenizer itself adds (an empty line stands between them where
it adds none), joined in order, and cut into samples of one exact length: no padding ever. Each sample begins as a
document does, with the tokenizer's first token if it has one. Of all samples there are, as many as asked are taken
evenly over the text, by a generator of our own. order="first" takes the text from its beginning instead, in order and
with no token that is not in the text, as tools do that cut a tokenized text into pieces.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewbit.errors import RequestError
from fewbit.files.disk import short
from fewbit.workflows import calibration_sets as sets
from fewbit.workflows.calibration_pack import evenly, first, frame, tokens
from fewbit.workflows.calibration_read import READERS, TEXTS, Document, read

Calib = str | Path | Sequence[Any] | Tensor | None
Order = Literal["shuffled", "first"]
SHIPPED = "shipped"
LICENCE = "public domain and CC0, each part as fewbit/data/calibration/README.md states"
POOL = 4  # times the tokens asked for: what samples are chosen from
LETTERS = (8, 64, 1 << 20)  # characters read for each token wanted: more where the first were not enough


@dataclass(frozen=True, slots=True)
class Samples:
    """ids: LongTensor [T] each. documents: how many were read to choose from."""

    ids: tuple[Tensor, ...]
    source: str
    licence: str
    documents: int = 0

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))

    @property
    def digest(self) -> str:
        """sha256 over the token ids."""
        state = hashlib.sha256()
        for row in self.ids:
            state.update(len(row).to_bytes(8, "little") + row.numpy().astype("<i8").tobytes())
        return state.hexdigest()

    def batches(self, size: int) -> list[Tensor]:
        """[B, T] with B at most `size`, rows of equal length, longest first."""
        if size < 1:
            raise RequestError(f"a batch of {size} samples: want at least 1")
        ordered = sorted(self.ids, key=len, reverse=True)
        found = []
        for _, same in groupby(ordered, key=len):
            rows = list(same)
            found += [torch.stack(rows[at : at + size]) for at in range(0, len(rows), size)]
        return found


@dataclass(frozen=True, slots=True)
class Text:
    """Where documents come from. read(limit): some characters of it, in order, and perhaps not all."""

    name: str
    licence: str
    read: Callable[[int], Iterable[Document]]


def calibration(
    tokenizer: Any,
    calib: Calib = None,
    *,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    chat: bool = False,
    split: str | None = None,
    column: str | None = None,
    order: Order = "shuffled",
) -> Samples:
    """calib: None = the shipped text; a file, a folder or a data set's name; or token ids, taken as they are."""
    if samples < 1 or length < 2:
        raise RequestError(f"{samples} samples of {length} tokens: want at least 1 of at least 2")
    if order not in ("shuffled", "first"):
        raise RequestError(f"order {order!r} is not known; known: shuffled, first")
    if isinstance(calib, Tensor) or (isinstance(calib, Sequence) and not isinstance(calib, str)):
        return given(tokenizer, calib)
    if chat and not getattr(tokenizer, "chat_template", None):
        raise RequestError("chat: the tokenizer has no chat template; what works: leave it out, or add the template")
    text = _text(calib, split, column, even=order == "shuffled")
    pool = samples * length * (POOL if order == "shuffled" else 1)
    for letters in LETTERS:
        documents = list(text.read(pool * letters))
        stream = tokens(tokenizer, documents, chat, cut=order == "shuffled")
        if len(stream) >= pool + length or not any(document.more for document in documents):
            break
    if order == "first":
        rows = first(stream, samples, length)
    else:
        rows = evenly(frame(tokenizer)[0], stream, samples, length, seed)
    if len(rows) < samples:
        raise _too_little(text.name, len(stream), samples, length, len(rows))
    ids = tuple(torch.tensor(row, dtype=torch.long) for row in rows)
    return Samples(ids, text.name, text.licence, sum(document.parts for document in documents))


def given(tokenizer: Any, calib: Any) -> Samples:
    """Token ids: a tensor [B, T], or rows of any length."""
    top, rows = len(tokenizer) if tokenizer is not None else None, []
    for at, row in enumerate(calib):
        where = f"token ids given, row {at}"
        try:
            ids = torch.as_tensor(row)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RequestError(f"{where}: want whole numbers, found {short(row)}") from error
        if ids.dim() != 1 or not len(ids) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise RequestError(f"{where}: want [T] whole numbers, found {list(ids.shape)} {ids.dtype}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (top is not None and high >= top):
            raise RequestError(f"{where}: {low if low < 0 else high} is not a token; the tokenizer has 0 to {top}")
        rows.append(ids.long().cpu().clone())
    if not rows:
        raise RequestError("token ids given: no row")
    return Samples(tuple(rows), "token ids given", "not stated", len(rows))


def _text(calib: str | Path | None, split: str | None, column: str | None, even: bool) -> Text:
    if calib is None:
        return Text(SHIPPED, LICENCE, lambda limit: _shipped())
    path, name = Path(calib).expanduser(), str(calib)
    if os.path.isdir(path):  # unlike Path's own, it says no to a name that no file can have
        return Text(name, "not stated", lambda limit: _folder(path, limit, column, even))
    if os.path.exists(path):
        return Text(name, "not stated", lambda limit: read(path, limit, column))
    known = sets.named(name)
    if known is None:
        raise sets.unknown(name)
    return Text(known.repo, *sets.fetch(name, known, split, column))


def _shipped() -> Iterator[Document]:
    folder = Path(str(files("fewbit"))) / "data" / "calibration"
    parts = sorted(folder.glob("*.txt"))
    if not parts:
        raise RequestError(f"{folder}: the package's own text is not there; what works: --calib FILE")
    for path in parts:
        yield from read(path, 1 << 30)


def _folder(path: Path, limit: int, column: str | None, even: bool) -> Iterator[Document]:
    """Its files by name; even: as much of each."""
    known = (*TEXTS, *READERS)
    found = [file for file in sorted(path.rglob("*")) if file.is_file() and file.suffix.lower() in known]
    found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not found:
        raise RequestError(f"{path}: no file to read; what works: files that end in {' '.join(known)}")
    total = 0
    for file in found:
        for document in read(file, max(1 << 12, limit // len(found)) if even else limit - total, column):
            yield document
            total += len(document.text)
        if total >= limit:
            return


def _too_little(name: str, tokens: int, samples: int, length: int, found: int) -> RequestError:
    works = [f"--calib-samples {found}"] if found else []
    shorter = tokens // samples * 9 // 10
    works += [f"--calib-len {shorter}"] if shorter >= 2 else []
    return RequestError(
        f"{name}: {samples} samples of {length} tokens are asked for, and the text has {tokens} tokens;"
        f" what would work: {', '.join([*works, 'more text'])}"
    )
