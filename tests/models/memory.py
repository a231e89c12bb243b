"""How much anonymous memory a load takes; as a program: its peak over the import baseline, and what the model holds."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


def anonymous() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise OSError("no Anonymous line in smaps_rollup")


def watched(work: Callable[[], object]) -> tuple[int, int]:
    """-> peak over the start while work runs, and the bytes that the model it returns holds."""
    base, peak, done = anonymous(), 0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=look)
    thread.start()
    kept = work()
    done.set()
    thread.join()
    return max(peak, anonymous()) - base, held(kept)


def held(model: Any) -> int:
    """Bytes of every storage that a model's parameters, buffers and planes stand on, each once."""
    from fewbit.modules.embedding import Embedding
    from fewbit.modules.experts import Experts
    from fewbit.modules.linear import Linear

    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, Linear):
            tensors += [plane for part in module.parts for plane in part.quantized.weight.planes.values()]
        elif isinstance(module, Experts):
            parts = [part for parts in module.parts.values() for part in parts]
            tensors += [plane for part in parts for plane in part.quantized.weight.planes.values()]
        elif isinstance(module, Embedding):
            tensors += module.table.planes.values()
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure(path: Path, **arguments: str) -> tuple[int, int]:
    """Peak and final bytes of one load."""
    (found,) = measure_each([(path, arguments)])
    return found


def measure_each(cases: Sequence[tuple[Path, Mapping[str, str]]]) -> list[tuple[int, int]]:
    """Peak and final bytes of loads, each in a process forked off one that has imported all and checked the twin."""
    command = [sys.executable, "-m", "tests.models.memory"]
    asked = [str(part) for path, arguments in cases for part in (path, json.dumps(arguments))]
    run = subprocess.run([*command, *asked], capture_output=True, text=True, cwd=ROOT, check=False)
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("[")]
    if run.returncode or len(found) != len(cases):
        raise RuntimeError(run.stderr)
    return [(peak, final) for peak, final in found]


def main(*asked: str) -> None:
    import torch

    torch.set_num_threads(1)
    from fewbit import codecs
    from fewbit.models import build, hf, twin

    for path, arguments in zip(asked[::2], asked[1::2], strict=True):
        with codecs.open(path) as source:
            twin.require(hf.read_config(source.config))
        if (child := os.fork()) == 0:
            given = json.loads(arguments)
            print(json.dumps(watched(lambda: build.load(path, **given))), flush=True)  # noqa: B023
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            raise RuntimeError(f"{path} {arguments}: the load failed")


if __name__ == "__main__":
    main(*sys.argv[1:])
