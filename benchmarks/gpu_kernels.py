"""Microseconds of one linear on a GPU, by kernel and format: replays of CUDA graphs over weights beyond the L2.

    python benchmarks/gpu_kernels.py [--quick] [--only fp8-channel,int4-g128] [--shapes 6144x4096]

Rows of the table are kernel, format and shape; a cell that failed says why below it. Inputs are bfloat16, so roundings
of the input are inside, but for rows marked `+`: there x comes with its codes, and scales that would take a launch are
left to the reader, as in a fused step. `mm` is torch._scaled_mm alone, `rowwise` the same with scales of rows, which
`scaled` does without. `floor` is what an H200 takes to move the bytes or to multiply, whichever is longer.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from fewbit.kernels import humming_linear
from fewbit.kernels.input_rounding import Rounding, Wanted, offer, rounding
from fewbit.kernels.registry import Kernel, kernels
from fewbit.quant.elements import BF16
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import Quantized, empty
from fewbit.quant.spec import Format

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
ROWS = (1, 16, 64, 256, 4096)
NAMES = ("fp8-tensor", "fp8-channel", "fp8-tensor-static", "fp8-block", "int4-g128", "int4-g128-bf16", "nvfp4-a16",
         "mxfp4-a16", "int8-channel-a8", "int4-g128-a8fp8", "mxfp8", "q4_k", "q5_k", "q6_k", "q8_0")  # fmt: skip
QUICK = ("fp8-tensor", "fp8-channel", "int4-g128-bf16", "nvfp4-a16", "int4-g128-a8fp8")
BYTES, PRODUCTS = 4.26e6, {16: 787e6, 8: 1480e6}  # of a microsecond; by bits of x
BEYOND = 160 << 20  # bytes of weights that a replay walks through
CUDA = torch.device("cuda")
Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A way to multiply: several copies of one weight, each a function of x."""

    kernel: str
    format: str
    make: Callable[[], Call]
    nbytes: int
    how: Rounding | None = None  # in which x has been rounded by its maker


def form_of(name: str) -> Format:
    """A row of FORMATS; `-bf16` beside it stores the scales in bfloat16."""
    form = FORMATS[name.removesuffix("-bf16")]
    if not name.endswith("-bf16"):
        return form
    scales = tuple(replace(scale, element=BF16) for scale in form.weight.scales)
    return replace(form, weight=replace(form.weight, scales=scales))


def weight(name: str, n: int, k: int) -> Quantized:
    """Random codes, which are no slower or faster than real ones; scales near what a model has."""
    form = form_of(name)
    w = empty(form.weight, (n, k), CUDA)
    for plane, held in w.planes.items():
        if held.dtype == torch.uint8:
            held.random_(0, 120) if plane.startswith("scale") else held.random_(0, 256)
        else:
            held.fill_(0.01)
    if form.weight.element.name.startswith("e4m3"):
        w.planes["codes"].random_(0, 120)  # no NaN
    act = {"scale0": torch.full((1, 1), 0.01, device=CUDA)} if form.act and not form.act.dynamic else {}
    return Quantized(form, w, act)


def packed(kernel: Kernel, name: str, n: int, k: int, fused: bool = False) -> Call:
    q = weight(name, n, k)
    held = kernel.prepacked(q, torch.bfloat16)
    if held is None:
        raise ValueError("left to the next kernel")
    if not fused:
        return lambda x: kernel.run(x, held, None)
    assert kernel.unscaled
    unscaled = kernel.unscaled
    return lambda x: unscaled(x, held)[0]


def dense(n: int, k: int) -> Call:
    w = torch.randn(n, k, dtype=torch.bfloat16, device=CUDA)
    return lambda x: linear(x, w)


def scaled_mm(n: int, k: int, by_rows: bool) -> Call:
    from fewbit.kernels.triton_quantize import input_codes

    q, how = weight("fp8-channel", n, k), by_row("fp8-channel")
    assert how
    codes, scale = q.weight.planes["codes"].view(torch.float8_e4m3fn).t(), q.weight.planes["scale0"].view(1, n)
    one = torch.ones(1, device=CUDA)

    def run(x: Tensor) -> Tensor:
        small, own = input_codes(x, how)
        return torch._scaled_mm(small, codes, *((own, scale) if by_rows else (one, one)), out_dtype=x.dtype)

    return run


def by_row(name: str) -> Rounding | None:
    """How x is rounded, where its maker can do that."""
    how = rounding(form_of(name).act) if form_of(name).act else None
    return how if isinstance(how, Rounding) and not how.columns and not how.given else None


def handed(m: int, k: int, how: Rounding | None) -> Tensor:
    from fewbit.kernels.triton_quantize import quantize_rows

    x = torch.randn(m, k, dtype=torch.bfloat16, device=CUDA)
    return offer(x, Wanted(how), quantize_rows(x, how)) if how else x


