"""Limits of seconds, wider by as much as this machine is slower right now than a quiet one."""

import time

NOMINAL = 0.02  # seconds that `_work` takes on a quiet core


def within(elapsed: float, limit: float) -> bool:
    return elapsed < limit or elapsed < limit * slowness()


def slowness() -> float:
    """At least 1; the fastest of three, so that one interruption does not count."""
    return max(1.0, min(_work() for _ in range(3)) / NOMINAL)


def _work() -> float:
    start = time.process_time()
    sum(i * i for i in range(300_000))
    return time.process_time() - start
