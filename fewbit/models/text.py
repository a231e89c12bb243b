"""The tokenizer of a checkpoint: the folder's own files, or those rebuilt from GGUF metadata."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fewbit import codecs
from fewbit.errors import CheckpointError
from fewbit.models import hf


def tokenizer(path: str | Path, trust_remote_code: bool = False) -> Any:
    """-> transformers' tokenizer object."""
    with codecs.open(path) as source:
        files = source.tokenizer
        folder = source.path if source.path.is_dir() else source.path.parent
    if files is None:
        return _read(folder, folder, trust_remote_code)
    with TemporaryDirectory() as place:
        for name, data in files.items():
            (Path(place) / name).write_bytes(data)
        return _read(Path(place), Path(path))


def _read(folder: Path, asked: Path, trust_remote_code: bool = False) -> Any:
    try:
        return hf.tokenizer(folder, trust_remote_code)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0].strip()
        more = "; trust_remote_code=True would import and run it" if "custom code" in first else ""
        raise CheckpointError(f"{asked}: no tokenizer can be read: {first}{more}") from error
