"""Strict reader of safetensors files over plain reads.

The header must be honest before a tensor is read: every range matches its shape and dtype, and the
ranges tile the data section exactly (no overlap, no gap, nothing after the last one).
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from fewbit.errors import CheckpointError
from fewbit.files.disk import DiskFile, check_name, checked_bits, empty, short, unknown_tensor
from fewbit.files.text import load_json

MAX_HEADER = 100_000_000

# name on disk -> (dtype in memory, bits of one element); elements under a byte stay packed in uint8
DTYPES: dict[str, tuple[torch.dtype, int]] = {
    "BOOL": (torch.bool, 8),
    "F4": (torch.uint8, 4),
    "F6_E2M3": (torch.uint8, 6),
    "F6_E3M2": (torch.uint8, 6),
    "U8": (torch.uint8, 8),
    "I8": (torch.int8, 8),
    "F8_E4M3": (torch.float8_e4m3fn, 8),
    "F8_E5M2": (torch.float8_e5m2, 8),
    "F8_E8M0": (torch.float8_e8m0fnu, 8),
    "F8_E4M3FNUZ": (torch.float8_e4m3fnuz, 8),
    "F8_E5M2FNUZ": (torch.float8_e5m2fnuz, 8),
    "U16": (torch.uint16, 16),
    "I16": (torch.int16, 16),
    "F16": (torch.float16, 16),
    "BF16": (torch.bfloat16, 16),
    "U32": (torch.uint32, 32),
    "I32": (torch.int32, 32),
    "F32": (torch.float32, 32),
    "U64": (torch.uint64, 64),
    "I64": (torch.int64, 64),
    "F64": (torch.float64, 64),
    "C64": (torch.complex64, 64),
}
DTYPE_NAMES = {dtype: name for name, (dtype, bits) in DTYPES.items() if bits >= 8}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor on disk: `shape` counts elements, `start` is the offset from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


def storage(dtype: str, shape: tuple[int, ...], what: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """Dtype and shape of the tensor in memory: elements under a byte are packed along the last axis."""
    if dtype not in DTYPES:
        raise CheckpointError(f"{what}: dtype {short(dtype)} is unknown; known are {', '.join(DTYPES)}")
    torch_dtype, bits = DTYPES[dtype]
    if bits >= 8:
        return torch_dtype, shape
    if not shape or shape[-1] * bits % 8:
        raise CheckpointError(f"{what}: {dtype} packs {bits} bits, and shape {list(shape)} does not fill whole bytes")
    return torch_dtype, (*shape[:-1], shape[-1] * bits // 8)


class SafetensorsFile:
    """An open safetensors file: `tensors` and `metadata` of its header, and reads of its data."""

    def __init__(self, path: Path):
        self.path = path
        self._disk = DiskFile(path)
        try:
            header, data_start = _read_header(self._disk)
            self.metadata = _metadata(header.pop("__metadata__", {}), path)
            self.tensors = {name: _tensor(name, entry, path, data_start) for name, entry in header.items()}
            _check_tiling(self.tensors, self._disk, data_start)
        except BaseException:
            self.close()
            raise

    def info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise unknown_tensor(self.path, name, self.tensors)
        return self.tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """The tensor in memory of its own, in the dtype of the file (packed uint8 under 8 bits)."""
        info = self.info(name)
        what = f"{self.path}: tensor {short(name)}"
        dtype, shape = storage(info.dtype, info.shape, what)
        out = empty(shape, dtype, what)
        self._disk.read_into(info.start, out, f"tensor {short(name)}")
        return out

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Fill `out`, which has the dtype and shape of `read(name)`, or is uint8 of as many bytes."""
        info = self.info(name)
        what = f"{self.path}: tensor {short(name)}"
        dtype, shape = storage(info.dtype, info.shape, what)
        raw = out.dtype is torch.uint8 and out.nbytes == info.nbytes and out.is_contiguous()
        if not raw and (out.dtype is not dtype or tuple(out.shape) != shape):
            raise CheckpointError(f"{what}: is {dtype} {list(shape)}, cannot go into {out.dtype} {list(out.shape)}")
        if out.device.type != "cpu" or not out.is_contiguous():
            staged = self.read(name)
            out.copy_(staged.view(-1).view(torch.uint8).view(out.shape) if raw else staged)
            return
        self._disk.read_into(info.start, out, f"tensor {short(name)}")

    def close(self) -> None:
        self._disk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_safetensors(path: Path | str) -> SafetensorsFile:
    return SafetensorsFile(Path(path))


def _read_header(disk: DiskFile) -> tuple[dict[str, Any], int]:
    if disk.size < 8:
        raise CheckpointError(f"{disk.path}: {disk.size} bytes, a safetensors file has at least 8 (the header length)")
    length = int.from_bytes(disk.read(0, 8, "header length"), "little")
    if length > MAX_HEADER:
        raise CheckpointError(f"{disk.path}: header length {length} is over the limit of {MAX_HEADER} bytes")
    raw = disk.read(8, length, f"header of length {length}")
    header = load_json(raw, f"{disk.path}: header")
    if not isinstance(header, dict) or not raw.startswith(b"{"):
        raise CheckpointError(f"{disk.path}: header is not a JSON object")
    return header, 8 + length


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise CheckpointError(f"{path}: __metadata__ is not a map of strings to strings")
    return value


def _tensor(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    what = f"{path}: tensor {short(name)}"
    check_name(name, what)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{what}: its entry is not an object of exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{what}: dtype {short(dtype)} is unknown; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list):
        raise CheckpointError(f"{what}: shape {short(shape)} is not a list of sizes")
    start, end = _offsets(offsets, what)
    bits = checked_bits(shape, DTYPES[dtype][1], what)
    storage(dtype, tuple(shape), what)
    if bits != (end - start) * 8:
        raise CheckpointError(
            f"{what}: {dtype} {shape} takes {bits // 8} bytes, its data_offsets {offsets} hold {end - start}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + start, end - start)


def _offsets(value: Any, what: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(v) is int for v in value):
        raise CheckpointError(f"{what}: data_offsets {short(value)} is not a pair of integers")
    start, end = value
    if not 0 <= start <= end:
        raise CheckpointError(f"{what}: data_offsets {value} do not run forward from 0")
    return start, end


def _check_tiling(tensors: dict[str, TensorInfo], disk: DiskFile, data_start: int) -> None:
    order = sorted(tensors.values(), key=lambda t: (t.start, t.nbytes))
    first = TensorInfo("", "U8", (0,), disk.path, data_start, 0)
    for before, after in pairwise([first, *order]):
        expected = before.start + before.nbytes
        if after.start != expected:
            fault = "overlaps the one before it" if after.start < expected else "leaves a gap before it"
            raise CheckpointError(
                f"{disk.path}: tensor {short(after.name)}: data_offsets start at {after.start - data_start}, "
                f"expected {expected - data_start}: it {fault}"
            )
    end = order[-1].start + order[-1].nbytes if order else data_start
    if end > disk.size:
        raise CheckpointError(
            f"{disk.path}: tensor {short(order[-1].name)}: data_offsets end at {end}, file at {disk.size}"
        )
    if end < disk.size:
        raise CheckpointError(f"{disk.path}: {disk.size - end} trailing bytes belong to no tensor")
