"""Codes and scales of activations, bit for bit the reference's; by Triton's interpreter where there is no GPU."""

from typing import TYPE_CHECKING

import pytest
import torch

from fewbit.kernels.input_rounding import Rounding, rounding
from fewbit.kernels.triton_runtime import lacking
from fewbit.quant import elements
from fewbit.quant.formats import BLOCK_FP8, FORMATS, TENSOR_FP8, TOKEN_FP8, TOKEN_INT8
from fewbit.quant.qtensor import QTensor
from fewbit.quant.reference import assign, choose
from fewbit.quant.spec import QuantSpec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if lacking(DEVICE):
    pytest.skip(str(lacking(DEVICE)), allow_module_level=True)
if TYPE_CHECKING or not lacking(DEVICE):
    from fewbit.kernels.triton_quantize import quantize_rows
    from fewbit.kernels.triton_scale import scale_

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where a GPU would be silent
SPECS = {"token": TOKEN_FP8, "block": BLOCK_FP8, "int8": TOKEN_INT8, "mx": FORMATS["mxfp8"].act}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def inputs(dtype: torch.dtype, k: int, seed: int = 0) -> torch.Tensor:
    """Ordinary rows, and the ends of what the type holds."""
    x = torch.randn(9, k, generator=torch.Generator().manual_seed(seed))
    x[1] = 0
    x[2] *= torch.finfo(dtype).max / 64
    x[3] *= torch.finfo(dtype).tiny
    x[4] *= torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * 4
    x[5] = torch.arange(k) % 256 - 128.0
    x[6, : k // 2] = 0
    x[7] = 0
    x[7, 3] = torch.finfo(dtype).max
    x = x.to(dtype)
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":  # the interpreter misreads subnormal ones
        x[x.abs() < torch.finfo(dtype).tiny] = 0
    return x


def wanted(x: torch.Tensor, spec: QuantSpec, given: dict[str, torch.Tensor]) -> QTensor:
    return assign(x.float(), spec, choose(x.float(), spec, given))


def how(spec: QuantSpec) -> Rounding:
    found = rounding(spec)
    assert not isinstance(found, str), found
    return found


@pytest.mark.parametrize("k", [256, 328, 512])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_as_the_reference(name: str, dtype: torch.dtype, k: int) -> None:
    x, spec = inputs(dtype, k), SPECS[name]
    want = wanted(x, spec, {})
    codes, scales = quantize_rows(x.to(DEVICE), how(spec))
    stored = elements.decode(want.planes["scale0"], spec.scales[0].element)
    assert torch.equal(scales.cpu(), stored.view(scales.shape)), (scales.cpu() - stored)[:, :2]
    assert torch.equal(codes.cpu().view(torch.uint8), want.planes["codes"])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scale", [0.0173, 1.0, 3e-5])
def test_a_given_scale(dtype: torch.dtype, scale: float) -> None:
    x, plane = inputs(dtype, 256), torch.full((1, 1), scale)
    codes, same = quantize_rows(x.to(DEVICE), how(TENSOR_FP8), plane.to(DEVICE))
    assert torch.equal(codes.cpu().view(torch.uint8), wanted(x, TENSOR_FP8, {"scale0": plane}).planes["codes"])
    assert torch.equal(same.cpu(), plane)


def test_every_tie_and_code() -> None:
    """Midpoints between neighbouring codes, and the floats beside them."""
    values = elements.values(elements.E4M3)
    values = values[values.isfinite()].unique()
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middles, middles.nextafter(torch.tensor(1e9)), middles.nextafter(torch.tensor(-1e9))])
    one = torch.ones(1, 1)
    codes, _ = quantize_rows(x[None].to(DEVICE), how(TENSOR_FP8), one.to(DEVICE))
    assert torch.equal(codes.cpu().view(torch.uint8)[0], elements.encode(x, elements.E4M3))


