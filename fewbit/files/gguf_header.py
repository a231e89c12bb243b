"""The header of one GGUF file: metadata and tensor list, checked before anything is built from them.

Counts and lengths are compared with the bytes that are left. Tensor data must follow the order of the
header, each at the next multiple of the alignment, as llama.cpp demands.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fewbit.errors import CheckpointError
from fewbit.files.disk import LIMIT, DiskFile, checked_bits, short

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_KEY = 65535
MAX_NAME = 63  # GGML_MAX_NAME with its closing zero
MAX_DIMS = 4

# type id -> (name, elements of a block, bytes of a block)
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
GGML_IDS = {name: number for number, (name, _, _) in GGML_TYPES.items()}

# kind of a metadata value -> (id, struct code); strings and arrays have a length instead of a code
KINDS: dict[str, tuple[int, str]] = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "B"),
    "string": (8, ""),
    "array": (9, ""),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
_KIND_NAMES = {number: kind for kind, (number, _) in KINDS.items()}
_LEAST_BYTES = {kind: struct.calcsize("<" + code) or 8 for kind, (_, code) in KINDS.items()}
_WINDOW = 1 << 20


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor on disk: `shape` in torch order (the reverse of the file's), `start` from the start of the file."""

    name: str
    ggml_type: int
    type_name: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Shape of the raw bytes: the last axis holds the bytes of one row."""
        _, block, block_bytes = GGML_TYPES[self.ggml_type]
        row = self.shape[-1] if self.shape else 1
        return (*self.shape[:-1], row // block * block_bytes)


@dataclass(frozen=True, slots=True)
class Header:
    disk: DiskFile
    version: int
    alignment: int
    kv: dict[str, Any]
    kinds: dict[str, str]
    tensors: dict[str, GGUFTensor]


class _Cursor:
    """Reads forward through the header in windows, never past the end of the file."""

    def __init__(self, disk: DiskFile):
        self.disk = disk
        self.at = 0
        self._window = bytearray()
        self._base = 0

    @property
    def left(self) -> int:
        return self.disk.size - self.at

    def take(self, count: int, what: str) -> bytearray:
        first = self.at - self._base
        if first + count > len(self._window):
            self._fill(count, what)
            first = 0
        self.at += count
        return self._window[first : first + count]

    def _fill(self, count: int, what: str) -> None:
        if count > self.left:
            self.refuse(f"{what} needs {count} bytes at offset {self.at}, and only {self.left} are left")
        self._window = self.disk.read(self.at, min(self.left, max(count, _WINDOW)), what)
        self._base = self.at

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def string(self, what: str) -> str:
        raw = self.take(int.from_bytes(self.take(8, what), "little"), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as e:
            raise CheckpointError(f"{self.disk.path}: {what}: not UTF-8 at byte {e.start}") from e

    def count(self, what: str, least_bytes: int) -> int:
        """A u64 count of items of at least `least_bytes` each, which must fit in what is left."""
        count = self.u64(what)
        if count * least_bytes > self.left:
            self.refuse(f"{what}: {count} items of {least_bytes} bytes or more are declared, only {self.left} are left")
        return count

    def refuse(self, message: str) -> NoReturn:
        raise CheckpointError(f"{self.disk.path}: {message}")


def read_header(disk: DiskFile) -> Header:
    cursor = _Cursor(disk)
    version = _version(cursor)
    n_tensors = cursor.count("tensor count", 24)  # name length, dimension count, type and offset
    n_kv = cursor.count("metadata count", 12)  # key length and type
    kv: dict[str, Any] = {}
    kinds: dict[str, str] = {}
    for _ in range(n_kv):
        key = _key(cursor, kv)
        kinds[key], kv[key] = _typed_value(cursor, f"key {short(key)}")
    alignment = _alignment(cursor, kv, kinds)
    tensors: dict[str, GGUFTensor] = {}
    for _ in range(n_tensors):
        tensor = _tensor(cursor, tensors)
        tensors[tensor.name] = tensor
    return Header(disk, version, alignment, kv, kinds, _place(tensors, cursor, alignment))


def _version(cursor: _Cursor) -> int:
    magic = cursor.take(4, "magic")
    if magic != MAGIC:
        cursor.refuse(f"magic is {bytes(magic)!r}, a GGUF file starts with {MAGIC!r}")
    version = cursor.u32("version")
    if version not in VERSIONS:
        big = version & 0xFFFF == 0 and version != 0
        why = (
            "the file is big-endian" if big else "its layout differs" if version < 2 else "it is newer than this reader"
        )
        cursor.refuse(f"version {version} is not read: {why}; versions 2 and 3 (little-endian) are")
    return version


def _key(cursor: _Cursor, seen: dict[str, Any]) -> str:
    key = cursor.string(f"key of metadata entry {len(seen)}")
    if not key:
        cursor.refuse(f"metadata entry {len(seen)} has an empty key")
    if len(key.encode()) > MAX_KEY:
        cursor.refuse(f"key {short(key)} is longer than {MAX_KEY} bytes")
    if key in seen:
        cursor.refuse(f"duplicate key {short(key)}")
    return key


def _kind(cursor: _Cursor, what: str) -> str:
    number = cursor.u32(what)
    if number not in _KIND_NAMES:
        cursor.refuse(f"{what}: value type {number} is unknown; known are 0 to {max(_KIND_NAMES)}")
    return _KIND_NAMES[number]


def _typed_value(cursor: _Cursor, what: str) -> tuple[str, Any]:
    kind = _kind(cursor, what)
    if kind == "string":
        return kind, cursor.string(what)
    if kind != "array":
        return kind, _numbers(cursor, kind, 1, what)[0]
    item = _kind(cursor, what)
    if item == "array":
        cursor.refuse(f"{what}: an array of arrays is not read")
    count = cursor.count(what, _LEAST_BYTES[item])
    if item == "string":
        return f"[{item}]", [cursor.string(what) for _ in range(count)]
    return f"[{item}]", _numbers(cursor, item, count, what)


def _numbers(cursor: _Cursor, kind: str, count: int, what: str) -> list[Any]:
    raw = cursor.take(count * _LEAST_BYTES[kind], what)
    if kind != "bool":
        return list(struct.unpack(f"<{count}{KINDS[kind][1]}", raw))
    if raw.strip(b"\0\1"):
        cursor.refuse(f"{what}: a bool is stored as something else than 0 or 1")
    return [byte == 1 for byte in raw]


def _alignment(cursor: _Cursor, kv: dict[str, Any], kinds: dict[str, str]) -> int:
    key = "general.alignment"
    if key not in kv:
        return DEFAULT_ALIGNMENT
    value = kv[key]
    if kinds[key] != "u32":
        cursor.refuse(f"key {short(key)}: is stored as {kinds[key]}, expected u32")
    if value <= 0 or value & (value - 1):
        cursor.refuse(f"key {short(key)}: {value} is not a power of two")
    return int(value)


def _tensor(cursor: _Cursor, seen: dict[str, GGUFTensor]) -> GGUFTensor:
    """One entry of the tensor list; its `start` is still relative to the data section."""
    name = cursor.string(f"name of tensor {len(seen)}")
    what = f"tensor {short(name)}"
    if not name or len(name.encode()) > MAX_NAME:
        cursor.refuse(f"{what}: a name has 1 to {MAX_NAME} bytes, this one {len(name.encode())}")
    if name in seen:
        cursor.refuse(f"duplicate {what}")
    n_dims = cursor.u32(what)
    if n_dims > MAX_DIMS:
        cursor.refuse(f"{what}: {n_dims} dimensions, at most {MAX_DIMS} are allowed")
    shape = tuple(cursor.u64(what) for _ in range(n_dims))[::-1]
    number = cursor.u32(what)
    nbytes = tensor_bytes(number, shape, f"{cursor.disk.path}: {what}")
    return GGUFTensor(name, number, GGML_TYPES[number][0], shape, cursor.disk.path, cursor.u64(what), nbytes)


def tensor_bytes(ggml_type: int, shape: Sequence[int], what: str) -> int:
    """Bytes of a tensor of torch `shape`; refuses unknown types, part blocks and products past 63 bits."""
    if ggml_type not in GGML_TYPES:
        raise CheckpointError(f"{what}: tensor type {ggml_type} is unknown; known are {', '.join(GGML_IDS)}")
    name, block, block_bytes = GGML_TYPES[ggml_type]
    count = checked_bits(shape, 8, what) // 8
    row = shape[-1] if shape else 1
    if row % block:
        raise CheckpointError(f"{what}: a row of {row} elements does not divide into {name} blocks of {block}")
    if math.prod(max(size, 1) for size in shape) // block * block_bytes > LIMIT:  # strides count where nothing is held
        raise CheckpointError(f"{what}: {name} {list(shape)} overflows 63 bits of bytes")
    return count // block * block_bytes


def _place(tensors: dict[str, GGUFTensor], cursor: _Cursor, alignment: int) -> dict[str, GGUFTensor]:
    """Check the declared offsets and make them absolute."""
    data_start = align(cursor.at, alignment)
    expected = 0
    placed = {}
    for name, t in tensors.items():
        what = f"tensor {short(name)}"
        if t.start != expected:
            cursor.refuse(f"{what}: bad offset {t.start}, expected {expected} (alignment {alignment})")
        cursor.disk.check(data_start + expected, t.nbytes, what)
        placed[name] = GGUFTensor(name, t.ggml_type, t.type_name, t.shape, t.file, data_start + expected, t.nbytes)
        expected = align(expected + t.nbytes, alignment)
    return placed


def align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
