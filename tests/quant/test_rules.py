"""How scales are chosen: the MX conventions, NVFP4's two levels, four over six, ranges, double quantization."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from fewbit.errors import SpecError
from fewbit.quant import elements
from fewbit.quant.blocks import blocked
from fewbit.quant.elements import BF16, E2M1, E2M3, E3M2, E4M3, E5M2, E8M0, F16, F32, INT4, INT8, UINT4, Element
from fewbit.quant.formats import FORMATS, NVFP4
from fewbit.quant.qtensor import QTensor, scale_codes
from fewbit.quant.reference import assign, choose, decode, encode
from fewbit.quant.spec import QuantSpec, Scale, spec

MX = (E2M1, E3M2, E2M3, E4M3, E5M2, INT8)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def edges(top: float) -> np.ndarray:
    """Block maxima around every place where one of the conventions takes the next exponent."""
    base = np.float32([1, 1.5, 1.75, 2 - 2**-23, top / 2 ** math.floor(math.log2(top))])
    x = np.concatenate([base * np.float32(2.0) ** p for p in (-100, -8, 0, 2, 3, 9, 60)]).astype(np.float32)
    return np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(0))])


def mx_exponents(rule: str, element: Element, amax: np.ndarray) -> list[int]:
    w = torch.zeros(len(amax), 32)
    w[:, 5] = -torch.from_numpy(amax)
    q = encode(w, spec(element, (E8M0, 1, 32), rule=rule))
    return [int(c) - 127 for c in q.planes["scale0"][:, 0]]


@pytest.mark.parametrize("element", MX, ids=lambda e: e.name)
def test_mx_ceil_is_the_least_power_that_never_clips(element: Element) -> None:
    amax = edges(element.max)
    for a, found in zip(amax, mx_exponents("mx-ceil", element, amax), strict=True):
        ratio = Fraction(float(a)) / Fraction(element.max)
        assert Fraction(2) ** found >= ratio > Fraction(2) ** (found - 1), (a, found)


@pytest.mark.parametrize("element", MX, ids=lambda e: e.name)
def test_mx_floor_is_ocps(element: Element) -> None:
    amax = edges(element.max)
    want = [math.frexp(float(a))[1] - 1 - math.floor(math.log2(element.max)) for a in amax]
    assert mx_exponents("mx-floor", element, amax) == want


@pytest.mark.parametrize(("element", "offset"), [(E2M1, 2), (E4M3, 8)], ids=["mxfp4", "mxfp8"])
def test_mx_round_goes_up_from_seven_quarters(element: Element, offset: int) -> None:
    amax = edges(element.max)
    rounded = [math.frexp(float(a)) for a in amax]
    want = [power - 1 - offset + (mantissa >= 1.75 / 2) for mantissa, power in rounded]
    assert mx_exponents("mx-round", element, amax) == want


@pytest.mark.parametrize("rule", ["mx-ceil", "mx-floor", "mx-round"])
def test_mx_of_zeros_and_of_the_smallest_numbers(rule: str) -> None:
    w = torch.zeros(3, 64)
    w[1], w[2, 40] = 1.4e-45, 1e-39
    for element in MX:
        q = encode(w, spec(element, (E8M0, 1, 32), rule=rule))
        assert torch.isfinite(decode(q)).all()
        assert (decode(q) - w).abs().max() <= 1e-39


def test_nvfp4_of_modelopt() -> None:
    """s2 = amax / (6 * 448); block scale = e4m3(block amax / (6 * s2)), never 0; 1 for a block of zeros."""
    w = normal(8, 64)
    w[3, 16:32] = 0
    w[4, 32:48] *= 1e-9
    q = encode(w, NVFP4)
    s2 = w.abs().max() / (6 * 448)
    assert q.planes["scale1"].item() == s2.item()
    blocks = w.view(8, 4, 16).abs().amax(-1)
    want = torch.where(blocks > 0, (blocks / (6 * s2)).clamp(2.0**-9, 448), 1.0).to(torch.float8_e4m3fn)
    assert torch.equal(q.planes["scale0"], want.view(torch.uint8))
    assert q.planes["scale0"].view(torch.float8_e4m3fn)[4, 2].item() == 2.0**-9


def test_nvfp4_with_a_stored_reciprocal_is_the_same_numbers() -> None:
    """compressed-tensors keeps 1 / s2: within rounding of one division nothing else changes."""
    divided = replace(NVFP4, scales=(NVFP4.scales[0], Scale(F32, (0, 0), "div")))
    w = normal(32, 64)
    a, b = encode(w, NVFP4), encode(w, divided)
    product = a.planes["scale1"] * b.planes["scale1"]
    torch.testing.assert_close(product, torch.ones(1, 1), rtol=1e-6, atol=0)
    assert (a.planes["scale0"] != b.planes["scale0"]).float().mean() < 0.02
    torch.testing.assert_close(decode(a), decode(b), rtol=0.15, atol=1e-6)


def test_nvfp4_takes_a_tensor_scale_that_is_given() -> None:
    """Fused siblings share one tensor scale: it is given, and the block scales follow."""
    w = normal(8, 64)
    given = torch.full((1, 1), 0.01)
    planes = choose(w, NVFP4, {"scale1": given})
    assert planes["scale1"] is given
    q = assign(w, NVFP4, planes)
    assert q.planes["scale1"].item() == given.item()
    assert ((decode(q) - w).norm() / w.norm()).item() < 0.12


@pytest.mark.parametrize("seed", range(4))
def test_four_over_six_never_loses(seed: int) -> None:
    """Block by block its squared error is at most NVFP4's at the same tensor scale, and its codes end on 4 or 6."""
    w = normal(64, 128, seed=seed) * (1 + seed) ** 3
    w[5] = 0
    q = encode(w, FORMATS["nvfp4-46"].weight)
    assert q.planes["scale1"].item() == pytest.approx(w.abs().max().item() / (6 * 256))
    plain = assign(w, NVFP4, choose(w, NVFP4, {"scale1": q.planes["scale1"]}))
    ours, theirs = (blocked((decode(x) - w).square(), (1, 16)).sum((-3, -1)) for x in (q, plain))
    assert (ours <= theirs * (1 + 1e-6)).all()
    assert (ours < theirs * 0.999).float().mean() > 0.2
    assert ours.sum() < blocked((decode(encode(w, NVFP4)) - w).square(), (1, 16)).sum()
    assert torch.equal(decode(q)[5], w[5])