def hard(bits: int) -> torch.Tensor:
    """[2, N] whole numbers of 24 bits, over and under: all whose quotient lies within 8 parts in 2**48 of where float32
    begins or ceases to round to a number of that many bits."""
    low, high = 1 << 23, 1 << 24
    under = (torch.arange(low, high + 1, 1 << (25 - bits))[:, None] + torch.arange(-8, 9)).flatten()
    under = under[(under >= low) & (under < high)]
    middles = torch.arange(1 << (bits - 1), (1 << bits) + 1) << (25 - bits)
    found = []
    for end in torch.cat([middles - 1, middles + 1]).tolist():
        for shift in (24, 25):  # quotients from 1 on, and below
            over = (under * end + (1 << (shift - 1))) >> shift
            near = ((over << shift) - under * end).abs() <= 8
            near &= (over >= low) & (over < high)
            found.append(torch.stack([over[near], under[near]]))
    return torch.cat(found, 1)


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c rounded once: in float64 it is rounded to odd, which the second rounding does not feel."""
    product, c = a.double() * b.double(), c.double()
    total = product + c
    part = total - product
    rest = (product - (total - part)) + (c - part)
    bits = total.view(torch.int64)
    step = torch.where((rest > 0) == (total > 0), 1, -1)
    return torch.where((rest != 0) & (bits % 2 == 0), bits + step, bits).view(torch.float64).float()


@pytest.mark.parametrize("bits", [5, 9])  # of the middles between codes of e4m3; more than int8's have
def test_a_corrected_product_is_the_quotient(bits: int) -> None:
    """What a GPU does, where it could go wrong, in exact arithmetic: an error here is at most 5 parts in 2**48."""
    x, scale = hard(bits).float()
    inverse = 1 / scale
    near = x * inverse
    assert not torch.equal(near, x / scale)
    assert torch.equal(fma(fma(scale, near, -x), -inverse, near), x / scale)


@pytest.mark.parametrize("power", [-120, -70, -64, -30, 0, 60, 90])
def test_quotients_that_are_hard_to_round(power: int) -> None:
    """Each scale in a row of its own, which its largest value puts there; then given, to those of one scale."""
    pairs = hard(5)
    each = pairs[1].unique()
    x = torch.zeros(len(each), 32)
    for row, scale in enumerate(each):
        over = pairs[0, pairs[1] == scale].float()
        x[row, 0], x[row, 1 : 1 + len(over)] = 448.0 * scale, over
        x[row, -len(over) :] = -over * 2.0**-9  # around the middles of the smallest codes
    x = torch.ldexp(x, torch.tensor(power - 23))
    want = wanted(x, TOKEN_FP8, {})
    codes, _ = quantize_rows(x.to(DEVICE), how(TOKEN_FP8))
    assert torch.equal(codes.cpu().view(torch.uint8), want.planes["codes"])
    for row in range(0, len(each), 1 if DEVICE.type == "cuda" else 16):
        plane = torch.ldexp(each[row].float(), torch.tensor(power - 23)).view(1, 1)
        codes, _ = quantize_rows(x[row, None].to(DEVICE), how(TENSOR_FP8), plane.to(DEVICE))
        want = wanted(x[row, None], TENSOR_FP8, {"scale0": plane})
        assert torch.equal(codes.cpu().view(torch.uint8), want.planes["codes"])


@pytest.mark.parametrize("name", ["token", "given", "int8", "block"])
def test_what_lies_beyond(name: str) -> None:
    """Infinities saturate, whatever the scale; zeros keep their sign."""
    spec = {**SPECS, "given": TENSOR_FP8}[name]
    x = torch.randn(4, 256)
    x[0, 3], x[1, 5], x[2, 7], x[3, :9] = torch.inf, -torch.inf, 3e38, -0.0
    plane = torch.full((1, 1), 1e-19)
    codes, _ = quantize_rows(x.to(DEVICE), how(spec), plane.to(DEVICE))
    want = wanted(x, spec, {"scale0": plane} if name == "given" else {})
    assert torch.equal(codes.cpu().view(torch.uint8), want.planes["codes"])


def test_rows_longer_than_a_block() -> None:
    import fewbit.kernels.triton_quantize as module

    x = inputs(torch.bfloat16, 700)
    before, module.HELD = module.HELD, 256
    try:
        codes, scales = quantize_rows(x.to(DEVICE), how(TOKEN_FP8))
    finally:
        module.HELD = before
    want = wanted(x, TOKEN_FP8, {})
    assert torch.equal(codes.cpu().view(torch.uint8), want.planes["codes"])
    assert torch.equal(scales.cpu(), want.planes["scale0"].view(scales.shape))


def test_says_what_it_does_not_do() -> None:
    for name in ("nvfp4", "mxfp4", "mxfp6-e3m2"):
        assert isinstance(rounding(FORMATS[name].act), str)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter's cast to e4m3 knows no NaN")
def test_nan_stays_nan() -> None:
    x = torch.randn(2, 256)
    x[1, 7] = torch.nan
    codes, _ = quantize_rows(x.to(DEVICE), how(TOKEN_FP8))
    assert torch.equal(codes.cpu().float().isnan(), x.isnan())


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)  # the interpreter truncates to bfloat16
@pytest.mark.parametrize("n", [8, 2056])
def test_scale(n: int, dtype: torch.dtype) -> None:
    y, rows, columns, bias = torch.randn(3, n), torch.rand(3, 1), torch.rand(n), torch.randn(n)
    y, bias = y.to(dtype), bias.to(dtype)
    for parts in ((rows, None, None), (None, columns, None), (rows, columns, bias), (None, None, bias)):
        want = y.float()
        want = want if parts[1] is None else want * parts[1]
        want = want if parts[0] is None else want * parts[0]
        want = want if parts[2] is None else want + parts[2].float()
        got = scale_(y.to(DEVICE, copy=True), *(None if p is None else p.to(DEVICE) for p in parts))
        assert torch.allclose(got.cpu().float(), want.to(dtype).float(), rtol=torch.finfo(dtype).eps, atol=1e-7)
