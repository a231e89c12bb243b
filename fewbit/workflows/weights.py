"""The weights that are encoded, read as they are asked for; without a text, the next ones while one is encoded."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch
from torch import Tensor

from fewbit.files.safetensors import storage
from fewbit.workflows.floats import Floats
from fewbit.workflows.job import Job

AHEAD = 4  # tensors; two are read at a time
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class Weights(Mapping[str, Tensor]):
    """Module -> its weight in float32 on the job's device, read each time it is asked for."""

    def __init__(self, job: Job, names: Sequence[str]):
        self.job, self.names = job, names

    def __getitem__(self, name: str) -> Tensor:
        return read_weight(self.job, name).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class ReadAhead(Weights):
    """The same for names that are asked for once each, about in this order. A context."""

    def __enter__(self) -> Self:
        self._left = iter(self.names)
        self._pool = ThreadPoolExecutor(2)
        self._held: dict[str, Future[Tensor]] = {}
        for _ in range(AHEAD):
            self._next()
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _next(self) -> bool:
        name = next(self._left, None)
        if name is not None:
            self._held[name] = self._pool.submit(read_weight, self.job, name)
        return name is not None

    def __getitem__(self, name: str) -> Tensor:
        while name not in self._held and self._next():
            pass
        found = self._held.pop(name).result()
        self._next()
        return found.float()


def read_weight(job: Job, name: str) -> Tensor:
    """On the job's device, in the dtype it is kept in."""
    key = f"{name}.weight"
    info = job.source.dense.get(key)
    if job.device.type != "cuda" or info is None or job.source.reader or type(job.floats) is not Floats:
        value: Tensor = job.floats.read(key)
        return value.to(job.device)
    # into pinned memory, which is kept and used again: no fresh pages, and the copy to the device needs no other
    dtype, shape = storage(info.dtype, info.shape, key)
    pinned = torch.empty(shape, dtype=dtype, pin_memory=True)
    job.source.checkpoint.read_into(key, pinned)
    return pinned.to(job.device, non_blocking=True)


def as_stored(job: Job, name: str, value: Tensor) -> Tensor:
    """A dense tensor in the dtype that the result keeps it in."""
    return value.to(FLOATS.get(job.floats.dense[name].dtype, value.dtype))
