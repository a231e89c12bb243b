"""Byte builders of safetensors and GGUF files that take any field as told, wrong or right."""

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

STRING, ARRAY, U8, I8, U16, U32, I32, F32, BOOL, U64 = 8, 9, 0, 1, 2, 4, 5, 6, 7, 10


def entry(dtype: str, shape: Sequence[Any], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def safetensors(header: Mapping[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def number(key: str, value: int, kind: int = U32, code: str = "I") -> bytes:
    return pair(key, kind, struct.pack("<" + code, value))


def array(key: str, kind: int, count: int, payload: bytes) -> bytes:
    return pair(key, ARRAY, struct.pack("<IQ", kind, count) + payload)


def strings(key: str, values: Sequence[str | bytes]) -> bytes:
    return array(key, STRING, len(values), b"".join(map(text, values)))


def info(name: str | bytes, dims: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARCH = pair("general.architecture", STRING, text("llama"))


def gguf(
    kv: Sequence[bytes] = (ARCH,),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    n_kv: int | None = None,
    n_tensors: int | None = None,
    magic: bytes = b"GGUF",
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(kv) if n_kv is None else n_kv)
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join([*kv, *tensors])
    return header + bytes(-len(header) % alignment) + data if tensors else header
