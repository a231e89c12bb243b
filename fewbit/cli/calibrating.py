"""The verb calibrate: run text through a model and write down what quantization needs to know of its activations."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.cli.quantizing import Calib, Seed
from fewbit.cli.show import Json, Model


def calibrate(
    model: Model,
    inc: Annotated[Path, typer.Option("--inc", metavar="CONFIG", help=(
        "INC's JSON config of mode MEASURE: what is measured, and where the files go."))],
    calib: Calib = None,
    calib_samples: Annotated[int, typer.Option("--calib-samples", help="How many samples.")] = 32,
    calib_len: Annotated[int, typer.Option("--calib-len", help="Tokens in each sample.")] = 512,
    seed: Seed = 0,
    tokens: Annotated[int, typer.Option("--tokens", help="Generated after each sample.")] = 1,
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", "-tp", help="Ranks.")] = 1,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda ...")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run its own code.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure a model as Intel Neural Compressor does, on any number of ranks, and unify what they saw."""
    from fewbit.compat.inc import calibrate as run

    more: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    done = run(model, inc, calib=calib, samples=calib_samples, length=calib_len, seed=seed, tokens=tokens,
               tensor_parallel_size=tensor_parallel_size, **more)  # fmt: skip
    if as_json:
        print(json.dumps(asdict(done) | {"written": [str(path) for path in done.written]}, indent=2))
        return
    print(f"{done.nodes} nodes measured on {done.samples} samples, {done.tokens} tokens of {done.source}")
    for path in done.written:
        print(path)
    print(f"next:   QUANT_CONFIG=<a config of mode QUANTIZE with the same dump_stats_path> fewbit serve {model} "
          "--quantization inc --kv-cache-dtype fp8_inc")  # fmt: skip


VERBS = (calibrate,)
