"""Limits of seconds, wider by as much as this machine is slower right now than a quiet one.

Three things are looked at, since each has been seen slow alone: arithmetic, fresh memory, the start of a process.
"""

import mmap
import subprocess
import sys
import time
from collections.abc import Callable


def within(elapsed: float, limit: float) -> bool:
    return elapsed < limit or elapsed < limit * slowness()


def slowness() -> float:
    """At least 1; of each the fastest of three, so that one interruption does not count."""
    return max(1.0, *(min(_seconds(work) for _ in range(3)) / nominal for work, nominal in NOMINAL.items()))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _arithmetic() -> object:
    return sum(i * i for i in range(300_000))


def _memory() -> object:
    with mmap.mmap(-1, 1 << 25) as fresh:
        return [fresh[at] for at in range(0, 1 << 25, 4096)]


def _process() -> object:
    return subprocess.run([sys.executable, "-S", "-c", "pass"], check=True)


NOMINAL = {_arithmetic: 0.02, _memory: 0.01, _process: 0.02}  # seconds on a quiet machine
