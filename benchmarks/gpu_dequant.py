"""Microseconds of one quantized linear by the Triton kernels, in a CUDA graph, beside bf16: under a minute.

    python benchmarks/gpu_dequant.py [--formats q4_k,int4-g128] [--sweep]

Three weights take turns, so none is found in the cache. A cell that fails says so, and the table goes on; GB/s are of
the codes and scales read, at one row. `--sweep` tries other tiles of few rows instead.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fewbit.kernels import triton_linear
from fewbit.kernels.coded import Coded, coded
from fewbit.kernels.triton_linear import Tiling
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import Quantized, empty
from fewbit.quant.spec import Format

SHAPES = ((28672, 4096), (4096, 14336))
ROWS = (1, 16, 64, 256, 4096)
COPIES = 3
DEFAULTS = triton_linear.WAVES, triton_linear.TILES


def drawn(name: str, n: int, k: int) -> Coded:
    """Random codes, scales of one half: how long a product takes does not hang on its values."""
    q = empty(FORMATS[name].weight, (n, k), "cuda")
    for plane in q.planes.values():
        plane.fill_(0.5) if plane.is_floating_point() else plane.random_(0, 256)
    return coded(Quantized(Format(FORMATS[name].weight), q))


def microseconds(runs: list[Callable[[], Tensor]], repeat: int = 20) -> float:
    """The mean time of one of `runs`, all of them captured one after the other; the best of three."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    found = []
    for _ in range(3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        for _ in range(repeat):
            graph.replay()
        stop.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(stop) * 1000 / repeat / len(runs))
    return min(found)


def cell(run: Callable[[Tensor, Any], Tensor], weights: list[Any], m: int, k: int) -> str:
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    try:
        return f"{microseconds([partial(run, x, w) for w in weights], 4 if m > 1000 else 20):.1f}"
    except Exception as error:  # whatever happened, the other cells are still wanted
        print(f"  {m} rows: {type(error).__name__}: {str(error)[:300]}")
        return "failed"


def table(names: list[str]) -> None:
    for n, k in SHAPES:
        print(f"\n({n}, {k})".ljust(24), *(f"M={m}".rjust(8) for m in ROWS), "    GB/s")
        dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(COPIES)]
        line("bf16 F.linear", [cell(linear, dense, m, k) for m in ROWS], 2 * n * k)
        dense.clear()
        for name in names:
            held = [drawn(name, n, k) for _ in range(COPIES)]
            line(name, [cell(triton_linear.run_linear, held, m, k) for m in ROWS], held[0].source.weight.nbytes)


def line(label: str, cells: list[str], nbytes: int) -> None:
    rate = "" if cells[0] == "failed" else f"{nbytes / float(cells[0]) / 1000:9.0f}"
    print(label.ljust(23), *(each.rjust(8) for each in cells), rate, flush=True)


def sweep(names: list[str]) -> None:
    """Other tiles for few rows; and where many rows overtake them."""
    columns = ((64, 128, 4), (64, 64, 4), (64, 256, 4), (128, 128, 8))
    few = partial(triton_linear.few, bias=None)
    for name, (n, k) in product(names, SHAPES):
        held = [drawn(name, n, k) for _ in range(COPIES)]
        for m in (64, 128, 256):
            both = [cell(partial(run, bias=None), held, m, k) for run in (triton_linear.few, triton_linear.many)]
            print(f"{name} ({n}, {k}) M={m} few {both[0]} many {both[1]}", flush=True)
        for m, waves, shape, stages in product((16, 64), (2, 4, 8), columns, (2, 3)):
            triton_linear.WAVES, triton_linear.TILES = waves, (Tiling(m, *shape, stages),)
            triton_linear.cut.cache_clear()
            print(f"{name} ({n}, {k}) M={m} {shape} stages {stages} waves {waves}: {cell(few, held, m, k)}", flush=True)
        triton_linear.WAVES, triton_linear.TILES = DEFAULTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", default="q4_k,q6_k,q8_0,int4-g128,nf4")
    parser.add_argument("--sweep", action="store_true", help="minutes, most of them compiling")
    asked = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    with torch.inference_mode():
        (sweep if asked.sweep else table)(asked.formats.split(","))


if __name__ == "__main__":
    main()
