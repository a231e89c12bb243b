"""Seconds to encode, decode, pack and unpack many weights: `python benchmarks/encode.py [format ...]`.

Decoded twice: into fresh memory, as a conversion does, and in runs of rows that are used and dropped, as a linear does.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable

import torch

from fewbit import __version__
from fewbit.kernels.torch_dequant import prepack_linear
from fewbit.quant.formats import FORMATS, get
from fewbit.quant.pack import pack, unpack
from fewbit.quant.qtensor import QTensor, Quantized
from fewbit.quant.reference import decode, encode

LIMITS = {"int4-g128": 4.0, "nvfp4": 8.0}  # seconds to encode 1e8 weights
DEFAULT = (
    "int4-g128",
    "int4-g128-asym",
    "int3-g128",
    "int8-channel",
    "fp8-block",
    "mxfp4",
    "nvfp4",
    "nf4",
    "q4_0",
    "q4_k",
)


def best(work: Callable[[], object], repeat: int) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def in_runs(runs: tuple[QTensor, ...]) -> None:
    for run in runs:
        decode(run)


def row(name: str, w: torch.Tensor, repeat: int) -> tuple[float, str]:
    """-> seconds to encode 1e8 weights, and the line to print."""
    weight = FORMATS[name].weight
    q = encode(w, weight)
    runs = prepack_linear(Quantized(FORMATS[name], q)).runs
    per = 1e8 / w.numel()
    seconds = best(lambda: encode(w, weight), repeat) * per
    fresh, dropped = (best(work, repeat) * per for work in (lambda: decode(q), lambda: in_runs(runs)))
    rates = f"{fresh:8.2f} {0.4 / fresh:8.2f} {dropped:8.2f} {0.4 / dropped:8.2f}"
    return seconds, f"{name:16} {seconds:8.2f} {rates}"


def packing(bits: int, side: int, repeat: int) -> str:
    codes = torch.randint(0, 2**bits, (side, side), dtype=torch.uint8)
    packed = pack(codes, bits)
    per = 1e8 / codes.numel()
    there, back = (best(w, repeat) * per for w in (lambda: pack(codes, bits), lambda: unpack(packed, bits, side)))
    return f"{bits} bits{'':10} {there:8.2f} {back:8.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("formats", nargs="*", default=DEFAULT)
    parser.add_argument("--weights", type=float, default=1e8)
    parser.add_argument("--threads", type=int, default=0, help="0 = as torch chooses")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    for name in args.formats:
        get(name)
    if args.threads:
        torch.set_num_threads(args.threads)
    side = round(args.weights**0.5 / 256) * 256
    w = torch.randn(side, side)
    print(f"command: python {' '.join(sys.argv)}")
    versions = f"fewbit {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{versions}, {torch.get_num_threads()} threads of {platform.processor() or platform.machine()}")
    print(f"{w.numel():.3g} weights {list(w.shape)}, best of {args.repeat}; seconds are for 1e8 weights\n")
    print(f"{'':16} {'encode':>8} {'decode':>8} {'GB/s':>8} {'in runs':>8} {'GB/s':>8}")
    late = 0
    for name in args.formats:
        seconds, line = row(name, w, args.repeat)
        limit = LIMITS.get(name)
        print(line + (f"   limit {limit:g} s" if limit else ""), flush=True)
        late += limit is not None and seconds > limit
    print(f"\n{'':16} {'pack':>8} {'unpack':>8}")
    for bits in (2, 3, 4, 6):
        print(packing(bits, side, args.repeat))
    return late


if __name__ == "__main__":
    sys.exit(main())
