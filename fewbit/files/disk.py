"""Plain bounded reads of one open file, and the arithmetic of the extents it declares.

A read is checked against the size of the file first, so that no declared number can ask for memory
the file does not back. Reads at absolute offsets (`pread`) may come from several threads at once.
"""

import ctypes
import math
import os
import stat
import sys
import weakref
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from pathlib import Path
from reprlib import Repr

import torch

from fewbit.errors import CapacityError, CheckpointError

CHUNK = 16 << 20
LIMIT = 2**63 - 1
MAX_DIMS = 64  # what torch's iterators can walk
THREADS = min(4, os.cpu_count() or 1)


class DiskFile:
    """One open regular file: its path, its size, and reads that never pass its end."""

    def __init__(self, path: Path):
        self.path = path
        try:
            # O_NONBLOCK: opening a named pipe must not wait for a writer
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{path}: cannot open: {reason(e)}") from e
        self._fd = fd
        self._close = weakref.finalize(self, os.close, fd)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise CheckpointError(f"{path}: not a regular file")
        self.size = status.st_size

    def close(self) -> None:
        self._close()

    def check(self, start: int, nbytes: int, what: str) -> None:
        """Refuse an extent that is not inside the file."""
        if start < 0 or nbytes < 0 or start + nbytes > self.size:
            raise CheckpointError(
                f"{self.path}: {what}: bytes {start} to {start + nbytes} are asked for, and the file has {self.size}"
            )

    def read(self, start: int, nbytes: int, what: str) -> bytearray:
        self.check(start, nbytes, what)
        data = bytearray(nbytes)
        self._fill(memoryview(data), start, what)
        return data

    def read_into(self, start: int, out: torch.Tensor, what: str) -> None:
        """Fill `out` (contiguous, on the CPU) with the bytes at `start`."""
        nbytes = out.nbytes
        self.check(start, nbytes, what)
        view = bytes_of(out)
        if nbytes < 2 * CHUNK:
            self._fill(view, start, what)
            return
        _advise_huge_pages(out.data_ptr(), nbytes)
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(lambda at: self._fill(view[at : at + CHUNK], start + at, what), range(0, nbytes, CHUNK)):
                pass

    def _fill(self, view: memoryview, start: int, what: str) -> None:
        if not self._close.alive:
            raise CheckpointError(f"{self.path}: {what}: the file was closed")
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self._fd, [view[done:]], start + done)
            except OSError as e:
                raise CheckpointError(f"{self.path}: {what}: cannot read: {reason(e)}") from e
            if got == 0:
                raise CheckpointError(f"{self.path}: {what}: the file became shorter while it was read")
            done += got


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120
_SHORT.maxlist = _SHORT.maxdict = 16
short = _SHORT.repr  # a value from a file, cut to what fits in a message


def reason(error: Exception) -> str:
    """The words of an operating system error, without the path the caller has already named."""
    return getattr(error, "strerror", None) or str(error)


def empty(shape: Sequence[int], dtype: torch.dtype, what: str) -> torch.Tensor:
    try:
        return torch.empty(tuple(shape), dtype=dtype)
    except RuntimeError as e:
        need = math.prod(shape) * dtype.itemsize
        raise CapacityError(f"{what}: no memory for {need} bytes ({dtype} {list(shape)})") from e


def checked_bits(shape: Sequence[int], bits: int, what: str) -> int:
    """Elements times bits; refuses dimensions that are not sizes and products past 63 bits of bytes."""
    if len(shape) > MAX_DIMS:
        raise CheckpointError(f"{what}: {len(shape)} dimensions, at most {MAX_DIMS} are allowed")
    product = bits
    for size in shape:
        if type(size) is not int or not 0 <= size <= LIMIT:
            raise CheckpointError(f"{what}: dimension {short(size)} is not a size from 0 to 2^63-1")
        product *= max(size, 1)
        if product > LIMIT * 8:
            raise CheckpointError(f"{what}: the product of shape {list(shape)} overflows 64 bits")
    return 0 if 0 in shape else product


def check_name(name: str, what: str) -> None:
    """Refuse a name that is empty or cannot be written as UTF-8 (a lone surrogate from JSON)."""
    if not name:
        raise CheckpointError(f"{what}: empty name")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as e:
        raise CheckpointError(f"{what}: name {name!r} is not valid Unicode") from e


def unknown_tensor(path: Path, name: str, known: Collection[str]) -> CheckpointError:
    near = get_close_matches(name, known, 3)
    return CheckpointError(f"{path}: no tensor {short(name)}" + (f"; near are {', '.join(near)}" if near else ""))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; without a copy when it is contiguous on the CPU."""
    view: memoryview = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return view


def _advise_huge_pages(address: int, nbytes: int) -> None:
    # 1 GB into fresh memory: 0.43 s with 4 KB pages, 0.11 s with 2 MB pages (2 cores, file in the page cache)
    if not sys.platform.startswith("linux"):
        return
    page = 4096
    first = -(-address // page) * page
    length = (address + nbytes - first) // page * page
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), 14)
