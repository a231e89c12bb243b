"""Products of up to 16 rows by few.cu against float64: every type, count of rows and layout, in any company."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewbit.kernels import few, humming_linear
from fewbit.kernels.dense import dense_linear
from fewbit.kernels.humming_layout import Layout, layout
from fewbit.quant.elements import BF16, F16
from fewbit.quant.formats import FORMATS
from fewbit.quant.join import join
from fewbit.quant.qtensor import Quantized
from fewbit.quant.reference import decode, encode
from tests.kernels.test_humming_weight import read_back

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("default"),  # those of humming and its compiler are not ours
]  # fmt: skip
CUDA = torch.device("cuda")
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(autouse=True)
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    if why := few.lacking(torch.device("cuda", 0)):
        pytest.skip(why)
    monkeypatch.setattr(humming_linear, "ROWS", (1, 24))


def near(y: Tensor, x: Tensor, w: Tensor, want: Tensor, scale: float = 1.0) -> None:
    """One rounding of the result, and sums in float32 in any order (e4m3: 64 columns at a time in fewer bits)."""
    size = x.double().abs() @ w.double().abs().T * scale
    few_bits = 2.0**-12 if x.dtype == torch.float8_e4m3fn else x.shape[1] * 2.0**-24
    assert bool(((y.double() - want).abs() <= UNIT[y.dtype] * want.abs() + few_bits * size).all())


@pytest.mark.parametrize("kind", few.TYPES, ids=str)
@pytest.mark.parametrize("n, k", [(16, 64), (256, 4096 + 64), (4096, 512), (9216, 192)])
def test_rows(kind: torch.dtype, n: int, k: int) -> None:
    out = kind if kind in few.HALVES else torch.bfloat16
    draw = torch.Generator(CUDA).manual_seed(0)
    x, w = (torch.randn(size, k, device=CUDA, generator=draw).to(kind) for size in (16, n))
    scales, columns, bias = (torch.rand(size, device=CUDA, generator=draw) for size in (16, n, n))
    bias = bias.to(out)
    sums = x.double() @ w.double().T
    one = columns[:1].clone()
    for m in (1, 2, 7, 8, 9, 16):
        near(few.rows(x[:m], w, out), x[:m], w, sums[:m])
        y = few.rows(x[:m], w, out, scales[:m].contiguous(), columns, bias)
        want = sums[:m] * scales[:m, None] * columns + bias.double()
        assert bool(((y.double() - want).abs() <= 2.0**-7 * (want.abs() + 1) + 2.0**-12 * sums.abs().max()).all())
        assert torch.equal(y, few.rows(x, w, out, scales, columns, bias)[:m])  # in any company
        near(few.rows(x[:m], w, out, one, one), x[:m], w, sums[:m] * float(one) ** 2, float(one) ** 2)


def test_a_nan_stays_in_its_row() -> None:
    x, w = torch.randn(3, 128, device=CUDA).bfloat16(), torch.randn(32, 128, device=CUDA).bfloat16()
    x[1, 5] = float("nan")
    y = few.rows(x, w, torch.bfloat16)
    assert y.isnan().all(1).tolist() == [False, True, False] and not y[::2].isnan().any()


def test_dense_linear_takes_it() -> None:
    w, bias = torch.randn(4096, 512, device=CUDA).bfloat16(), torch.randn(4096, device=CUDA).bfloat16()
    for m in (1, 8, 9):
        x = torch.randn(1, m, 512, device=CUDA).bfloat16()
        y = dense_linear(x, w, bias)
        want = x[0].double() @ w.double().T + bias.double()
        assert y.shape == (1, m, 4096)
        assert bool(((y[0].double() - want).abs() <= 2.0**-7 * (want.abs() + bias.double().abs() + 1)).all())


@pytest.mark.parametrize("zeros", ["", "-asym"])
@pytest.mark.parametrize("group", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("dtype", few.HALVES, ids=str)
def test_laid(dtype: torch.dtype, group: int, zeros: str) -> None:
    form = FORMATS.get(f"int4-g{group}{zeros}")
    if form is None:
        base = FORMATS[f"int4-g128{zeros}"].weight
        wider = {name: tuple(replace(s, block=(1, group)) for s in getattr(base, name)) for name in ("scales", "zeros")}
        form = replace(FORMATS[f"int4-g128{zeros}"], weight=replace(base, **wider))
    scales = tuple(replace(s, element=BF16 if dtype == torch.bfloat16 else F16) for s in form.weight.scales)
    form = replace(form, weight=replace(form.weight, scales=scales))
    for n, k in ((128, 512), (256, 1024 + 512), (6144, 512), (9216, 512)):
        w = encode(torch.randn(n, k, generator=torch.Generator().manual_seed(n)) * 0.1, form.weight).to(CUDA)
        values = decode(w)
        held = humming_linear.prepack_linear(Quantized(form, w), dtype)
        assert isinstance(held, humming_linear.Held) and held.few and held.few.laid == few.Laid(few.INTEGERS, 4, group)
        x, bias = torch.randn(16, k, device=CUDA).to(dtype), torch.randn(n, device=CUDA).to(dtype)
        for m in (1, 2, 3, 4, 5, 8, 9, 16):
            y = humming_linear.run_linear(x[:m], held)
            near(y, x[:m], values, x[:m].double() @ values.double().T)
            assert torch.equal(y, humming_linear.run_linear(x, held)[:m])
            biased = humming_linear.run_linear(x[:m], held, bias).double()
            want = x[:m].double() @ values.double().T + bias.double()
            assert bool(((biased - want).abs() <= 2 * UNIT[dtype] * (want.abs() + 1)).all())


@pytest.mark.parametrize("name", [
    "int2-g64", "int3-g32", "int4-channel", "int5-g64", "int6-g128", "int6-tensor", "int7-g32", "int8-g128",
    "int8-channel", "q4_0", "q5_0", "q8_0", "q4_1", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k",
])  # fmt: skip
@pytest.mark.parametrize("dtype", few.HALVES, ids=str)
def test_any_width(name: str, dtype: torch.dtype) -> None:
    """Of the numbers that are there, which may be rounded ones; some groups are a zero alone."""
    form = FORMATS[name]
    how = layout(form, dtype, True)
    assert isinstance(how, Layout)
    for n, k in ((128, 512), (256, 1024 + 512), (6144, 512), (9216, 512)):
        draw = torch.Generator().manual_seed(n)
        given = torch.randn(n, k, generator=draw) * 0.1 + torch.randn(n, 1, generator=draw) * 0.05
        given[3, 32:64], given[5, :32] = -0.25, 0.0
        stored = encode(given, form.weight)
        values, w = read_back(stored, how, dtype).to(CUDA), stored.to(CUDA)
        held = humming_linear.prepack_linear(Quantized(form, w), dtype, rounded=True)
        assert (
            isinstance(held, humming_linear.Held)
            and held.few
            and held.few.laid == few.Laid(few.INTEGERS, how.bits, how.group)
        )
        x, bias = torch.randn(16, k, device=CUDA).to(dtype), torch.randn(n, device=CUDA).to(dtype)
        size = x.double().abs() @ (values.abs() + 2 * decode(w).abs().amax(1, True)).double().T
        for m in (1, 2, 3, 4, 5, 8, 9, 16):
            y, want = humming_linear.run_linear(x[:m], held), x[:m].double() @ values.double().T
            assert bool(((y.double() - want).abs() <= UNIT[dtype] * want.abs() + k * 2.0**-24 * size[:m]).all())
            assert torch.equal(y, humming_linear.run_linear(x, held)[:m])
        want = x.double() @ values.double().T + bias.double()
        off = (humming_linear.run_linear(x, held, bias).double() - want).abs()
        assert bool((off <= 2 * UNIT[dtype] * (want.abs() + 1)).all())


@pytest.mark.parametrize("name, dtype", [
    ("nvfp4-a16", torch.bfloat16), ("nvfp4-a16", torch.float16), ("mxfp4-a16", torch.bfloat16),
])  # fmt: skip
def test_floats_of_4_bits(name: str, dtype: torch.dtype) -> None:
    form = FORMATS[name]
    for n, k in ((128, 512), (6144, 384), (9216, 384)):
        w = encode(torch.randn(n, k, generator=torch.Generator().manual_seed(n)) * 0.1, form.weight).to(CUDA)
        values = decode(w)
        held = humming_linear.prepack_linear(Quantized(form, w), dtype)
        assert isinstance(held, humming_linear.Held) and held.few is not None
        x, bias = torch.randn(16, k, device=CUDA).to(dtype), torch.randn(n, device=CUDA).to(dtype)
        for m in (1, 2, 3, 4, 5, 8, 9, 16):
            y = humming_linear.run_linear(x[:m], held)
            near(y, x[:m], values, x[:m].double() @ values.double().T)
            assert torch.equal(y, humming_linear.run_linear(x, held)[:m])
        want = x.double() @ values.double().T + bias.double()
        off = (humming_linear.run_linear(x, held, bias).double() - want).abs()
        assert bool((off <= 2 * UNIT[dtype] * (want.abs() + 1)).all())


@pytest.mark.parametrize(("name", "code"), [("nvfp4-a16", 0x7F), ("nvfp4-a16", 0xB8), ("mxfp4-a16", 0xFF)])
def test_scales_that_are_no_positive_numbers_are_left_to_humming(name: str, code: int) -> None:
    w = encode(torch.randn(128, 512) * 0.1, FORMATS[name].weight).to(CUDA)
    w.planes["scale0"].view(torch.uint8)[3, 2] = code
    held = humming_linear.prepack_linear(Quantized(FORMATS[name], w), torch.bfloat16)
    assert isinstance(held, humming_linear.Held) and held.few is None


@pytest.mark.parametrize("dtype", few.HALVES, ids=str)
def test_outer_scales_of_rows(dtype: torch.dtype) -> None:
    """Of NVFP4 weights that were joined: few rows and many, and where the reader applies them."""
    form, k = FORMATS["nvfp4-a16"], 512
    draw = torch.Generator().manual_seed(0)
    parts = [
        encode(torch.randn(n, k, generator=draw) * size, form.weight).to(CUDA) for n, size in ((256, 0.1), (128, 3))
    ]
    values, whole = torch.cat([decode(part) for part in parts]), join([Quantized(form, part) for part in parts])
    held = humming_linear.prepack_linear(whole, dtype)
    assert isinstance(held, humming_linear.Held) and held.columns is not None and held.few is not None
    x = torch.randn(24, k, device=CUDA).to(dtype)
    want = x.double() @ values.double().T
    near(humming_linear.run_linear(x[:16], held), x[:16], values, want[:16])
    off = 2 * UNIT[dtype] * want.abs() + 2.0**-14 * (x.double().abs() @ values.double().abs().T)
    assert bool(((humming_linear.run_linear(x, held).double() - want).abs() <= off).all())
    for m in (16, 24):
        y, rows, columns = humming_linear.run_unscaled(x[:m], held)
        assert rows is None and (columns is None) == (m == 16)
        y = y.double() if columns is None else y.double() * columns
        assert bool(((y - want[:m]).abs() <= off[:m]).all())
