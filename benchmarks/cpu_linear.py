"""Linears on a CPU: ours beside torch's packed products and auto-round-lib's (where it is installed), in one process.

    python benchmarks/cpu_linear.py [--shape 5632,2048] [--rows 1,8,64,512] [--threads 2] [--rounds 9]

Microseconds a call, the best of some rounds; copies of the weight are cycled so that none is in a core's cache.
`cdt`: what auto-round-lib computes in; its "int8" rounds inputs, as our "fast" does. It takes float32 inputs.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import linear

from fewbit.kernels import packed
from fewbit.quant import elements
from fewbit.quant.formats import FORMATS, TOKEN_INT8
from fewbit.quant.qtensor import QTensor, Quantized
from fewbit.quant.qtensor import codes as codes_of
from fewbit.quant.reference import encode, scale_values

HELD = 200 << 20  # bytes of copies
LOOP = 5
Call = Callable[[Tensor, int], Tensor]


def ours(form: str, weight: Tensor, copies: int, fast: bool) -> Call:
    format = replace(FORMATS[form], act=TOKEN_INT8) if fast else FORMATS[form]
    q = encode(weight, format.weight)
    each = [QTensor(q.spec, q.shape, {n: p.clone() for n, p in q.planes.items()}) for _ in range(copies)]
    held = [packed.prepack_linear(Quantized(format, one)) for one in each]
    return lambda x, i: packed.run_linear(x, held[i])


def whole(q: QTensor) -> Tensor:
    """The numbers that codes stand for, int8."""
    return elements.decode(codes_of(q), q.spec.element).to(torch.int8)


def torchs(form: str, weight: Tensor, copies: int) -> Call:
    """torch's own for these two formats."""
    q = encode(weight, FORMATS[form].weight)
    values, scales = whole(q), scale_values(q)
    if form == "int8-channel":
        held = [values.clone() for _ in range(copies)]
        factor = scales.flatten().bfloat16()
        return lambda x, i: torch._weight_int8pack_mm(x, held[i], factor)
    nibbles = torch._convert_weight_to_int4pack_for_cpu(values.int() + 8, 1)
    held = [nibbles.clone() for _ in range(copies)]
    pairs = torch.stack([scales.T, torch.zeros_like(scales.T)], -1).bfloat16().contiguous()
    return lambda x, i: torch._weight_int4pack_mm_for_cpu(x, held[i], 128, pairs)


def arks(form: str, weight: Tensor, copies: int, compute: str) -> Call:
    import auto_round_kernel as ark

    q = encode(weight, FORMATS[form].weight)
    n, k = weight.shape
    bits, group = ("int4", 128) if form == "int4-g128" else ("int8", k)
    values = whole(q)
    told = (group, compute, bits, "fp32", False)
    blob = ark.repack_quantized_weight(values.T.contiguous(), scale_values(q).T.contiguous(),
                                       torch.empty(0, dtype=torch.int8), *told)  # fmt: skip
    held, none = [blob.clone() for _ in range(copies)], torch.empty(0)
    return lambda x, i: ark.woqgemm(x, held[i], none, n, k, *told)


def calls(weight: Tensor) -> Iterator[tuple[str, torch.dtype, int, Callable[[], Call]]]:
    """Label, type of the input, copies, what makes it."""
    bf16 = torch.bfloat16
    dense = HELD // (weight.numel() * 2) + 1

    def plain() -> Call:
        held = [weight.bfloat16().clone() for _ in range(dense)]
        return lambda x, i: linear(x, held[i])

    yield "bf16 torch", bf16, dense, plain
    for form, bits in (("int4-g128", 4), ("int8-channel", 8)):
        copies = HELD * 8 // (weight.numel() * bits) + 1
        yield f"{form} ours", bf16, copies, partial(ours, form, weight, copies, False)
        yield f"{form} ours, fast", bf16, copies, partial(ours, form, weight, copies, True)
        yield f"{form} torch", bf16, copies, partial(torchs, form, weight, copies)
        for compute in ("fp32", "bf16", "int8"):
            yield (
                f"{form} auto-round-lib {compute}",
                torch.float32,
                copies,
                partial(arks, form, weight, copies, compute),
            )


def measure(call: Call, x: Tensor, counter: Iterator[int]) -> float:
    begun = time.perf_counter()
    for _ in range(LOOP):
        call(x, next(counter))
    return (time.perf_counter() - begun) / LOOP * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="5632,2048")
    parser.add_argument("--rows", default="1,8,64,512")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    n, k = map(int, given.shape.split(","))
    counts = [int(word) for word in given.rows.split(",")]
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * k**-0.5
    print("\t".join(["", *map(str, counts), "error"]))
    for label, dtype, copies, make in calls(weight):
        try:
            call = make()
            x = torch.randn(max(counts), k, generator=torch.Generator().manual_seed(1)).to(dtype)
            want = x[:8].float() @ weight.T
            error = float((call(x[:8], 0).float() - want).norm() / want.norm())
            found = {m: min(measure(call, x[:m], cycle(range(copies))) for _ in range(given.rounds)) for m in counts}
            print("\t".join([label, *(f"{us:.0f}" for us in found.values()), f"{error:.4f}"]), flush=True)
        except Exception as problem:  # a peer that is not here, or does not take it
            print(f"{label}\t{type(problem).__name__}: {str(problem).splitlines()[0]}", flush=True)


if __name__ == "__main__":
    main()