@pytest.mark.parametrize(("rule", "reach"), [("range", 7.5), ("amax", 7.0)])
def test_symmetric_integers(rule: str, reach: float) -> None:
    w = normal(16, 256)
    q = encode(w, spec(INT4, (F32, 1, 128), rule=rule))
    torch.testing.assert_close(q.planes["scale0"], w.view(16, 2, 128).abs().amax(-1) / reach, rtol=1e-6, atol=0)


def test_asymmetric_integers_reach_both_ends_and_hold_zero() -> None:
    w = normal(16, 256) + 1
    weight = spec(UINT4, (F32, 1, 128), zeros=((UINT4, 1, 128),), rule="range")
    q = encode(w, weight)
    low, high = (w.view(16, 2, 128).amin(-1).clamp(max=0), w.view(16, 2, 128).amax(-1).clamp(min=0))
    torch.testing.assert_close(q.planes["scale0"], (high - low) / 15, rtol=1e-6, atol=0)
    zero = (-low / q.planes["scale0"]).round()
    assert torch.equal(scale_codes(q, "zero0").float(), zero)
    assert torch.equal(decode(encode(torch.zeros(2, 128), weight)), torch.zeros(2, 128))
    positive = encode(torch.full((1, 128), 3.0), weight)
    torch.testing.assert_close(decode(positive), torch.full((1, 128), 3.0))


def test_a_float_offset_is_the_lowest_value() -> None:
    w = normal(4, 64) + 3
    q = encode(w, spec(UINT4, (F16, 1, 32), zeros=((F16, 1, 32),), rule="amax"))
    low = w.view(4, 2, 32).amin(-1).clamp(max=0)
    torch.testing.assert_close(q.planes["zero0"].float(), -low, rtol=1e-3, atol=1e-4)
    assert (decode(q) - w).abs().max() <= q.planes["scale0"].max() * 0.51


def test_a_scale_too_large_for_its_type_is_an_error() -> None:
    w = torch.full((2, 128), 1e6)
    with pytest.raises(SpecError, match=r"a block needs the scale 133333, f16 ends at 65504"):
        encode(w, FORMATS["int4-g128"].weight)
    for element in (F32, BF16):
        assert torch.isfinite(decode(encode(w, spec(INT4, (element, 1, 128), rule="range")))).all()


def test_a_scale_that_rounds_to_nothing_still_divides() -> None:
    w = normal(2, 128) * 1e-9
    for weight in (spec(INT4, (F16, 1, 128), rule="range"), spec(E4M3, (F16, 1, 128)), spec(INT8, (F16, 1, 0))):
        q = encode(w, weight)
        assert (q.planes["scale0"] > 0).all()
        assert torch.isfinite(decode(q)).all()
        assert (decode(q) - w).abs().max() <= 1e-7


def test_a_first_scale_may_divide() -> None:
    """gptqmodel's FP8 keeps the inverse of the scale: the code divided by it is the value."""
    w = normal(256, 256)
    for block in ((0, 0), (1, 0), (128, 128)):
        inverse = QuantSpec(E4M3, (Scale(F32, block, "div"),))
        q = encode(w, inverse)
        plain = encode(w, spec(E4M3, (F32, *block)))
        torch.testing.assert_close(q.planes["scale0"] * plain.planes["scale0"], torch.ones_like(q.planes["scale0"]))
        torch.testing.assert_close(decode(q), decode(plain), rtol=0.13, atol=1e-5)
        stored = elements.decode(q.planes["codes"], E4M3)
        torch.testing.assert_close(decode(q), stored / _spread(q), rtol=1e-6, atol=0)


def _spread(q: QTensor) -> torch.Tensor:
    rows, cols = (256 // size for size in q.planes["scale0"].shape)
    return q.planes["scale0"].repeat_interleave(rows, 0).repeat_interleave(cols, 1)


def test_double_quantization() -> None:
    """bitsandbytes: block maxima less their mean, in 8-bit dynamic codes, blocks of 256 of them with a float scale."""
    w = normal(512, 256)
    q = encode(w, FORMATS["nf4-dq"].weight)
    amax = w.view(-1, 64).abs().amax(-1)
    offset = amax.mean()
    assert q.planes["scale2"].item() == pytest.approx(offset.item(), rel=1e-6)
    rest = (amax - offset).view(-1, 256)
    torch.testing.assert_close(q.planes["scale1"].view(-1), rest.abs().amax(-1), rtol=1e-5, atol=0)
    table = torch.tensor(elements.DYNAMIC8.table)
    approx = table[q.planes["scale0"].long()].view(-1, 256) * q.planes["scale1"].view(-1, 1) + offset
    assert ((approx.view(-1) - amax).abs() / amax).max() < 0.02
    plain = encode(w, FORMATS["nf4"].weight)
    assert (decode(q) - w).norm() < 1.01 * (decode(plain) - w).norm()
