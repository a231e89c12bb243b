"""Strict reader of GGUF files (versions 2 and 3, single or split) over plain reads."""

import re
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from fewbit.errors import CheckpointError
from fewbit.files.disk import DiskFile, empty, unknown_tensor
from fewbit.files.gguf_header import GGML_IDS, GGML_TYPES, GGUFTensor, Header, read_header
from fewbit.files.vocabulary import check_vocabulary

__all__ = ["GGML_IDS", "GGML_TYPES", "SPLIT_NAME", "GGUFFile", "GGUFTensor", "check_vocabulary", "open_gguf"]

SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class GGUFFile:
    """An open GGUF file or split set, merged: `kv` holds plain Python values, `kinds` their types ("u32", "[f32]")."""

    def __init__(self, path: Path):
        self.path = path
        self._disks: dict[Path, DiskFile] = {}
        try:
            headers = [self._open(part) for part in _split_paths(path)]
            _check_split(headers, path)
        except BaseException:
            self.close()
            raise
        self.version = headers[0].version
        self.alignment = headers[0].alignment
        self.kv = headers[0].kv
        self.kinds = headers[0].kinds
        self.files = [header.disk.path for header in headers]
        self.tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}

    def _open(self, path: Path) -> Header:
        disk = self._disks[path] = DiskFile(path)
        return read_header(disk)

    def kv_value(self, key: str, *kinds: str) -> Any:
        """A metadata value that must be stored as one of `kinds` ("u32", "string", "[f32]" ...)."""
        if key not in self.kv:
            raise CheckpointError(f"{self.path}: key {key!r} is missing")
        if self.kinds[key] not in kinds:
            raise CheckpointError(
                f"{self.path}: key {key!r}: is stored as {self.kinds[key]}, expected {' or '.join(kinds)}"
            )
        return self.kv[key]

    def kv_array(self, key: str, *kinds: str) -> list[Any]:
        """An array whose element type must be one of `kinds` ("f32", "string" ...)."""
        value: list[Any] = self.kv_value(key, *(f"[{kind}]" for kind in kinds))
        return value

    def typed_kv(self) -> dict[str, tuple[str, Any]]:
        """Metadata as the writer takes it: key -> (kind, value)."""
        return {key: (self.kinds[key], value) for key, value in self.kv.items()}

    def info(self, name: str) -> GGUFTensor:
        if name not in self.tensors:
            raise unknown_tensor(self.path, name, self.tensors)
        return self.tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """The raw bytes, uint8 [*leading, row_bytes]."""
        info = self.info(name)
        out = empty(info.byte_shape, torch.uint8, f"{info.file}: tensor {name!r}")
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Fill `out`, contiguous on the CPU and of as many bytes as the tensor."""
        info = self.info(name)
        if out.nbytes != info.nbytes or out.device.type != "cpu" or not out.is_contiguous():
            raise CheckpointError(
                f"{info.file}: tensor {name!r}: has {info.nbytes} bytes, "
                f"cannot go into {out.dtype} {list(out.shape)} on {out.device}"
            )
        self._disks[info.file].read_into(info.start, out, f"tensor {name!r}")

    def close(self) -> None:
        for disk in self._disks.values():
            disk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_gguf(path: Path | str) -> GGUFFile:
    """Open a file, or the whole set when the name is that of one part (`-00001-of-00003.gguf`)."""
    return GGUFFile(Path(path))


def _split_paths(path: Path) -> list[Path]:
    match = SPLIT_NAME.fullmatch(path.name)
    if not match:
        return [path]
    stem, own, total = match.groups()
    if not 1 <= int(own) <= int(total):
        raise CheckpointError(f"{path}: the name says part {int(own)} of {int(total)}")
    parts = [path.with_name(f"{stem}-{part:05d}-of-{total}.gguf") for part in range(1, int(total) + 1)]
    missing = next((part.name for part in parts if not part.exists()), None)
    if missing:
        raise CheckpointError(f"{path}: the split set of {int(total)} parts is incomplete: {missing} is missing")
    return parts


def _check_split(headers: list[Header], path: Path) -> None:
    single = len(headers) == 1
    names: dict[str, Path] = {}
    for number, header in enumerate(headers):
        where, kv = header.disk.path, header.kv
        count, own = kv.get("split.count", single), kv.get("split.no", 0 if single else None)
        if count != len(headers) and not (single and count == 0):
            raise CheckpointError(f"{where}: split.count is {count}, by the file names there are {len(headers)} parts")
        if own != number:
            raise CheckpointError(f"{where}: split.no is {own}, expected {number} by the file name")
        for name in header.tensors:
            if name in names:
                raise CheckpointError(f"{where}: duplicate tensor {name!r}, also in {names[name].name}")
            names[name] = where
    declared = headers[0].kv.get("split.tensors.count", len(names))
    if declared != len(names):
        raise CheckpointError(f"{path}: split.tensors.count is {declared}, the parts hold {len(names)} tensors")
