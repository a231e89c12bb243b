"""Linears of GPU kernels against float64, over the formats they take; in CUDA graphs; and the memory they leave free.

humming compiles for seconds: here only the tiles of the numbers of rows that are asked for. `-n 8` spreads the cases;
`-m "gpu and slow"` runs the formats that differ from others only in width or group.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbit.errors import UnsupportedError
from fewbit.kernels import humming_linear, scaled_linear
from fewbit.kernels.humming_layout import Layout, layout
from fewbit.kernels.registry import Kernel, kernels
from fewbit.modules.linear import Linear, Options
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import QTensor, Quantized, Transform
from fewbit.quant.reference import decode, encode, fake_quant
from fewbit.quant.spec import Format
from fewbit.workflows.certify import shifts

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("default"),  # those of humming and its compiler are not ours
]  # fmt: skip
CUDA, ROWS, ALL_ROWS = torch.device("cuda"), (1, 17, 300), (1, 3, 16, 17, 64, 300)
KEY = ("fp8-tensor", "fp8-channel", "fp8-tensor-static", "fp8-block", "int4-g128", "int4-g128-a8fp8", "int8-channel-a8",
       "nvfp4-a16", "mxfp4-a16", "int4-g64-asym")  # fmt: skip
COMMON = {*KEY, "int8-channel", "int8-channel-asym", "int8-g64", "int8-g64-asym", "int7-g64", "int6-g64-asym",
          "int5-g64", "int4-channel", "int4-tensor", "int4-tensor-asym", "int4-g32", "int3-g64", "int3-g64-asym",
          "int2-g64", "int2-channel-asym", "fp8-tensor-a16", "fp8-channel-a16", "fp8-block-a16", "fp8-1x128",
          "fp8-e5m2-tensor", "mxfp8", "mxfp8-a16", "mxfp6-e3m2-a16", "mxfp6-e2m3-a16", "mxint8", "mxint8-a16",
          "int8-tensor-a8", "q8_0", "q4_0", "q4_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"}  # fmt: skip
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def cases() -> Iterator[Any]:
    for name, form in FORMATS.items():
        for rounded in (False, True):
            if isinstance(layout(form, torch.bfloat16, rounded), Layout):
                kernel = "humming-rounded" if rounded else "humming"
                yield pytest.param(kernel, name, marks=() if name in COMMON else pytest.mark.slow)
                break
        if scaled_linear.supports(form, CUDA, torch.bfloat16) is None:
            yield ("scaled", name)


KEY_CASES = [("scaled", n) for n in KEY[:3]] + [
    ("humming-rounded" if n in ("int4-g128", "int4-g64-asym") else "humming", n) for n in KEY
]  # fmt: skip


@pytest.fixture(autouse=True)
def few_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(humming_linear, "ROWS", ALL_ROWS if "odd_sizes" in request.node.name else ROWS)


def kernel_of(name: str) -> Kernel:
    return next(k for k in kernels() if k.name == name and k.op == "linear")


def group_of(form: Format) -> int:
    return max((scale.block[1] for scale in form.weight.scales), default=0)


def weight(name: str, n: int, k: int) -> Quantized:
    """Rows of different size, an input scale where the format stores one."""
    generator = torch.Generator().manual_seed(len(name))
    values = torch.randn(n, k, generator=generator) / k**0.5 * (0.3 + torch.rand(n, 1, generator=generator))
    form = FORMATS[name]
    act = {"scale0": torch.full((1, 1), 4.0 / 448, device=CUDA)} if form.act and not form.act.dynamic else {}
    return Quantized(form, encode(values, form.weight).to(CUDA), act)


def inputs(rows: int, k: int, dtype: torch.dtype) -> Tensor:
    """With columns that stand out and, where there are several rows, one of zeros."""
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows))
    x[:, :: k // 8] *= 6
    if rows > 2:
        x[1] = 0
    return x.to(CUDA, dtype)


def held(kernel: Kernel, q: Quantized, dtype: torch.dtype) -> Any:
    reason = kernel.refusal(q.format, CUDA, dtype)
    if reason:
        pytest.skip(reason)
    packed = kernel.prepacked(q, dtype)
    assert packed is not None, "left to the next kernel"
    return packed


def reach(w: QTensor) -> Tensor:
    """How large values are, and what zeros between codes take from them: both are rounded."""
    return (decode(w).abs() + shifts(w)).double()


def check(kernel: Kernel, q: Quantized, rows: int, dtype: torch.dtype, packed: Any, bias: Tensor | None = None) -> None:
    n, k = q.weight.shape
    x = inputs(rows, k, dtype)
    del_me = torch.full((rows, n), torch.nan, dtype=dtype, device=CUDA)
    del del_me  # what the kernel does not write is likely to be this
    got = kernel.run(x, packed, bias).double()
    rounded = fake_quant(x.float(), q.format.act, q.act) if q.format.act else x
    w = decode(q.weight).double()
    want, spread = rounded.double() @ w.T, (rounded.double().square() @ w.square().T).sqrt()
    want = want if bias is None else want + bias.double()
    unit = UNIT[dtype]
    # the result is rounded up to three times (sum, scale of the row, bias); parts of a sum that several blocks share,
    # and 16-bit weights, scales and zeros, once each: as large as sums of so many products are
    by = spread if kernel.name != "humming-rounded" else (rounded.double().square() @ reach(q.weight).square().T).sqrt()
    bound = 3 * unit * (want.abs() + (0 if bias is None else bias.double().abs())) + 4 * unit * by
    assert got.shape == want.shape
    assert bool(got.isfinite().all()), f"{rows} rows: {int((~got.isfinite()).sum())} values are not finite"
    worst = float(((got - want).abs() / bound.clamp(min=1e-6)).max())
    apart = float((got - want).norm() / want.norm().clamp(min=1e-9))
    allowed = 1.6 * unit * float(by.norm() / spread.norm().clamp(min=1e-9))
    assert worst <= 1 and apart < allowed, f"{rows} rows: {worst:.3g} of the bound, relative error {apart:.3g}"


@pytest.mark.parametrize(("kernel", "name"), list(cases()))
def test_equals_the_oracle(kernel: str, name: str) -> None:
    chosen, q = kernel_of(kernel), weight(name, 256, 512)
    packed = held(chosen, q, torch.bfloat16)
    for rows in ROWS:
        check(chosen, q, rows, torch.bfloat16, packed)


@pytest.mark.parametrize(("kernel", "name"), KEY_CASES)
def test_odd_sizes_rows_and_bias(kernel: str, name: str) -> None:
    """200 rows and a width of no whole tile."""
    k = {128: 640, 64: 576}.get(group_of(FORMATS[name]), 544)
    n = 208 if kernel == "scaled" else 200
    chosen, q = kernel_of(kernel), weight(name, n, k)
    packed = held(chosen, q, torch.bfloat16)
    bias = torch.randn(n, device=CUDA).bfloat16()
    for rows in ALL_ROWS:
        check(chosen, q, rows, torch.bfloat16, packed, bias)


@pytest.mark.parametrize("name", ["int4-g128", "int8-channel", "int8-channel-a8", "fp8-channel", "nvfp4-a16",
                                  "mxfp4-a16", "int4-tensor-asym"])  # fmt: skip
def test_float16(name: str) -> None:
    chosen, q = kernel_of("humming"), weight(name, 256, 512)
    packed = held(chosen, q, torch.float16)
    for rows in ROWS:
        check(chosen, q, rows, torch.float16, packed)


@pytest.mark.parametrize(("kernel", "name"), KEY_CASES)
def test_in_a_cuda_graph(kernel: str, name: str) -> None:
    chosen, q = kernel_of(kernel), weight(name, 256, 512)
    packed = held(chosen, q, torch.bfloat16)
    x, other = inputs(17, 512, torch.bfloat16), inputs(17, 512, torch.bfloat16) * 0.5
    want = [chosen.run(each, packed, None) for each in (x, other)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chosen.run(x, packed, None)
    for each, wanted in zip((x.clone(), other), want, strict=True):
        x.copy_(each)
        got.fill_(torch.nan)
        graph.replay()
        assert torch.allclose(got, wanted, rtol=2.0**-7, atol=1e-3)


def test_transforms() -> None:
    q = weight("int4-g128-a8fp8", 256, 512)
    index = torch.randperm(512, device=CUDA)
    a, b = torch.randn(4, 512, device=CUDA) / 32, torch.randn(256, 4, device=CUDA) / 8
    moved = replace(q, transforms=(Transform("permute", {"index": index}), Transform("low_rank", {"a": a, "b": b})))
    chosen = kernel_of("humming")
    x = inputs(17, 512, torch.bfloat16)
    plain = chosen.run(x[:, index].contiguous(), held(chosen, q, torch.bfloat16), None)
    got = chosen.run(x, held(chosen, moved, torch.bfloat16), None)
    want = plain.float() + (x[:, index].float() @ a.T) @ b.T
    assert float((got.float() - want).norm() / want.norm()) < 0.01


def test_one_copy_in_memory() -> None:
    torch.cuda.empty_cache()
    host = Linear.of(nn.Linear(4096, 4096, bias=False, device="meta"))
    before = torch.cuda.memory_allocated()
    q = weight("int4-g128", 4096, 4096)
    stored = q.weight.nbytes
    host.bind((q,), Options(dtype=torch.bfloat16))
    del q
    assert host.parts[0].kernel.owns
    assert torch.cuda.memory_allocated() - before < 1.05 * stored
    with pytest.raises(UnsupportedError, match="own layout"):
        _ = host.weight
    with pytest.raises(UnsupportedError, match="cpu"):
        host.to("cpu")
    assert host.to("cuda").parts
