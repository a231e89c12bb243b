"""Kills `convert` at the system calls it makes, and fills its disk; prints what is left. One JSON line per attempt.

Runs apart from pytest because it forks: `python -m tests.workflows.crash FOLDER`.
"""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import torch

import fewbit
from fewbit.errors import CheckpointError
from fewbit.files.checkpoint import open_checkpoint
from tests.files.crash import attempt, die_at, fill_at
from tests.tiny import llama

CALLS = (*range(1, 30, 4), *range(30, 130, 5))  # the last of them are those that name the files


def left(path: Path) -> str:
    """The dialect of the whole model in the folder, or "refused"."""
    try:
        with open_checkpoint(path) as checkpoint:
            for name in checkpoint.tensors:
                checkpoint.read(name)
            return str(checkpoint.config["quantization_config"]["quant_method"])
    except CheckpointError:
        return "refused"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    gptq = folder / "gptq"
    fewbit.convert(llama(folder / "base", num_hidden_layers=1), gptq, "gptq", requantize="int4-g128", max_shard=40_000)

    def convert(out: Path, value: float, overwrite: bool) -> None:
        fewbit.convert(gptq, out, "awq", max_shard=40_000, overwrite=overwrite)

    convert(folder / "warm", 0, False)
    ways = [("kill", call, partial(die_at, call)) for call in CALLS]
    ways += [("full", size, partial(fill_at, size)) for size in (0, 100, 9_000, 20_000, 1 << 20)]
    for how, at, prepare in ways:
        for overwrite in (False, True):
            out = folder / f"{how}-{at}-{overwrite}"
            if overwrite:
                shutil.copytree(gptq, out)
            row = {"how": how, "at": at, "overwrite": overwrite, "end": attempt(prepare, convert, out, overwrite)}
            row["found"] = left(out)
            try:
                convert(out, 0, False)
                row["again"] = "done"
            except CheckpointError as error:
                row["again"] = str(error)
            convert(out, 0, True)
            print(json.dumps(row | {"after": left(out)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
