"""Group: this process as one of several ranks on this machine; sums and joins over gloo on a CPU, nccl on GPUs.

Sums of few numbers, as a step of few streams has them, go through GPUs' memory itself where that can be had.

The group is made of its own, beside whatever else a program does with torch.distributed. Ranks find one another by a
file in memory, which nccl reads as long as it runs and which has no name that anybody could leave behind; over gloo
they speak on the loopback address only.
"""

import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fewbit.errors import UnsupportedError
from fewbit.kernels import near

LOG = logging.getLogger("fewbit.engine")
PATIENCE = timedelta(minutes=10)  # a first step may compile kernels; a rank that dies is noticed otherwise
MEETING = timedelta(minutes=1)  # all have loaded when they meet
NARROW = (torch.bfloat16, torch.float16)


class Group:
    """A rank. It is connected when all ranks stand, which is after loading."""

    def __init__(self, rank: int, size: int, device: str, file: int):
        """file: what `meeting` gave rank 0, open in this process."""
        if not dist.is_available():
            raise UnsupportedError(f"tensor_parallel_size={size}: this torch was built without torch.distributed")
        self.rank, self.size, self.device, self.file = rank, size, device, file
        self._backend: Any = None
        self.near: near.Near | None = None
        self.aborted = False

    def connect(self) -> None:
        """Meet the other ranks."""
        store = dist.FileStore(f"/proc/self/fd/{self.file}", self.size)  # type: ignore[attr-defined]
        store.set_timeout(MEETING)
        cpu = self.device == "cpu"
        device = torch.device("cpu") if cpu else torch.device(self.device, self.rank)
        self._backend = (gloo if cpu else nccl)(store, self.rank, self.size)
        self.broadcast(self.reduce(torch.ones(1, device=device)))  # what nccl sets up at first use is there from now on
        if cpu:
            return
        try:
            self.near = near.meet(self.rank, self.size, device, store)
        except UnsupportedError as error:
            LOG.info("ranks sum over nccl alone: %s", error)

    def reduce(self, x: Tensor) -> Tensor:
        if self.near is not None and self.near.takes(x):
            return self.near.sum(x)
        y = x.float() if self.device == "cpu" and x.dtype in NARROW else x.contiguous()
        self._backend.allreduce([y]).wait()
        return y.to(x.dtype)

    def largest(self, x: Tensor) -> Tensor:
        y, options = x.clone(), dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]
        self._backend.allreduce([y], options).wait()
        return y

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Over gloo and nccl ranks with less pad what they send."""
        if self.near is not None and self.near.takes_parts(x, sizes):
            return self.near.gather(x, sizes)
        most = max(sizes)
        y = torch.nn.functional.pad(x, (0, most - x.shape[-1])).contiguous()
        wire = y.view(torch.uint8) if self.device == "cpu" else y
        found = [torch.empty_like(wire) for _ in sizes]
        self._backend.allgather([found], [wire]).wait()
        return torch.cat([each.view(x.dtype)[..., :n] for each, n in zip(found, sizes, strict=True)], -1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's; the others' own are lost. On GPUs no host waits."""
        if self.near is not None and self.near.takes(x):
            return self.near.sum(x if self.rank == 0 else torch.zeros_like(x))
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._backend.broadcast([x], options).wait()
        return x

    def abort(self) -> None:
        """End what waits for a rank that is gone; nothing is summed or joined after."""
        self.aborted = True
        if self.near is not None:
            self.near.give_up()
        backend, self._backend = self._backend, None
        if backend is not None and self.device == "cuda":
            backend.abort()

    def close(self) -> None:
        """Nccl's threads read the file until they end with the backend."""
        self.abort()
        if self.near is not None:
            self.near.close()
            self.near = None
        os.close(self.file)


def meeting(size: int) -> int:
    """A file by which so many ranks find one another."""
    if not hasattr(os, "memfd_create"):
        raise UnsupportedError(f"tensor_parallel_size={size}: only on Linux")
    return os.memfd_create("fewbit-ranks")


def gloo(store: Any, rank: int, size: int) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = PATIENCE
    return dist.ProcessGroupGloo(store, rank, size, options)


def nccl(store: Any, rank: int, size: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = PATIENCE
    return dist.ProcessGroupNCCL(store, rank, size, options)
