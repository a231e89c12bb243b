"""The tokenizer of a checkpoint: the folder's own files, or those rebuilt from GGUF metadata."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fewbit import codecs
from fewbit.errors import CheckpointError
from fewbit.models import hf


def tokenizer(path: str | Path) -> Any:
    """-> transformers' tokenizer object."""
    with codecs.open(path) as source:
        files = source.tokenizer
        folder = source.path if source.path.is_dir() else source.path.parent
    if files is None:
        return _read(folder, folder)
    with TemporaryDirectory() as place:
        for name, data in files.items():
            (Path(place) / name).write_bytes(data)
        return _read(Path(place), Path(path))


def _read(folder: Path, asked: Path) -> Any:
    try:
        return hf.tokenizer(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{asked}: no tokenizer can be read: {str(error).splitlines()[0]}") from error
