"""Elements against ml-dtypes, bit for bit: every code, every tie, the neighbours of every tie, and saturation."""

from statistics import NormalDist

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch

from fewbit.quant import elements
from fewbit.quant.elements import ELEMENTS, Element

ML = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e4m3-240": ml_dtypes.float8_e4m3,  # the IEEE form: where it has infinities, ours are not numbers
    "e4m3-fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e8m0": ml_dtypes.float8_e8m0fnu,
}
FLOATS = [e for e in ELEMENTS.values() if e.kind == "float"]
INTS = [e for e in ELEMENTS.values() if e.kind == "int"]
TABLES = [e for e in ELEMENTS.values() if e.kind == "table"]
NATIVE = [e for e in ELEMENTS.values() if e.kind == "native"]
ids = {"ids": lambda e: getattr(e, "name", "")}


def all_codes(element: Element) -> np.ndarray:
    return np.arange(2 ** int(element.bits), dtype=np.uint8)


def encode(x: np.ndarray, element: Element) -> np.ndarray:
    return elements.encode(torch.from_numpy(np.ascontiguousarray(x, np.float32)), element).numpy()


def between(values: np.ndarray) -> np.ndarray:
    """Values, the points halfway between neighbours, and the float32 on either side of each."""
    values = np.unique(values.astype(np.float64))
    middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    x = np.concatenate([values.astype(np.float32), middle])
    return np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf))])


def test_every_float_is_compared() -> None:
    assert {e.name for e in ELEMENTS.values() if e.kind in ("float", "exponent")} == set(ML)


@pytest.mark.parametrize("element", [*FLOATS, elements.E8M0], **ids)
def test_decode_is_ml_dtypes(element: Element) -> None:
    codes = all_codes(element)
    want = codes.view(ML[element.name]).astype(np.float32)
    if element.name == "e4m3-240":
        want[np.isinf(want)] = np.nan
    got = elements.decode(torch.from_numpy(codes), element).numpy()
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got[~np.isnan(got)]), np.signbit(want[~np.isnan(want)]))
    np.testing.assert_array_equal(elements.values(element).numpy(), want)
    assert np.nanmax(want[np.isfinite(want)]) == element.max


@pytest.mark.parametrize("element", FLOATS, **ids)
def test_encode_is_ml_dtypes(element: Element) -> None:
    values = elements.values(element).numpy()
    x = between(values[np.isfinite(values)])
    normal = np.random.default_rng(0).normal(size=20000).astype(np.float32)
    x = np.concatenate([x, normal * np.float32(element.max / 3), normal * np.float32(1e-3), np.float32([0.0, -0.0])])
    x = x[np.abs(x) <= element.max]
    np.testing.assert_array_equal(encode(x, element), x.astype(ML[element.name]).view(np.uint8))


@pytest.mark.parametrize("element", FLOATS, **ids)
def test_floats_saturate(element: Element) -> None:
    top = np.float32(element.max)
    x = np.float32([top, np.nextafter(top, np.float32(np.inf)), top * 1.04, top * 2, 1e30, 3.4028235e38])
    assert (elements.values(element).numpy()[encode(x, element)] == top).all()
    assert (elements.values(element).numpy()[encode(-x, element)] == -top).all()


@pytest.mark.parametrize("element", FLOATS, **ids)
def test_subnormals_of_float32_round_to_zero_with_their_sign(element: Element) -> None:
    x = np.float32([1e-45, 1e-40, 1.1754944e-38, -1e-45, -1e-40])
    values = elements.values(element).numpy()[encode(x, element)]
    assert (values == 0).all()
    if element.name != "e4m3-fnuz":
        assert np.signbit(values).tolist() == [False] * 3 + [True] * 2


