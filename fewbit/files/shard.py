"""One safetensors file: where each tensor lies, and the file written and hashed in one pass.

Wide elements come first, so that every tensor starts at a multiple of its element, whatever order they are named in.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fewbit.errors import CheckpointError
from fewbit.files.disk import bytes_of, check_name, checked_bits
from fewbit.files.manifest import Entry
from fewbit.files.safetensors import DTYPES, MAX_HEADER, storage
from fewbit.files.staging import sync_folder

PIECE = 1 << 20  # written, then hashed while it is still in cache


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor to be written: its dtype on disk, its shape in elements, and its value when asked for."""

    dtype: str
    shape: tuple[int, ...]
    value: Callable[[], Tensor]


def declared_bytes(name: str, dtype: str, shape: Sequence[int]) -> int:
    what = f"tensor {name!r}"
    check_name(name, what)
    if name == "__metadata__":
        raise CheckpointError(f"{what}: the name is taken by the metadata of the header")
    storage(dtype, tuple(shape), what)
    return checked_bits(shape, DTYPES[dtype][1], what) // 8


def filled(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in the declared order, in runs of at most that many bytes; a tensor above it has one of its own."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and used + size > most:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def lay_out(
    file: Path, tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header, and name -> (start in the file, bytes), in the order in which they lie."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata if metadata is not None else {"format": "pt"})}
    at, places = 0, {}
    for name in sorted(tensors, key=lambda name: (-DTYPES[tensors[name][0]][1], name)):
        dtype, shape = tensors[name]
        size = declared_bytes(name, dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        places[name] = at, size
        at += size
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER:
        raise CheckpointError(f"{file}: header of {len(raw)} bytes, at most {MAX_HEADER} are read")
    shift = 8 + len(raw)
    return len(raw).to_bytes(8, "little") + raw, {name: (shift + at, size) for name, (at, size) in places.items()}


def write_shard(path: Path, parts: Mapping[str, Part], metadata: Mapping[str, str] | None = None) -> Entry:
    """Write a file, one tensor in memory at a time; on disk for good when it returns. -> digest and size."""
    header, places = lay_out(path, {name: (part.dtype, part.shape) for name, part in parts.items()}, metadata)
    partial = path.with_name(f"{path.name}.partial")
    digest = hashlib.sha256(header)
    try:
        with partial.open("wb", buffering=0) as file:
            write_all(file.fileno(), memoryview(header))
            for name in places:
                _put(file.fileno(), digest, _bytes(parts[name], f"{path}: tensor {name!r}"))
            os.fsync(file.fileno())
        partial.rename(path)
        sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return {"sha256": digest.hexdigest(), "bytes": len(header) + sum(size for _, size in places.values())}


def _bytes(part: Part, what: str) -> memoryview:
    value, wanted = part.value(), storage(part.dtype, part.shape, what)
    if (value.dtype, tuple(value.shape)) != wanted:
        raise CheckpointError(f"{what} was declared as {wanted[0]} {list(wanted[1])}, is {value.dtype} {value.shape}")
    return bytes_of(value)


def _put(fd: int, digest: Any, view: memoryview) -> None:
    for start in range(0, len(view), PIECE):
        write_all(fd, view[start : start + PIECE])
        digest.update(view[start : start + PIECE])


def write_all(fd: int, view: memoryview) -> None:
    while len(view):
        view = view[os.write(fd, view) :]
