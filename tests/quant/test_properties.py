"""What holds for any shape and any finite numbers, tried on a few hundred of them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewbit.errors import SpecError
from fewbit.quant import elements, qtensor
from fewbit.quant.elements import ELEMENTS
from fewbit.quant.formats import FORMATS
from fewbit.quant.pack import pack, packed_size, unpack
from fewbit.quant.qtensor import bits_per_weight
from fewbit.quant.reference import decode, encode, fake_quant
from tests.quant import plain

settings.register_profile(
    "quant", derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("quant")

NAMES = (
    "int4-g32", "int3-g32-asym", "int8-channel", "int2-tensor-asym", "fp8-block", "fp8-tensor", "fp8-1x128",
    "mxfp4", "mxfp6-e2m3", "mxint8", "nvfp4", "nvfp4-46", "nf4", "nf4-dq", "fp4",
)  # fmt: skip
NUMBER = st.one_of(
    st.floats(-1e4, 1e4, width=32), st.sampled_from([0.0, -0.0, 1e-38, -1e-40, 1.4e-45, 1e4, 6.0, 448.0, 0.5])
)


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    n, k = draw(st.integers(1, 5)), draw(st.integers(1, 70))
    few = draw(st.lists(NUMBER, min_size=1, max_size=12))
    picks = np.random.default_rng(draw(st.integers(0, 99))).integers(0, len(few), (n, k))
    return torch.tensor(few, dtype=torch.float32)[torch.from_numpy(picks)]


@given(matrices(), st.sampled_from(NAMES))
def test_encode_then_decode(w: torch.Tensor, name: str) -> None:
    q = encode(w, FORMATS[name].weight)
    back = decode(q)
    assert back.shape == w.shape
    assert torch.isfinite(back).all()
    np.testing.assert_allclose(back.numpy(), plain.decode(q), rtol=1e-6, atol=0)
    assert torch.equal(fake_quant(w, q.spec), back)
    best = plain.nearest(q, w)
    error = (back.double() - w.double()).abs().numpy()
    assert (error <= best * (1 + 1e-5) + 1e-5 * float(w.abs().max()) + 1e-30).all()


@given(matrices(), st.sampled_from(NAMES), st.sampled_from([math.nan, math.inf, -math.inf]), st.data())
def test_what_is_not_finite_is_named(w: torch.Tensor, name: str, bad: float, data: st.DataObject) -> None:
    i, j = data.draw(st.integers(0, w.shape[0] - 1)), data.draw(st.integers(0, w.shape[1] - 1))
    w[i, j] = bad
    with pytest.raises(SpecError, match=rf"element \[{i}, {j}\] of .* is -?(nan|inf) \(1 such"):
        encode(w, FORMATS[name].weight)


@given(st.integers(1, 8), st.integers(0, 200), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_pack_and_unpack(bits: int, n: int, rows: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, n), np.uint8)
    packed = pack(torch.from_numpy(codes), bits)
    assert packed.shape == (rows, packed_size(n, bits))
    assert [bytes(row.tolist()) for row in packed] == [plain.bit_stream(row.tolist(), bits) for row in codes]
    assert torch.equal(unpack(packed, bits, n), torch.from_numpy(codes))


@given(st.sampled_from(sorted(ELEMENTS)), st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=20))
def test_elements_keep_order_and_sign(name: str, numbers: list[float]) -> None:
    element = ELEMENTS[name]
    x = torch.tensor(sorted(numbers), dtype=torch.float32)
    values = elements.decode(elements.encode(x, element), element)
    assert (values.diff() >= 0).all()
    assert ((values >= element.min) & (values <= element.max)).all()
    again = elements.decode(elements.encode(values, element), element)
    assert torch.equal(again, values)


@given(st.sampled_from(sorted(FORMATS)), st.integers(1, 3), st.integers(1, 300), st.integers(1, 5))
def test_sizes(name: str, experts: int, n: int, blocks: int) -> None:
    weight = FORMATS[name].weight
    k = blocks * 256
    q = qtensor.empty(weight, (experts, n, k), "meta")
    bits = bits_per_weight(weight, (n, k))
    rows = sum(math.prod(plane.shape[:-1]) for plane in q.planes.values())
    assert -1e-6 <= q.nbytes - experts * n * k * bits / 8 <= rows  # rows of a plane are whole bytes