def test_e8m0_rounds_to_the_nearest_power() -> None:
    values = elements.values(elements.E8M0).numpy()[:255]
    x = between(values)
    x = x[(x >= 2.0**-126) & np.isfinite(x)]  # ml-dtypes flushes the subnormal numbers below
    inside = x[x <= 2.0**127]
    np.testing.assert_array_equal(encode(inside, elements.E8M0), inside.astype(ML["e8m0"]).view(np.uint8))
    assert (encode(x[x > 2.0**127], elements.E8M0) == 254).all()
    edge = np.float32(1.5 * 2.0**-127)
    low = np.float32([0, 1e-45, 2.0**-128, np.nextafter(edge, np.float32(0)), edge, 2.0**-126, -1.0])
    assert encode(low, elements.E8M0).tolist() == [0, 0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("element", INTS, **ids)
def test_ints(element: Element) -> None:
    bits = int(element.bits)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if element.signed else (0, 2**bits - 1)
    codes = all_codes(element)
    want = np.where(element.signed & (codes >> (bits - 1) == 1), codes.astype(int) - 2**bits, codes)
    np.testing.assert_array_equal(elements.decode(torch.from_numpy(codes), element).numpy(), want)
    np.testing.assert_array_equal(elements.values(element).numpy(), want)
    assert (element.min, element.max) == (low, high)
    x = np.concatenate([between(np.arange(low - 3, high + 4)), np.float32([1e30, -1e30, 0.0, -0.0])])
    rounded = [min(max(round(float(v)), low), high) % 2**bits for v in x]  # Python rounds halves to even too
    np.testing.assert_array_equal(encode(x, element), rounded)


@pytest.mark.parametrize("element", TABLES, **ids)
def test_tables_take_the_nearest_value(element: Element) -> None:
    table = np.float64(element.table)
    codes = all_codes(element)
    np.testing.assert_array_equal(elements.decode(torch.from_numpy(codes), element).numpy(), np.float32(table))
    x = np.concatenate([between(table), np.float32([1e30, -1e30])])
    error = np.abs(table[encode(x, element)] - x)
    best = np.abs(table[:, None] - x.astype(np.float64)).min(0)
    np.testing.assert_allclose(error, best, rtol=1e-6, atol=1e-7)  # middles are kept in float32
    exact = np.float32(table)
    np.testing.assert_array_equal(exact[encode(exact, element)], exact)


@pytest.mark.parametrize(("element", "dtype"), [(elements.F16, np.float16), (elements.BF16, ml_dtypes.bfloat16)], **ids)
def test_sixteen_bit_floats_round_and_saturate(element: Element, dtype: type) -> None:
    x = np.random.default_rng(1).normal(size=5000).astype(np.float32) * np.float32(element.max / 4)
    x = np.concatenate([x[np.abs(x) <= element.max], np.float32([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 6e-8, 1e-8])])
    got = elements.decode(elements.encode(torch.from_numpy(x), element), element).numpy()
    np.testing.assert_array_equal(got, x.astype(dtype).astype(np.float32))
    assert elements.encode(torch.tensor([3.4e38, -3.4e38]), element).float().tolist() == [element.max, -element.max]


def test_nf4_is_the_quantiles_of_the_normal_distribution() -> None:
    top = 0.9677083  # of QLoRA: 1/2 (1 - 1/30 + 1 - 1/32)
    quantile = NormalDist().inv_cdf
    positive = [quantile(0.5 + (top - 0.5) * i / 8) for i in range(1, 9)]
    negative = [-quantile(0.5 + (top - 0.5) * i / 7) for i in range(1, 8)]
    want = np.sort([0.0, *positive, *negative]) / max(positive)
    np.testing.assert_allclose(elements.NF4.table, want, atol=1e-6)


def test_fp4_is_three_bit_magnitudes_of_twelve() -> None:
    want = np.float32([0, 0.0625, 8, 12, 4, 6, 2, 3]) / np.float32(12)
    np.testing.assert_allclose(elements.FP4.table[:8], want, rtol=1e-6)
    np.testing.assert_array_equal(elements.FP4.table[8:], [-v for v in elements.FP4.table[:8]])


def test_iq4_is_ggmls_codebook() -> None:
    assert elements.IQ4.table == gguf.quants.IQ4_NL.kvalues


def test_dynamic8() -> None:
    """bitsandbytes' map: 0, 1, and for each decade a power of two of linear steps, mirrored."""
    table = elements.DYNAMIC8.table
    assert len(set(table)) == 256
    assert list(table) == sorted(table)
    assert table[-1] == 1.0
    assert table[127] == 0.0
    assert table[0] == pytest.approx(-0.99296875)
    assert table[128] == pytest.approx(0.55e-6)
    np.testing.assert_array_equal(table[:127], [-v for v in table[128:-1]][::-1])


@pytest.mark.parametrize("element", [e for e in ELEMENTS.values() if e.kind != "native"], **ids)
def test_encode_leaves_its_input_and_any_shape_goes(element: Element) -> None:
    x = torch.linspace(-3, 3, 24).view(2, 3, 4)
    for view in (x, x.transpose(0, 2), x[:, ::2], x.double()):
        before = view.clone()
        codes = elements.encode(view, element)
        assert codes.dtype == element.dtype == torch.uint8
        assert torch.equal(view, before)
        assert elements.decode(codes, element).shape == view.shape
        assert elements.decode(codes.transpose(0, 1), element).shape == codes.transpose(0, 1).shape
    assert elements.decode(elements.encode(torch.tensor(1.0), element), element).shape == ()
