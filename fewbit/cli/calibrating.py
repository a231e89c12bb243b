"""The verb calibrate: what static scales are made of, written beside the weights that they are for."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.cli.quantizing import Calib, Chat, Device, Dtype, Order, Seed
from fewbit.cli.show import Json, Model

Rounded = Annotated[str | None, typer.Option("--fakequant", help=(
    "For serving a float model as if quantized: a preset of ModelOpt, its config (.json, .yaml), a format or a recipe."
))]  # fmt: skip
Cached = Annotated[str | None, typer.Option("--kv-fakequant", help="The same for keys and values.")]
Batch = Annotated[int, typer.Option("--calib-batch-size", min=1, help="Samples run at once.")]


def calibrate(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    fakequant: Rounded = None,
    kv_fakequant: Cached = None,
    calib: Calib = None,
    calib_samples: Annotated[int, typer.Option("--calib-samples", min=1, help="How many samples.")] = 512,
    calib_len: Annotated[int, typer.Option("--calib-len", min=2, help="Tokens in each sample.")] = 512,
    calib_batch_size: Batch = 1,
    seed: Seed = 0,
    chat: Chat = False,
    order: Order = "shuffled",
    device: Device = "cpu",
    dtype: Dtype = None,
    max_shard: Annotated[int, typer.Option(help="Largest shard, in bytes.")] = 5_000_000_000,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that is already in OUTPUT.")] = False,
    as_json: Json = False,
) -> None:
    """Write float weights and, beside them, the magnitudes that serving them with --fakequant and --amax-file takes."""
    from fewbit.compat.fakequant import calibrate as run
    from fewbit.engine.start import progress

    text = {"data": calib, "samples": calib_samples, "length": calib_len, "seed": seed, "chat": chat, "order": order}
    with progress("calibrating") as tell:
        state = run(model, out, fakequant, kv_fakequant, text=text, batch=calib_batch_size, device=device, dtype=dtype,
                    max_shard=max_shard, overwrite=overwrite, tell=tell)  # fmt: skip
    if as_json:
        print(json.dumps(summary(out, state), indent=2))
        return
    print(f"{out}: float weights, and the state of quantizers in {len(state)} tensors (quant_amax.st, quant_amax.pth)")
    print(f"next:   fewbit serve {out} --amax-file {out}")


def summary(out: Path, state: dict[str, Any]) -> dict[str, Any]:
    return {"path": str(out), "state": {name: list(tensor.shape) for name, tensor in state.items()}}


VERBS = (calibrate,)
