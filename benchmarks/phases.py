"""Where the time of a quantization goes: seconds spent in named functions of the package, over all threads.

What runs in threads of its own (reading, hashing, writing) overlaps the rest, so phases may sum to more than the run;
`wait` is how long the main thread stood still for a weight to be read or for a file to be on disk.
"""

import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from fewbit.files import shard
from fewbit.files.disk import DiskFile
from fewbit.workflows import journal, layer_work, quantize, weights


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._lock = threading.Lock()

    def timed(self, phase: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                with self._lock:
                    self.seconds[phase] += time.perf_counter() - begun

        return run

    def __str__(self) -> str:
        return "  ".join(f"{phase} {spent:.1f}" for phase, spent in self.seconds.items())


@contextmanager
def measured() -> Iterator[Clock]:
    """Phases of every quantization inside."""
    clock = Clock()

    def sha256(data: Any = b"") -> Any:
        digest = hashlib.sha256(data)
        return SimpleNamespace(update=clock.timed("hash", digest.update), hexdigest=digest.hexdigest)

    spots: list[tuple[Any, str, Any]] = [
        (quantize.jobs, "prepared", clock.timed("prepare", quantize.jobs.prepared)),
        (DiskFile, "read_into", clock.timed("read", DiskFile.read_into)),
        (weights, "read_weight", clock.timed("read+to device", weights.read_weight)),
        (weights.ReadAhead, "__getitem__", clock.timed("wait for weights", weights.ReadAhead.__getitem__)),
        (layer_work, "encode_groups", clock.timed("encode", layer_work.encode_groups)),
        (layer_work, "output_error", clock.timed("of it errors", layer_work.output_error)),
        (quantize, "advance", clock.timed("advance", quantize.advance)),
        (layer_work, "watch", clock.timed("watch", layer_work.watch)),
        (journal.Journal, "flush", clock.timed("wait for files", journal.Journal.flush)),
        (shard, "bytes_of", clock.timed("to host", shard.bytes_of)),
        (shard, "write_all", clock.timed("write", shard.write_all)),
        (shard, "hashlib", SimpleNamespace(sha256=sha256)),
        (os, "fsync", clock.timed("sync", os.fsync)),
        (quantize, "assemble", clock.timed("assemble", quantize.assemble)),
    ]
    with ExitStack() as stack:
        for owner, name, replacement in spots:
            stack.enter_context(patch.object(owner, name, replacement))
        yield clock


def disk_speed(folder: Path, cached: Path, size: int = 4 << 30) -> str:
    """What the disk gives without us: GB/s of writing and syncing a file, of reading one that is cached."""
    block, path = os.urandom(64 << 20), folder / "speed"
    begun = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(size // len(block)):
            file.write(block)
        written = time.perf_counter() - begun
        os.fsync(file.fileno())
    synced = time.perf_counter() - begun
    path.unlink()
    buffer = memoryview(bytearray(len(block)))
    total = cached.stat().st_size
    with cached.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
        file.seek(0)
        begun = time.perf_counter()
        while file.readinto(buffer):
            pass
    read = time.perf_counter() - begun
    begun = time.perf_counter()
    hashlib.sha256(block).digest()
    hashed = time.perf_counter() - begun
    return (f"write {size / written / 1e9:.2f}, write and sync {size / synced / 1e9:.2f}, read of a cached file"
            f" {total / read / 1e9:.2f}, sha256 {len(block) / hashed / 1e9:.2f} GB/s, each in one thread")  # fmt: skip
