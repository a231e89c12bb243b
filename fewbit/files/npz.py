"""The plain value in a .npz file that holds a Python object: dicts, lists, text, numbers and arrays of numbers.

numpy writes such objects as pickles, which run code of the writer's choice when they are loaded. Here the pickle's
instructions are read one by one, and only those that build plain values are followed: nothing in a file is ever called.
"""

import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fewbit.errors import CheckpointError
from fewbit.files.disk import short

LARGEST = 256 << 20  # bytes of the object, unpacked
HOMES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
NAMES = ("_reconstruct", "ndarray", "dtype", "scalar")
NUMBERS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
OBJECT = "O8"
HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)(\{'descr': '\|O', 'fortran_order': (?:False|True), 'shape': \(\), \} *\n)", re.S
)


def read_npz(path: Path | str, max_bytes: int = LARGEST) -> Any:
    """What `np.savez(path, value)` was given; arrays come back as arrays."""
    where = str(path)
    try:
        with zipfile.ZipFile(path) as archive:
            held = archive.infolist()
            if [info.filename for info in held] != ["arr_0.npy"]:
                raise CheckpointError(f"{where}: want one object, arr_0; found {short([i.filename for i in held])}")
            if held[0].file_size > max_bytes:
                raise CheckpointError(f"{where}: {held[0].file_size} bytes, at most {max_bytes} are read")
            with archive.open(held[0]) as file:
                data = file.read(max_bytes + 1)
    except (OSError, zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError, EOFError, RuntimeError) as error:
        raise CheckpointError(f"{where}: not a .npz file: {error}") from error
    head = HEADER.match(data)
    if head is None or int.from_bytes(head[1], "little") != len(head[2]):
        raise CheckpointError(f"{where}: want one object as numpy writes it, found {short(data[10:80])}")
    return Machine(where).run(data[head.end() :])


class Name:
    """A function or class of numpy's, by name alone."""

    def __init__(self, name: str):
        self.name = name


class Kind:
    """A number type: `f4`."""

    def __init__(self, code: str):
        self.code = code


class Array:
    """An array whose content follows."""

    value: Any = None


class Machine:
    """The stack machine that pickles are programs of, with the instructions that make plain values."""

    def __init__(self, where: str):
        self.where = where
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name == "STOP":
                    break
                step = STEPS.get(opcode.name) or self._refuse(f"the instruction {opcode.name}")
                step(self, argument)
            (found,) = self.stack
        except (ValueError, IndexError, KeyError, TypeError, struct.error, UnicodeError) as error:
            raise CheckpointError(f"{self.where}: not a well-formed object: {error}") from error
        return plain(found)

    def _refuse(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.where}: holds {what}; only plain values and arrays of numbers are read")

    def marked(self) -> list[Any]:
        start = self.marks.pop()
        items, self.stack[start:] = self.stack[start:], []
        return items

    def tuple_of(self, count: int) -> None:
        self.stack[len(self.stack) - count :] = [tuple(self.stack[len(self.stack) - count :])]

    def append(self, items: list[Any]) -> None:
        held = self.stack[-1]
        (held.extend if isinstance(held, list) else self._refuse("an append to what is no list"))(items)

    def set_items(self, items: list[Any]) -> None:
        held = self.stack[-1]
        if not isinstance(held, dict):
            self._refuse("items of what is no dict")
        held.update(zip(items[::2], items[1::2], strict=True))

    def name(self, home: Any, name: Any) -> None:
        if home not in HOMES or name not in NAMES:
            self._refuse(short(f"{home}.{name}"))
        self.stack.append(Name(name))

    def get(self, key: int) -> None:
        held = self.memo[key]
        if isinstance(held, dict | list):
            self._refuse("a container that stands in two places")
        self.stack.append(held)

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        name = function.name if isinstance(function, Name) else self._refuse("a call")
        if name == "_reconstruct":
            self.stack.append(Array())
        elif name == "dtype":
            code = str(arguments[0]).lstrip("<|")
            self.stack.append(Kind(code) if code in (*NUMBERS, OBJECT) else self._refuse(f"numbers of type {code}"))
        elif name == "scalar":
            kind, data = arguments
            self.stack.append(self.numbers(kind, data, ()).item())
        else:
            self._refuse(f"a call of {name}")

    def build(self) -> None:
        state, held = self.stack.pop(), self.stack[-1]
        if isinstance(held, Kind):
            if state[1] not in ("<", "|"):
                self._refuse("numbers in big-endian order")
        elif isinstance(held, Array) and held.value is None:
            _, shape, kind, fortran, data = state
            held.value = self.content(kind, data, shape, bool(fortran))
        else:
            self._refuse("state of an unknown object")

    def content(self, kind: Kind, data: Any, shape: Any, fortran: bool) -> Any:
        if kind.code != OBJECT:
            return self.numbers(kind, data, shape, fortran)
        if shape != () or len(data) != 1:
            self._refuse("an array of objects")
        return data[0]

    def numbers(self, kind: Kind, data: Any, shape: Any, fortran: bool = False) -> np.ndarray:
        if kind.code == OBJECT or not isinstance(data, bytes):
            self._refuse("a number that is not bytes")
        return np.frombuffer(data, kind.code).reshape(shape, order="F" if fortran else "C").copy()


def plain(value: Any) -> Any:
    """With arrays in the places where they were announced."""
    if isinstance(value, Array):
        return plain(value.value) if not isinstance(value.value, np.ndarray) else value.value
    if isinstance(value, dict):
        return {plain(key): plain(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    if isinstance(value, Name | Kind):
        raise TypeError(f"{type(value).__name__} is no value")
    return value


def _push(machine: Machine, argument: Any) -> None:
    machine.stack.append(argument)


Step = Callable[[Machine, Any], Any]
STEPS: dict[str, Step] = {
    "PROTO": lambda m, a: None,
    "FRAME": lambda m, a: None,
    "MARK": lambda m, a: m.marks.append(len(m.stack)),
    "NONE": lambda m, a: m.stack.append(None),
    "NEWTRUE": lambda m, a: m.stack.append(True),
    "NEWFALSE": lambda m, a: m.stack.append(False),
    "EMPTY_DICT": lambda m, a: m.stack.append({}),
    "EMPTY_LIST": lambda m, a: m.stack.append([]),
    "EMPTY_TUPLE": lambda m, a: m.stack.append(()),
    "TUPLE": lambda m, a: m.stack.append(tuple(m.marked())),
    "TUPLE1": lambda m, a: m.tuple_of(1),
    "TUPLE2": lambda m, a: m.tuple_of(2),
    "TUPLE3": lambda m, a: m.tuple_of(3),
    "APPEND": lambda m, a: m.append([m.stack.pop()]),
    "APPENDS": lambda m, a: m.append(m.marked()),
    "SETITEM": lambda m, a: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m, a: m.set_items(m.marked()),
    "MEMOIZE": lambda m, a: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    "GLOBAL": lambda m, a: m.name(*a.split(" ", 1)),
    "STACK_GLOBAL": lambda m, a: m.name(m.stack.pop(-2), m.stack.pop()),
    "REDUCE": lambda m, a: m.reduce(),
    "BUILD": lambda m, a: m.build(),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda m, a: m.memo.__setitem__(a, m.stack[-1])),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, a: m.get(a)),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
         "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"), _push,
    ),
}  # fmt: skip
