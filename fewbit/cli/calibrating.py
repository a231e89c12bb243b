"""The verb calibrate: what is measured on a text and kept beside a checkpoint."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli.quantizing import Calib, Chat, Device, Dtype, Length, Memory, Order, Samples, Seed, nbytes
from fewbit.cli.show import Json, Model, table

Kv = Annotated[str, typer.Option("--kv", help=(
    "The format of the KV cache: fp8, fp8_e5m2, fp8_inc or int8; with -head, a scale of each head."))]  # fmt: skip


def calibrate(
    model: Model,
    kv: Kv,
    out: Annotated[Path, typer.Option("-o", "--output", help="The file to write: scales.safetensors.")],
    calib: Calib = None,
    calib_samples: Samples = 128,
    calib_len: Length = 512,
    seed: Seed = 0,
    chat: Chat = False,
    order: Order = "shuffled",
    device: Device = "cpu",
    dtype: Dtype = None,
    max_memory: Memory = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a file that is already there.")] = False,
    as_json: Json = False,
) -> None:
    """Measure the scales of a KV cache on a text, for every checkpoint of a model: serve --kv-scales takes the file."""
    from fewbit.engine.start import progress
    from fewbit.workflows.calibrate_kv import calibrate_kv

    with progress("measuring") as tell:
        found = calibrate_kv(
            model, out, kv, calib=calib, samples=calib_samples, length=calib_len, seed=seed, chat=chat, order=order,
            device=device, dtype=dtype, max_memory=nbytes(max_memory), overwrite=overwrite, tell=tell,
        )  # fmt: skip
    if as_json:
        print(json.dumps(found.to_json(), indent=2, default=str))
        return
    rows = [(name, f"{k:.6g}", f"{v:.6g}") for name, (k, v) in found.modules.items()]
    table(f"{found.format} on {found.tokens} tokens", ["attention", "scale of keys", "scale of values"], rows)
    print(f"next:   fewbit serve {model} --kv-scales {out}")


VERBS = (calibrate,)
