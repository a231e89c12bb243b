"""The tokenizer of a checkpoint: the folder's own files, or those rebuilt from GGUF metadata."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fewbit import codecs
from fewbit.codecs.source import Source
from fewbit.errors import CheckpointError
from fewbit.models import hf


def tokenizer(path: str | Path, trust_remote_code: bool = False) -> Any:
    """-> transformers' tokenizer object."""
    with codecs.open(path, trust_remote_code) as source:
        return tokenizer_of(source)


def tokenizer_of(source: Source) -> Any:
    """The same of a checkpoint that is open."""
    if source.tokenizer is None:
        folder = source.path if source.path.is_dir() else source.path.parent
        return _read(folder, folder, source.trusted)
    with TemporaryDirectory() as place:
        for name, data in source.tokenizer.items():
            (Path(place) / name).write_bytes(data)
        return _read(Path(place), source.path, False)


def _read(folder: Path, asked: Path, trusted: bool) -> Any:
    try:
        return hf.tokenizer(folder, trusted)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0].strip()
        more = (
            "; trust_remote_code=True would import and run it (--trust-remote-code)" if "custom code" in first else ""
        )
        raise CheckpointError(f"{asked}: no tokenizer can be read: {first}{more}") from error
