"""Reading GGUF metadata with types, so that every complaint names the file and the key."""

import math
import struct
from typing import Any

import torch

from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.files.gguf import GGUFFile

SIZES = ("u8", "u16", "u32", "u64", "i8", "i16", "i32", "i64")
REALS = ("f32", "f64")


def shortest(value: float) -> float:
    """The decimal with the fewest digits that is this float32: what was meant before it was stored as one."""
    digits = (float(f"{value:.{n}g}") for n in range(1, 10))
    return next(d for d in digits if struct.pack("<f", d) == struct.pack("<f", value))


class Metadata:
    """The metadata of one file, read with types; every complaint names the file and the key."""

    def __init__(self, file: GGUFFile):
        self.file = file
        self.arch = str(file.kv_value("general.architecture", "string"))

    def key(self, name: str) -> str:
        return f"{self.arch}.{name}"

    def __contains__(self, name: str) -> bool:
        return self.key(name) in self.file.kv

    def refuse(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: key {self.key(name)!r}: {why}")

    def number(self, name: str) -> int | float:
        """A finite number from 0, or a bool; the one value of a list that repeats it for each layer."""
        plain = (*SIZES, *REALS, "bool")
        held = self.file.kv_value(self.key(name), *plain, *(f"[{kind}]" for kind in plain))
        values: list[int | float] = held if isinstance(held, list) else [held]
        if len(set(values)) > 1:
            why = f"{self.file.path}: key {self.key(name)!r}: {values[:8]} differs from layer to layer"
            raise UnsupportedError(why, ["models whose layers are all of one size are read"])
        if not values or not math.isfinite(values[0]) or values[0] < 0:
            raise self.refuse(name, f"{held} is not a finite number from 0")
        return shortest(values[0]) if "f32" in self.file.kinds[self.key(name)] else values[0]

    def size(self, name: str) -> int:
        value = self.number(name)
        if value < 1 or value != int(value):
            raise self.refuse(name, f"{value} is not a count from 1")
        return int(value)

    def get(self, name: str, default: Any = None) -> Any:
        return self.number(name) if name in self else default

    def has(self, leaf: str) -> bool:
        """True when some layer holds this tensor."""
        return any(n.endswith(f".{leaf}") and n.startswith("blk.") for n in self.file.tensors)


def floats(meta: Metadata, tensor: str) -> list[float] | None:
    """A small F32 tensor, or None where the file has none of that name."""
    if tensor not in meta.file.tensors:
        return None
    if meta.file.info(tensor).type_name != "F32":
        raise CheckpointError(f"{meta.file.path}: tensor {tensor!r}: is {meta.file.info(tensor).type_name}, not F32")
    values: list[float] = meta.file.read(tensor).view(torch.float32).flatten().tolist()
    return values
