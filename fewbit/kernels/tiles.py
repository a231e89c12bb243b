"""Linears through the matrix units of a processor (AMX), x and y in bfloat16; the work is in tiles.cpp.

Codes become bfloat16, or stay whole numbers where x is rounded to int8. Every number of y is one chain of sums along K,
so a row of x gives the same bits alone and among others. Few rows in int8 take the vector units (dots.h), and all do
where there is nothing else: their sums of whole numbers are exact, and join as those of tiles do.
"""

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewbit.kernels.compiled import call, library
from fewbit.quant.elements import F32, INT8
from fewbit.quant.spec import QuantSpec, Scale

if TYPE_CHECKING:
    from fewbit.kernels.packed import Weight

VECTORS, TILES = 1, 2  # what tiles.cpp says that there is
STEP = 32  # columns
LEAST_GROUP = 16  # columns: between groups sums leave the units; twice as many of 4 bits, which lie in pairs
LONGEST = 512  # columns of a group that is not a whole row
TOKEN = Scale(F32, (1, 0), dynamic=True)
REACH = {"amax": 127.0, "range": 127.5}  # rule -> where the largest value of a row comes to lie
LEAST = {"amax": 1.0, "range": torch.finfo(torch.float32).eps}  # the scale of a row of zeros


def whole(act: QuantSpec) -> bool:
    """Whether x is rounded to int8 with one scale for each row, chosen at each call."""
    return act.element == INT8 and act.scales == (TOKEN,) and not act.zeros and act.rule in REACH


def values(x: Tensor, weight: "Weight") -> Tensor:
    """x: [M, K] bfloat16, contiguous -> [M, N], weights rounded to bfloat16."""
    y = x.new_empty(len(x), weight.n)
    call(native().tiles_values, ctypes.byref(weight), x.data_ptr(), len(x), y.data_ptr())
    return y


def codes(x: Tensor, weight: "Weight", rule: str) -> Tensor:
    """The same with x rounded to int8."""
    y = x.new_empty(len(x), weight.n)
    call(vectors().tiles_whole, ctypes.byref(weight), x.data_ptr(), len(x), REACH[rule], LEAST[rule], y.data_ptr())
    return y


def dense(x: Tensor, weight: Tensor) -> Tensor:
    """weight: [N, K] bfloat16."""
    y = x.new_empty(len(x), len(weight))
    call(native().tiles_dense, weight.data_ptr(), *weight.shape, x.data_ptr(), len(x), y.data_ptr())
    return y


def native() -> Any:
    """The library, or None where the processor has no tiles or we may not use them."""
    return _library() if _ready() == TILES else None


def vectors() -> Any:
    """The library for `codes`, or None where the processor has nothing for whole numbers."""
    return _library() if _ready() >= VECTORS else None


@cache
def _ready() -> int:
    found = library("tiles")
    return 0 if isinstance(found, str) else int(found.tiles_ready())


@cache
def _library() -> Any:
    found: Any = library("tiles")
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    arguments = {"tiles_whole": [pointer, pointer, number, real, real, pointer]}
    if _ready() == TILES:
        arguments["tiles_dense"] = [pointer, number, number, pointer, number, pointer]
        arguments["tiles_values"] = [pointer, pointer, number, pointer]
    for name, types in arguments.items():
        getattr(found, name).argtypes, getattr(found, name).restype = types, None
    return found
