"""Products of up to 16 rows on a GPU that can begin a kernel before the last one ends (compute capability 9.0): few.cu.

A row of y is the same whatever rows are beside it: K is dealt out by the shape of the weight alone.
"""

import ctypes
import logging
from dataclasses import dataclass
from functools import cache
from math import inf

import torch
from torch import Tensor

from fewbit.errors import UnsupportedError
from fewbit.kernels import compiled_gpu
from fewbit.kernels.compiled_gpu import Function

LOG = logging.getLogger("fewbit.kernels")
TILE = 8  # rows of x to a tile of matrix units
LONG = 8  # tiles of a processor: of longer weights two tiles of x are left to what takes more
LEAST = (9, 0)
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float8_e4m3fn: 2}
HALVES = (torch.bfloat16, torch.float16)
CHUNK = 64  # bytes of a row that a warp takes at a time
ROWS, TALL = 16, 64  # columns of y: that a warp makes from rows of W, that a program makes from humming's layout
INTEGERS, NVFP4, MXFP4 = range(3)  # few.cu's CODES
# Up to so many tiles to a processor: warps, blocks to a sum.
LAID = ((0.5, (8, 2)), (1, (8, 1)), (1.5, (8, 2)), (2.5, (8, 1)), (inf, (4, 2)))
LARGEST = {NVFP4: 0x7E, MXFP4: 0xFE}  # codes of scales that are numbers above 0
GROUPS = {INTEGERS: (0, 16, 32, 64, 128, 256, 512), NVFP4: (16,), MXFP4: (32,)}  # columns to a scale, 0 = all


