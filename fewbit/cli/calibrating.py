"""The verb calibrate: what static scales are made of, written beside the weights that they are for."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.cli.quantizing import Calib, Chat, Device, Dtype, Memory, Order, Seed, nbytes
from fewbit.cli.show import Json, Model, Trust, table, trusting

Rounded = Annotated[str | None, typer.Option("--fakequant", help=(
    "For serving a float model as if quantized: a preset of ModelOpt, its config (.json, .yaml), a format or a recipe."
))]  # fmt: skip
Cached = Annotated[str | None, typer.Option("--kv-fakequant", help="The same for keys and values.")]
Kv = Annotated[str | None, typer.Option("--kv", help=(
    "Measure scales of a KV cache into the file OUTPUT: fp8, fp8_inc, int8 ...; with -head, by head."))]  # fmt: skip
Inc = Annotated[Path | None, typer.Option("--inc", metavar="CONFIG", help=(
    "Measure as Intel Neural Compressor does: its JSON, of mode MEASURE, says what and where files go."))]  # fmt: skip
Ranks = Annotated[int, typer.Option("--tensor-parallel-size", "-tp", min=1, help=(
    "Ranks that measure, with --inc; what else is calibrated is the same for any number."))]  # fmt: skip
Tokens = Annotated[
    int | None, typer.Option("--tokens", min=1, help="Generated after each sample, with --inc; left out: 1.")
]
Batch = Annotated[int, typer.Option("--calib-batch-size", min=1, help="Samples run at once.")]


def calibrate(
    model: Model,
    out: Annotated[Path | None, typer.Option("-o", "--output", help="The folder or file to write.")] = None,
    kv: Kv = None,
    inc: Inc = None,
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
    max_memory: Memory = None,
    max_shard: Annotated[int, typer.Option(help="Largest shard, in bytes.")] = 5_000_000_000,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that is already in OUTPUT.")] = False,
    tensor_parallel_size: Ranks = 1,
    trust_remote_code: Trust = False,
    tokens: Tokens = None,
    as_json: Json = False,
) -> None:
    """Write float weights and, beside them, the magnitudes that serving them with --fakequant and --amax-file takes.

    With --kv nothing but a file of scales is written, for serve --kv-scales; with --inc nothing but measurement files,
    for --quantization inc: ranks measure, and are unified.
    """
    batch = None if calib_batch_size == 1 else calib_batch_size
    text = {"samples": calib_samples, "length": calib_len, "seed": seed, "chat": chat, "order": order}
    if kv is not None:
        others = {"--inc": inc, "--fakequant": fakequant, "--kv-fakequant": kv_fakequant, "--calib-batch-size": batch,
                  "--tokens": tokens}  # fmt: skip
        measure_cache(model, kv, out, others, as_json, tensor_parallel_size, calib=calib, device=device, dtype=dtype,
                      max_memory=nbytes(max_memory), overwrite=overwrite, trust_remote_code=trust_remote_code,
                      **text)  # fmt: skip
        return
    if inc is not None:
        others = {"--output": out, "--fakequant": fakequant, "--kv-fakequant": kv_fakequant, "--max-memory": max_memory,
                  "--calib-batch-size": batch}  # fmt: skip
        measure(model, inc, others, as_json, calib=calib, tokens=tokens or 1, tensor_parallel_size=tensor_parallel_size,
                device=device, dtype=dtype or "auto", trust_remote_code=trust_remote_code, **text)  # fmt: skip
        return
    from fewbit.compat.fakequant import calibrate as run
    from fewbit.engine.start import progress
    from fewbit.errors import RequestError

    if out is None:
        raise RequestError("calibrate: --output says where float weights and their magnitudes go; --kv FORMAT measures "
                           "scales of a KV cache instead, --inc CONFIG for --quantization inc")  # fmt: skip
    alone("--kv-fakequant" if fakequant is None and kv_fakequant is not None else "--fakequant",
          {"--tokens": tokens, "--max-memory": max_memory})  # fmt: skip
    text |= {"data": calib}
    with progress("calibrating") as tell:
        state = run(model, out, fakequant, kv_fakequant, text=text, batch=calib_batch_size, device=device, dtype=dtype,
                    max_shard=max_shard, overwrite=overwrite, trust_remote_code=trust_remote_code,
                    tell=tell)  # fmt: skip
    if as_json:
        print(json.dumps(summary(out, state), indent=2))
        return
    print(f"{out}: float weights, and the state of quantizers in {len(state)} tensors (quant_amax.st, quant_amax.pth)")
    whole(tensor_parallel_size)
    print(f"next:   fewbit serve {out} --amax-file {out}{trusting(trust_remote_code)}")


def measure_cache(model: str, kv: str, out: Path | None, others: dict[str, Any], as_json: bool, ranks: int,
                  **options: Any) -> None:  # fmt: skip
    """others: flags that say something else than --kv."""
    from fewbit.engine.start import progress
    from fewbit.errors import RequestError
    from fewbit.workflows.calibrate_kv import calibrate_kv

    alone("--kv", others)
    if out is None:
        raise RequestError("calibrate: --output says where the scales go: scales.safetensors")
    with progress("measuring") as tell:
        found = calibrate_kv(model, out, kv, **options, tell=tell)
    if as_json:
        print(json.dumps(found.to_json(), indent=2, default=str))
        return
    rows = [(name, f"{k:.6g}", f"{v:.6g}") for name, (k, v) in found.modules.items()]
    table(f"{found.format} on {found.tokens} tokens", ["attention", "scale of keys", "scale of values"], rows)
    whole(ranks)
    print(f"next:   fewbit serve {model} --kv-scales {out}{trusting(options['trust_remote_code'])}")


def whole(ranks: int) -> None:
    """What --tensor-parallel-size came to, where no ranks measure."""
    if ranks > 1:
        print(f"the values are of the whole model: the same for {ranks} ranks as for one, and each cuts what it holds")


def alone(flag: str, others: dict[str, Any]) -> None:
    from fewbit.errors import RequestError

    if given := [name for name, value in others.items() if value is not None]:
        raise RequestError(f"calibrate: {flag} and {given[0]} belong to two kinds of calibration; give one of them")


def measure(model: str, config: Path, others: dict[str, Any], as_json: bool, **options: Any) -> None:
    """others: flags that say something else than --inc."""
    from dataclasses import asdict

    from fewbit.compat.inc import calibrate as run

    alone("--inc", others)
    done = run(model, config, **options)
    if as_json:
        print(json.dumps(asdict(done) | {"written": [str(path) for path in done.written]}, indent=2))
        return
    print(f"{done.nodes} nodes measured on {done.samples} samples, {done.tokens} tokens of {done.source}")
    print(*done.written, sep="\n")
    print("next:   export QUANT_CONFIG=FILE, a config of mode QUANTIZE with the same dump_stats_path\n"
          f"        fewbit serve {model} --quantization inc --kv-cache-dtype fp8_inc"
          f"{trusting(options['trust_remote_code'])}")  # fmt: skip


def summary(out: Path, state: dict[str, Any]) -> dict[str, Any]:
    return {"path": str(out), "state": {name: list(tensor.shape) for name, tensor in state.items()}}


VERBS = (calibrate,)
