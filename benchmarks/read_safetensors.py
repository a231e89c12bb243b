"""Time to have a 1 GB safetensors file in memory: this reader beside the safetensors library, in one run.

The library maps the file by default, so its tensors are pages of the page cache until they are copied; ours
are private memory at once. `own memory` makes both private (the library's by clone, or by its `pread`
backend); `summed` only touches every byte, where a map of a cached file has no copy to make.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fewbit.files.safetensors import open_safetensors

Tensors = dict[str, torch.Tensor]


def ours(path: Path) -> Tensors:
    with open_safetensors(path) as file:
        return {name: file.read(name) for name in file.tensors}


def mapped(path: Path) -> Tensors:
    return load_file(path)


def mapped_and_cloned(path: Path) -> Tensors:
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def library_pread(path: Path) -> Tensors:
    return load_file(path, backend="pread")


def touch(tensors: Tensors) -> None:
    for tensor in tensors.values():
        tensor.view(torch.int16).view(torch.int64).sum().item()


def summed(read: Callable[[Path], Tensors]) -> Callable[[Path], Tensors]:
    def run(path: Path) -> Tensors:
        tensors = read(path)
        touch(tensors)
        return tensors

    return run


ROWS: dict[str, tuple[bool, dict[str, Callable[[Path], Tensors]]]] = {
    "own memory, cached file": (True, {"map + clone": mapped_and_cloned, "pread": library_pread, "ours": ours}),
    "own memory, cold file": (False, {"map + clone": mapped_and_cloned, "pread": library_pread, "ours": ours}),
    "summed, cold file": (False, {"map": summed(mapped), "pread": summed(library_pread), "ours": summed(ours)}),
    "summed, cached file": (True, {"map": summed(mapped), "pread": summed(library_pread), "ours": summed(ours)}),
}


def make(path: Path, gigabytes: float) -> bool:
    count = max(1, round(gigabytes * 2**30 / (2 * 4096 * 4096)))
    tensor = torch.arange(4096 * 4096, dtype=torch.int16).view(torch.bfloat16).view(4096, 4096)
    save_file({f"layers.{i}.weight": tensor.clone() for i in range(count)}, path, {"format": "pt"})
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return True


def set_cache(path: Path, warm: bool) -> None:
    with path.open("rb") as file:
        if warm:
            while file.read(1 << 24):
                pass
        else:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def apart(work: Callable[[], object]) -> float:
    """Seconds of `work` in a process of its own: no memory is reused, and the parent stays without threads."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        start = time.perf_counter()
        kept = work()
        os.write(send, repr(time.perf_counter() - start).encode())
        os._exit(0 if kept else 1)
    os.close(send)
    with os.fdopen(receive) as pipe:
        taken = float(pipe.read())
    os.waitpid(child, 0)
    return taken


def seconds(read: Callable[[Path], Tensors], path: Path, warm: bool) -> float:
    set_cache(path, warm)
    return apart(lambda: read(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    print(f"$ python {' '.join(sys.argv)}   ({os.cpu_count()} cores, torch threads {torch.get_num_threads()})")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        apart(lambda: make(path, args.gb))
        size = path.stat().st_size / 1e9
        for row, (warm, ways) in ROWS.items():
            runs: dict[str, list[float]] = {name: [] for name in ways}
            for repeat in range(args.repeats):
                # who comes first finds less memory ready, so each does in turn
                names = list(ways)[repeat % len(ways) :] + list(ways)[: repeat % len(ways)]
                for name in names:
                    runs[name].append(seconds(ways[name], path, warm))
            best = {name: min(times) for name, times in runs.items()}
            theirs = min(taken for name, taken in best.items() if name != "ours")
            shown = "".join(f"{name} {taken:.3f} s ({size / taken:.1f} GB/s)   " for name, taken in best.items())
            print(f"{row:24} {shown}ours/best of library: speed {theirs / best['ours']:.2f}", flush=True)


if __name__ == "__main__":
    main()