@dataclass(frozen=True, slots=True)
class Laid:
    """Codes that `laid` reads."""

    codes: int
    bits: int
    group: int

    @property
    def times(self) -> int:
        """Scales of a run of 128 columns, which lanes share where there are several."""
        return max(128 // self.group, 1) if self.group else 1


class Finish(ctypes.Structure):
    """few.cu's Finish."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "rows", "columns", "bias")),
        *((name, ctypes.c_int) for name in ("m", "n", "row_step", "column_step")),
    )


@cache
def lacking(device: torch.device) -> str | None:
    """Why nothing of this runs there."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"runs on NVIDIA GPUs, not on {device.type}"
    if (found := torch.cuda.get_device_capability(device)) < LEAST:
        return f"needs compute capability {LEAST[0]}.{LEAST[1]}, found {found[0]}.{found[1]}"
    try:
        _by_rows(device, torch.bfloat16, torch.bfloat16, 1, ROWS)  # what compiles once does for every shape
    except (UnsupportedError, OSError) as error:
        LOG.warning("few rows are slower than they could be here: %s", error)
        return str(error)
    return None


def takes(x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether `rows` multiplies x [M, K] by w [N, K], which is contiguous, for results of dtype."""
    if not x.is_cuda or x.dtype not in TYPES or dtype not in HALVES or lacking(x.device):
        return False
    if w.dtype != x.dtype or len(w) % ROWS or w.data_ptr() % 16:
        return False
    most = TILE if x.dtype in HALVES else most_rows(len(w), x.device)
    return len(x) <= most and x.shape[1] * x.element_size() % CHUNK == 0 and lies_well(x, bias, dtype)


def most_rows(n: int, device: torch.device) -> int:
    """Rows of x up to which products of codes [n, K] are faster here than by what takes more."""
    return 2 * TILE if n <= LONG * ROWS * _processors(device) else TILE


def lies_well(x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    return x.is_contiguous() and x.data_ptr() % 16 == 0 and (bias is None or bias.dtype == dtype)


def rows(
    x: Tensor, w: Tensor, dtype: torch.dtype, rows: Tensor | None = None, columns: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x: [M, K], w: [N, K] of one type -> [M, N] of dtype. rows: [M] or [1], columns: [N] or [1] float32 scales."""
    y = x.new_empty(len(x), len(w), dtype=dtype)
    size = ctypes.c_int(w.shape[1] * w.element_size())
    run, wide = _by_rows(x.device, x.dtype, dtype, _tiles(len(x)), len(w))
    run(len(w) // wide, _stream(x), (_at(w), _at(x), _finish(y, rows, columns, bias), size))
    return y


def laid(
    x: Tensor, w: Tensor, n: int, how: Laid, scales: Tensor | None, zeros: Tensor | None, outer: Tensor | None,
    columns: Tensor | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x: [M, K]; w, scales, zeros: codes [n, K] as humming holds them beside x's type -> [M, n].

    zeros: of 4 bits, or of x's type. outer: [1], columns: [n] float32, which the sums are times.
    """
    y = x.new_empty(len(x), n)
    between = 0 if zeros is None else 2 if zeros.dtype == x.dtype else 1
    run = _by_layout(x.device, x.dtype, _tiles(len(x)), _spread(len(x), how), how, between, n)
    finish, k = _finish(y, outer, columns, bias), ctypes.c_int(x.shape[1])
    run(n // TALL * run.cluster, _stream(x), (_at(w), _at(x), finish, _at(scales), _at(zeros), k))
    return y


@cache
def _by_rows(device: torch.device, kind: torch.dtype, out: torch.dtype, tiles: int, n: int) -> tuple[Function, int]:
    """-> and how many columns of y a program makes. Measured: benchmarks/gpu_kernels.py.

    Few rows of W leave processors idle unless more warps share each. Two tiles of W to a warp read x half as often, and
    leave the kernel after this one less room.
    """
    each = n / ROWS / _processors(device)
    warps, depth, high = (16, 4 - tiles, 2) if each <= 2 else (8, 5 - tiles, 1)
    if each > 8 and kind in HALVES:
        depth, high = 3, 2
    elif each <= 4 and tiles == 1 and kind not in HALVES:
        high = 2
    shared = warps * depth * 512  # bytes, times two for each tile of W and one for each of x
    if n % (high * ROWS) or shared * (2 * high + tiles) > _shared_bytes(device):
        high = 1
    defines = {"TYPE": TYPES[kind], "OUT": TYPES[out], "TILES": tiles, "WARPS": warps, "DEPTH": depth, "HIGH": high,
               "SPLIT": 0}  # fmt: skip
    return _function("few_rows", device, defines, shared * (2 * high + tiles)), ROWS * high


@cache
def _by_layout(
    device: torch.device, kind: torch.dtype, tiles: int, spread: int, how: Laid, zeros: int, n: int
) -> Function:
    high, processors = n // TALL, _processors(device)
    warps, split = next(shape for most, shape in LAID if high <= most * processors)
    defines = {"TYPE": TYPES[kind], "OUT": TYPES[kind], "TILES": tiles, "SPREAD": spread, "WARPS": warps,
               "BITS": how.bits, "GROUP": how.group, "CODES": how.codes, "ZEROS": zeros, "SPLIT": split}  # fmt: skip
    numbers = how.times * (512 if zeros == 2 else 256) if how.times > 1 else 0
    shared = warps * (how.bits * 1024 + tiles * 4352 + numbers)
    if high * split <= processors:  # each has a processor to itself: two on one leave another idle
        shared = max(shared, _shared_bytes(device) // 2 + 1)
    return _function("few_laid", device, defines, shared, split)


def _function(name: str, device: torch.device, defines: dict[str, int], shared: int, split: int = 1) -> Function:
    given = tuple(f"{key}={value}" for key, value in defines.items())
    return compiled_gpu.function("few.cu", name, device, given, defines["WARPS"] * 32, shared, split)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _shared_bytes(device: torch.device) -> int:
    """That a block can have: consumer GPUs have half of it."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _tiles(m: int) -> int:
    return -(-m // TILE)


def _spread(m: int, how: Laid) -> int:
    """Columns of a tile that a row of x has."""
    return 2 if how.times > 1 and 2 * m <= TILE else 1


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _finish(y: Tensor, rows: Tensor | None, columns: Tensor | None, bias: Tensor | None) -> Finish:
    held = (_at(each) for each in (y, rows, columns, bias))
    steps = (int(each is not None and each.numel() > 1) for each in (rows, columns))
    return Finish(*held, *y.shape, *steps)
