"""A random model of Llama-3.1-8B's shape, quantized on a GPU from disk to disk: seconds of each way, and of its phases.

    PYTHONPATH=. python benchmarks/gpu_ptq.py FOLDER [--ways gptq,rtn] [--layers 32] [--samples 128] [--length 2048]

FOLDER needs room for 16 GB of bf16 and what is written from it. The model is made there once. Prints first what the
disk gives without us; then a line for each way, and under it the seconds of its phases over all threads.
"""

import argparse
import shutil
import time
from pathlib import Path

import torch
from phases import disk_speed, measured
from random_llama import make

from fewbit.workflows.quantize import quantize

WAYS = {"gptq": ("W4A16", "gptq"), "rtn": ("W4A16", "rtn"), "fp8": ("FP8_DYNAMIC", "rtn"), "nvfp4": ("NVFP4A16", "rtn"),
        "awq": ("W4A16", "awq"), "hqq": ("W4A16", "hqq")}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ways", default="rtn,fp8,nvfp4,gptq")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    begun = time.monotonic()
    model = make(given.folder / "model", "8b", given.layers, given.device)
    print(f"model made in {time.monotonic() - begun:.0f} s", flush=True)
    files = sorted(model.glob("*.safetensors"))
    size = sum(p.stat().st_size for p in files)
    print(f"disk: {disk_speed(given.folder, files[0])}", flush=True)
    ids = torch.randint(0, 128000, (given.samples, given.length), generator=torch.Generator().manual_seed(1))
    for way in given.ways.split(","):
        form, algo = WAYS[way]
        out = given.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        try:
            with measured() as clock:
                done = quantize(model, out, form, algo=algo, calib=list(ids), samples=given.samples,
                                length=given.length, device=given.device, report=False)  # fmt: skip
        except Exception as error:
            print(f"{way}\t{type(error).__name__}: {error}", flush=True)
            continue
        written = sum(p.stat().st_size for p in out.glob("*.safetensors"))
        device = torch.cuda.max_memory_allocated() / 2**30 if given.device == "cuda" else 0
        print(f"{way}\t{form} by {algo}\t{done.seconds:.1f} s\t{size / done.seconds / 1e9:.2f} GB/s read\t"
              f"{written / 1e9:.2f} GB written\thost peak {done.memory / 2**30:.2f} GiB\tdevice peak {device:.2f} GiB"
              f"\n\t{clock}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
