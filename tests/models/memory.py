"""How much anonymous memory a load takes; run as a program, it prints peak and end over the import baseline."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


def anonymous() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise OSError("no Anonymous line in smaps_rollup")


def watched(work: Callable[[], object]) -> tuple[int, int]:
    """-> peak and end, in bytes over the start, while work runs and keeps its result."""
    base, peak, done = anonymous(), 0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=look)
    thread.start()
    kept = work()
    done.set()
    thread.join()
    end = anonymous()
    del kept
    return max(peak, end) - base, end - base


def measure(path: Path, **arguments: str) -> tuple[int, int]:
    """Peak and end of a load in a process of its own, which has already imported everything and checked the twin."""
    command = [sys.executable, "-m", "tests.models.memory", str(path), json.dumps(arguments)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr)
    peak, end = json.loads(run.stdout.splitlines()[-1])
    return peak, end


def main(path: str, arguments: str) -> None:
    import torch

    torch.set_num_threads(1)
    from fewbit import codecs
    from fewbit.models import build, hf, twin

    with codecs.open(path) as source:
        twin.require(hf.read_config(source.config))
    print(json.dumps(watched(lambda: build.load(path, **json.loads(arguments)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
