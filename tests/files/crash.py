"""Kills a writer at every system call it makes, and lets the disk fill at every size; prints what is left.

Runs apart from pytest because it forks: `python -m tests.files.crash FOLDER`. One JSON line per attempt.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from fewbit.errors import CapacityError, CheckpointError
from fewbit.files.checkpoint import open_checkpoint
from fewbit.files.writer import GGUFWriter, SafetensorsWriter

CALLS = ("open", "pwrite", "fsync", "rename", "unlink")
SHAPES = {f"layer.{i}.weight": (16, 8) for i in range(4)}
Write = Callable[[Path, float, bool], None]


def sharded(out: Path, value: float, overwrite: bool = False) -> None:
    _safetensors(out, value, overwrite, 1024)


def single(out: Path, value: float, overwrite: bool = False) -> None:
    _safetensors(out, value, overwrite, 1 << 30)


def _safetensors(out: Path, value: float, overwrite: bool, max_shard: int) -> None:
    layout = {name: ("F32", shape) for name, shape in SHAPES.items()}
    with SafetensorsWriter(out, layout, max_shard=max_shard, overwrite=overwrite) as writer:
        for name, shape in SHAPES.items():
            writer.put(name, torch.full(shape, value))
        writer.add_file("config.json", json.dumps({"value": value}).encode())


def gguf(out: Path, value: float, overwrite: bool = False) -> None:
    kv = {"general.architecture": ("string", "llama"), "value": ("f32", value)}
    layout = {name: (0, shape) for name, shape in SHAPES.items()}
    with GGUFWriter(out / "model.gguf", kv, layout, overwrite=overwrite) as writer:
        for name, shape in SHAPES.items():
            writer.put(name, torch.full(shape, value))


def die_at(call: int) -> None:
    """Make the process kill itself before its `call`-th system call that changes a file."""
    left = call

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def fill_at(size: int) -> None:
    """No file may grow past `size`: writes fail with EFBIG, as they do with ENOSPC on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def attempt(prepare: Callable[[], None], write: Write, out: Path, overwrite: bool) -> str:
    """Write in a child; how it ended: "killed", "capacity", "done" or the name of a surprise."""
    child = os.fork()
    if child == 0:
        code = 4
        try:
            prepare()
            write(out, 2.0, overwrite)
            code = 0
        except CapacityError:
            code = 3
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return "killed"
    return {0: "done", 3: "capacity"}.get(os.WEXITSTATUS(status), "surprise")


def found(out: Path) -> float | str:
    """The value of the whole model in the folder, or "refused"."""
    try:
        with open_checkpoint(out) as checkpoint:
            values = {float(v) for name in SHAPES for v in checkpoint.read(name).view(-1).view(torch.float32).unique()}
            values.add(checkpoint.gguf.kv["value"] if checkpoint.gguf else checkpoint.config["value"])
    except CheckpointError:
        return "refused"
    return values.pop() if len(values) == 1 else "mixed"


def report(folder: Path, write: Write, how: str, at: int, prepare: Callable[[], None], overwrite: bool) -> str:
    out = folder / f"{write.__name__}-{how}-{at}-{overwrite}"
    if overwrite:
        write(out, 1.0, False)
    before = sorted(p.name for p in out.iterdir()) if overwrite else None
    end = attempt(prepare, write, out, overwrite)
    after = sorted(p.name for p in out.iterdir()) if out.exists() else None
    row = {"writer": write.__name__, "how": how, "at": at, "overwrite": overwrite, "end": end}
    print(json.dumps(row | {"found": found(out), "clean": before == after}))
    return end


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for write in (single, sharded, gguf):
        for overwrite in (False, True):
            call = 1
            while report(folder, write, "kill", call, partial(die_at, call), overwrite) != "done":
                call += 1
            for size in range(0, 3400, 97):
                report(folder, write, "full", size, partial(fill_at, size), overwrite)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