def all_cases(names: tuple[str, ...], n: int, k: int) -> Iterator[Case]:
    yield Case("cublas", "bf16", partial(dense, n, k), 2 * n * k)
    yield Case("rowwise", "fp8-channel", partial(scaled_mm, n, k, True), n * k)
    yield Case("mm+", "fp8-channel", partial(scaled_mm, n, k, False), n * k, by_row("fp8-channel"))
    for name in names:
        form = form_of(name)
        for kernel in kernels():
            if kernel.op != "linear" or "cuda" not in kernel.devices or kernel.asked:
                continue
            if kernel.refusal(form, CUDA, torch.bfloat16) is None:
                bits = empty(form.weight, (n, k), "meta").nbytes
                yield Case(kernel.name, name, partial(packed, kernel, name, n, k), bits)
                if kernel.unscaled and (how := by_row(name)):
                    yield Case(kernel.name + "+", name, partial(packed, kernel, name, n, k, True), bits, how)


def floor(case: Case, n: int, k: int, m: int) -> float:
    """Microseconds."""
    act = form_of(case.format).act if case.format in FORMATS else None
    bits = 8 if act is not None and act.element.bits <= 8 else 16
    return max((case.nbytes + 2 * m * (n + k)) / BYTES, 2 * m * n * k / PRODUCTS[bits])


def measured(calls: list[Call], x: Tensor, seconds: float) -> float:
    """-> microseconds of a call: the median of replays of one graph that makes all calls in turn."""
    for call in calls[:2]:
        call(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call(x)
    times, stop = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < stop:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        graph.replay()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]) * 1000 / len(calls))
    return sorted(times)[len(times) // 2]


def prepacked(case: Case) -> tuple[list[Call], float]:
    """-> copies of the weight in the kernel's layout, and milliseconds of the second one: the first compiles."""
    calls, took = [], 0.0
    for i in range(max(2, min(48, -(-BEYOND // case.nbytes)))):
        torch.cuda.synchronize()
        start = time.perf_counter()
        calls.append(case.make())
        torch.cuda.synchronize()
        took = (time.perf_counter() - start) * 1000 if i == 1 else took
    return calls, took


def row(case: Case, k: int, rows: tuple[int, ...], seconds: float) -> tuple[list[str], list[str]]:
    """-> cells, and what failed."""
    cells: list[str] = []
    try:
        calls, took = prepacked(case)
    except Exception as error:
        return ["-"] * (len(rows) + 2), [f"prepack: {told(error)}"]
    failed, start = [], time.perf_counter()
    for m in rows:
        x = handed(m, k, case.how)
        try:
            cells.append(f"{measured(calls, x, seconds):.1f}")
        except Exception as error:
            cells.append("-")
            failed.append(f"M={m}: {told(error)}")
    return [*cells, f"{took:.1f}", f"{time.perf_counter() - start:.1f}"], failed


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def show(cells: Sequence[object], widths: Sequence[int]) -> None:
    print("  ".join(str(text).rjust(w) for text, w in zip(cells, widths, strict=True)), flush=True)


def table(names: tuple[str, ...], shapes: tuple[tuple[int, int], ...], rows: tuple[int, ...], seconds: float) -> None:
    head = ["kernel", "format", "N", "K", *(f"M={m}" for m in rows), "prepack ms", "s"]
    widths = [16, 18, 6, 6, *[8] * len(rows), 10, 6]
    show(head, widths)
    for n, k in shapes:
        seen: set[str] = set()
        for case in all_cases(names, n, k):
            if case.format not in seen:
                least = [f"{floor(case, n, k, m):.1f}" for m in rows]
                show(["floor", case.format, n, k, *least, "", ""], widths)
                seen.add(case.format)
            cells, failed = row(case, k, rows, seconds)
            show([case.kernel, case.format, n, k, *cells], widths)
            for reason in failed:
                print(f"    {reason}", flush=True)
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes, few formats: under a minute where compiled")
    parser.add_argument("--only", default="", help="formats, with commas between")
    parser.add_argument("--shapes", default="", help="NxK, with commas between")
    given = parser.parse_args()
    names = tuple(given.only.split(",")) if given.only else QUICK if given.quick else NAMES
    shapes = SHAPES[2:] if given.quick else SHAPES
    if given.shapes:
        shapes = tuple((int(n), int(k)) for n, k in (shape.split("x") for shape in given.shapes.split(",")))
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}, microseconds")
    humming_linear.ROWS = (1, 16, 256) if given.quick else ROWS
    table(names, shapes, humming_linear.ROWS, 0.02 if given.quick else 0.1)


if __name__ == "__main__":
    main()
