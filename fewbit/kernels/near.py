"""Ranks near one another: GPUs that write to one another's memory, so that a kernel can add up over them by itself.

Each rank has a room of memory that the others open by a handle; kernels that exchange numbers there take a Near
(triton_near). Ranks tell one another by a store whether all of them could, so that all take this way or none does.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import UnsupportedError
from fewbit.kernels import few
from fewbit.kernels.compiled_gpu import checked, driver

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
TYPES = (*FLOATS, torch.int64)
WIDTH, PLACES = 1 << 15, 256  # bytes of a sum that a program has, and programs that may have one
ROWS = 1 << 14  # programs that may exchange one number of four bytes
LAZY = 1  # the driver's flag: a GPU is let at another's memory when that is first opened
LARGEST = 8  # ranks
EMPTY = 0xFF  # all bytes of a number that has not come


class Handle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = (("bytes", ctypes.c_char * 64),)


class Near:
    """A rank among others. rooms: where each rank's is, as this one sees it."""

    def __init__(self, rank: int, rooms: Sequence[int], device: torch.device):
        self.rank, self.rooms = rank, list(rooms)
        self.turns = torch.zeros(PLACES + ROWS, dtype=torch.int32, device=device)
        self.end = torch.zeros(1, dtype=torch.int32, pin_memory=True)  # a word of the host's that the device reads
        self.given = tuple(self.rooms), self.rooms[rank], self.turns, self.end, rank  # triton_near's `near`

    def takes(self, x: Tensor) -> bool:
        """Whether `sum` does."""
        return x.is_contiguous() and x.dtype in TYPES and 0 < x.nbytes <= WIDTH * PLACES

    def takes_rows(self, x: Tensor) -> bool:
        """Whether a program can add up a row of it."""
        width = x.shape[-1] * x.element_size()
        return x.is_contiguous() and x.dtype in FLOATS and width <= WIDTH and 0 < x.numel() // x.shape[-1] <= PLACES

    def takes_parts(self, x: Tensor, sizes: Sequence[int]) -> bool:
        """Whether `gather` does."""
        rows, each = x.shape[:-1].numel(), -(-max(sizes) * x.element_size() // WIDTH)
        return x.is_contiguous() and x.dtype in TYPES and min(sizes) > 0 and 0 < rows * each <= PLACES

    def sum(self, x: Tensor) -> Tensor:
        """The same bits on all ranks: added up in float32 (whole numbers as such), in their order."""
        from fewbit.kernels.triton_near import over_ranks

        return over_ranks(x, self)

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """All ranks' parts side by side along the last axis; sizes: of each rank's."""
        from fewbit.kernels.triton_near import side_by_side

        return side_by_side(x, sizes, self)

    def give_up(self) -> None:
        """End what waits for a rank that is gone. From any thread."""
        self.end[0] = 1

    def close(self) -> None:
        """When the others are gone."""
        self.give_up()
        for rank, room in enumerate(self.rooms):
            free = driver().cuMemFree_v2 if rank == self.rank else driver().cuIpcCloseMemHandle
            free(ctypes.c_uint64(room))
        self.rooms = []


def room_bytes(ranks: int) -> int:
    """Two halves, by turns: a rank can be one exchange ahead of another, never two."""
    return 2 * ranks * (PLACES * WIDTH + ROWS * 4)


def meet(rank: int, size: int, device: torch.device, store: Any) -> Near:
    """All ranks call it together. UnsupportedError on all, where one of them cannot."""
    room, why = ctypes.c_uint64(), lacking(size, device)
    handle = Handle()
    if why is None:
        try:
            checked(driver().cuMemAlloc_v2(ctypes.byref(room), ctypes.c_size_t(room_bytes(size))))
            checked(driver().cuMemsetD8_v2(room, ctypes.c_ubyte(EMPTY), ctypes.c_size_t(room_bytes(size))))
            checked(driver().cuIpcGetMemHandle(ctypes.byref(handle), room))
        except (UnsupportedError, OSError) as error:
            why = str(error)
    handles = told(store, "room", rank, size, b"" if why else bytes(handle))
    rooms = [room.value] * size
    if all(handles):
        try:
            rooms = [room.value if other == rank else opened(held) for other, held in enumerate(handles)]
        except UnsupportedError as error:
            why = str(error)
    if not all(handles) or not all(told(store, "opened", rank, size, b"" if why else b"1")):
        if room.value:
            driver().cuMemFree_v2(room)
        raise UnsupportedError(why or "another rank cannot")
    return Near(rank, rooms, device)


def told(store: Any, what: str, rank: int, size: int, mine: bytes) -> list[bytes]:
    """What each rank says of it. Nothing is a space, for a store keeps no empty words."""
    store.set(f"near-{what}-{rank}", mine.hex() or " ")
    return [bytes.fromhex(store.get(f"near-{what}-{other}").decode().strip()) for other in range(size)]


def opened(handle: bytes) -> int:
    there = ctypes.c_uint64()
    run = driver().cuIpcOpenMemHandle_v2
    checked(run(ctypes.byref(there), Handle.from_buffer_copy(handle), ctypes.c_uint(LAZY)))
    return there.value


def lacking(size: int, device: torch.device) -> str | None:
    """Why a rank cannot be near the others."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "runs on NVIDIA GPUs"
    if size > LARGEST:
        return f"takes up to {LARGEST} ranks"
    if (found := torch.cuda.get_device_capability(device)) < few.LEAST:
        return f"needs compute capability {few.LEAST[0]}.{few.LEAST[1]}, found {found[0]}.{found[1]}"
    far = [n for n in range(size) if n != device.index and not torch.cuda.can_device_access_peer(device, n)]
    if far:
        return f"GPU {device.index} cannot read the memory of GPU {far[0]}"
    torch.zeros(1, device=device)  # so that this thread has torch's context
    return None
