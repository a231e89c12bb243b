"""Writer of one GGUF file: header planned from the declared names, data put in any order, renamed at the end."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fewbit.errors import CheckpointError
from fewbit.files.disk import bytes_of
from fewbit.files.gguf import GGML_TYPES, SPLIT_NAME, open_gguf
from fewbit.files.gguf_header import DEFAULT_ALIGNMENT, KINDS, MAGIC, align, tensor_bytes
from fewbit.files.manifest import MANIFEST, manifest_bytes, read_manifest
from fewbit.files.staging import ASK, Place, Staging, Writer, expect

_VERSION = 3
_PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


class GGUFWriter(Writer):
    """Writes one GGUF file (version 3) and its entry in the manifest of its folder.

    `kv`: key -> (kind, value) as `GGUFFile.typed_kv` gives them ("u32", "string", "[f32]" ...);
    `tensors`: name -> (ggml type, torch shape). Data is put as the raw bytes, in any order.
    """

    def __init__(
        self,
        out: Path | str,
        kv: Mapping[str, tuple[str, Any]],
        tensors: Mapping[str, tuple[int, Sequence[int]]],
        overwrite: bool = False,
    ):
        self.out = Path(out)
        if self.out.exists() and not overwrite:
            raise CheckpointError(f"{self.out}: exists already; choose another name or {ASK}")
        if self.out.suffix != ".gguf" or SPLIT_NAME.fullmatch(self.out.name):
            raise CheckpointError(f"{self.out}: the name must end in .gguf and not be that of a part of a split set")
        header, self._places, size = _lay_out(self.out, kv, tensors)
        self._done: set[str] = set()
        self._staging = Staging(self.out.parent)
        self._staging.put(self.out.name, header)
        if size > len(header):
            self._staging.write(self.out.name, size - 1, b"\0")
        self._check_header()

    def _check_header(self) -> None:
        """Read the header back before hours of work are put behind it."""
        try:
            open_gguf(self._staging.partial(self.out.name)).close()
        except CheckpointError:
            self.abort()
            raise

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor: its raw bytes (uint8 of any shape), or the plain dtype of an F or I type."""
        place = expect(self.out, name, self._places, self._done)
        if tensor.nbytes != place.nbytes or tensor.dtype not in (torch.uint8, place.dtype):
            raise CheckpointError(
                f"{self.out}: tensor {name!r} has {place.nbytes} raw bytes, put is {tensor.dtype} {list(tensor.shape)}"
            )
        self._staging.write(place.file, place.start, bytes_of(tensor))
        self._done.add(name)

    def _publish(self) -> None:
        self._staging.check_complete(self._places, self._done)
        name = self.out.name
        entry = self._staging.seal(name)
        known = read_manifest(self.out.parent) if (self.out.parent / MANIFEST).exists() else {}
        self._staging.put(MANIFEST, manifest_bytes({**known, name: entry}))
        self._staging.seal(MANIFEST)
        self._staging.publish([MANIFEST, name])


def _lay_out(
    out: Path, kv: Mapping[str, tuple[str, Any]], tensors: Mapping[str, tuple[int, Sequence[int]]]
) -> tuple[bytes, dict[str, Place], int]:
    """The header, padded to where the data starts, the place of every tensor, and the size of the file."""
    kind, alignment = kv.get("general.alignment", ("u32", DEFAULT_ALIGNMENT))
    if kind != "u32" or alignment <= 0 or alignment & (alignment - 1):
        raise CheckpointError(f"{out}: general.alignment {alignment!r} ({kind}) is not a u32 power of two")
    header = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(kv))]
    header += [_string(key) + _value(kind, value, f"{out}: key {key!r}") for key, (kind, value) in kv.items()]
    offsets: dict[str, tuple[int, int]] = {}
    at = 0
    for name, (number, shape) in tensors.items():
        offsets[name] = at, (nbytes := tensor_bytes(number, shape, f"{out}: tensor {name!r}"))
        header.append(_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), number, at))
        at = align(at + nbytes, alignment)
    raw = b"".join(header)
    raw += b"\0" * (-len(raw) % alignment)
    places = {name: _place(out.name, len(raw) + start, n, *tensors[name]) for name, (start, n) in offsets.items()}
    return raw, places, len(raw) + at


def _place(file: str, start: int, nbytes: int, number: int, shape: Sequence[int]) -> Place:
    return Place(file, start, nbytes, _PLAIN.get(GGML_TYPES[number][0], torch.uint8), tuple(shape))


def _value(kind: str, value: Any, what: str) -> bytes:
    item = kind[1:-1] if kind.startswith("[") else kind
    if item not in KINDS or item == "array":
        raise CheckpointError(f"{what}: kind {kind!r} is unknown; known are {', '.join(KINDS)} and arrays as [kind]")
    number = struct.pack("<I", KINDS[item][0])
    if kind == item:
        return number + _items(item, [value], what)
    return struct.pack("<I", KINDS["array"][0]) + number + struct.pack("<Q", len(value)) + _items(item, value, what)


def _items(kind: str, values: Sequence[Any], what: str) -> bytes:
    try:
        if kind == "string":
            return b"".join(map(_string, values))
        return struct.pack(f"<{len(values)}{KINDS[kind][1]}", *values)
    except (struct.error, OverflowError, AttributeError, UnicodeEncodeError) as e:
        raise CheckpointError(f"{what}: cannot be stored as {kind}: {e}") from e


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw
