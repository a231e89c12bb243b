"""Tensors out of a .pth file that somebody named: plain data alone is unpickled, and nothing larger than the file.

The one place where a pickle is read. A file is read because a user gives its path; no checkpoint brings one.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from fewbit.errors import CheckpointError


def read_pickled(path: str | Path) -> dict[str, Any]:
    """A dict of tensors, or of dicts of them, on the CPU."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            stored = sum(info.file_size for info in archive.infolist())
            packed = any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist())
        if packed or stored > path.stat().st_size:
            raise CheckpointError(f"{path}: torch writes its files uncompressed, and this one is not")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: not a file of plain tensors that torch wrote: {reason}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: want a dict of tensors, found {type(found).__name__}")
    return found
