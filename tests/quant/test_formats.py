"""Every row of FORMATS: sizes by arithmetic, decode and rounding against loops, ragged shapes, extremes, refusals."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from fewbit.errors import SpecError, UnsupportedError
from fewbit.quant import formats, qtensor
from fewbit.quant.elements import BF16, E2M1, E4M3, F16, F32, INT4, UINT4
from fewbit.quant.formats import FORMATS, ROWS, name_of
from fewbit.quant.qtensor import QTensor, bits_per_weight
from fewbit.quant.reference import decode, encode, fake_quant
from fewbit.quant.spec import FLAT, Format, QuantSpec, Scale, describe, spec
from tests.quant import plain

READ_ONLY = [name for name, row in ROWS.items() if row.weight.element.kind == "run"]
WRITABLE = [name for name in ROWS if name not in READ_ONLY]
ROUNDED = [name for name in WRITABLE if not plain.searched(ROWS[name].weight)]
BITS = {
    "int4-g128": 4.125, "int4-g128-asym": 4.15625, "int4-g32": 4.5, "int3-g128": 3.125, "int8-g128": 8.125,
    "int8-tensor": 8.0, "int8-channel": 8.0, "fp8-tensor": 8.0, "fp8-channel": 8.0, "fp8-block": 8.001953125,
    "fp8-1x128": 8.25, "mxfp4": 4.25, "mxfp6-e3m2": 6.25, "mxfp6-e2m3": 6.25, "mxfp8": 8.25, "mxint8": 8.25,
    "nvfp4": 4.5, "nvfp4-46": 4.5, "nf4": 4.5, "nf4-dq": 4.126953125, "q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5,
    "q5_k": 5.5, "q6_k": 6.5625, "q4_0": 4.5, "q4_1": 5.0, "q5_0": 5.5, "q5_1": 6.0, "q8_0": 8.5, "iq4_nl": 4.5,
    "iq4_xs": 4.25, "q1_0": 1.125, "tq1_0": 1.6875, "tq2_0": 2.0625, "iq2_xxs": 2.0625, "iq1_s": 1.5625,
}  # fmt: skip
# relative error of random normal weights, rounded up: a row that falls behind its neighbours is a mistake in its rule
ERROR = {8: 0.02, 7: 0.03, 6: 0.06, 5: 0.12, 4: 0.25, 3: 0.5, 2: 0.95, 1: 1.0}
FLOAT_ERROR = {"e4m3": 0.04, "e4m3-240": 0.04, "e5m2": 0.08}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step(name: str) -> int:
    """The number of columns that the row's encoder wants a multiple of."""
    weight = FORMATS[name].weight
    return max(scale.block[1] for scale in weight.scales) if plain.searched(weight) else 1


def assert_same(a: QTensor, b: QTensor) -> None:
    assert (a.spec, a.shape, a.planes.keys()) == (b.spec, b.shape, b.planes.keys())
    for name in a.planes:
        torch.testing.assert_close(a.planes[name], b.planes[name], rtol=0, atol=0, equal_nan=True)


def test_the_rows_that_are_promised() -> None:
    ints = {
        f"int{bits}-{block}{zero}"
        for bits in (8, 4, 3, 2)
        for block in ("tensor", "channel", "g32", "g64", "g128")
        for zero in ("", "-asym")
    }
    floats = {"fp8-tensor", "fp8-channel", "fp8-block", "fp8-1x128", "mxfp4", "mxfp6-e3m2", "mxfp6-e2m3", "mxfp8"}
    four = {"nvfp4", "nvfp4-46", "nf4", "nf4-dq", "fp4"}
    assert ints | floats | four | set(BITS) <= set(FORMATS)
    assert set(READ_ONLY) == {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "tq1_0"}


@pytest.mark.parametrize("name", BITS)
def test_bits_per_weight(name: str) -> None:
    assert bits_per_weight(FORMATS[name].weight) == BITS[name]


@pytest.mark.parametrize("name", ROWS)
def test_bits_are_the_bytes_it_takes(name: str) -> None:
    shape = (256, 512)
    weight = FORMATS[name].weight
    q = qtensor.empty(weight, shape)
    unused = q.nbytes - bits_per_weight(weight, shape) * math.prod(shape) / 8  # rows of a plane are whole bytes
    assert 0 <= unused <= sum(len(plane) for name, plane in q.planes.items() if name != "codes")
    assert qtensor.make(weight, shape, q.planes).nbytes == q.nbytes


@pytest.mark.parametrize("name", WRITABLE)
def test_round_trip(name: str) -> None:
    w = normal(64, 512) * 0.02
    before = w.clone()
    q = encode(w, FORMATS[name].weight)
    assert torch.equal(w, before)
    assert qtensor.make(q.spec, q.shape, q.planes) == q
    back = decode(q)
    assert (back.shape, back.dtype) == (w.shape, torch.float32)
    bound = FLOAT_ERROR.get(q.spec.element.name, ERROR[int(q.spec.element.bits)])
    assert ((back - w).norm() / w.norm()).item() < bound
    assert_same(encode(w, FORMATS[name].weight), q)
    assert_same(encode(w.double(), FORMATS[name].weight), q)
    assert torch.equal(decode(encode(w.bfloat16(), q.spec)), decode(encode(w.bfloat16().float(), q.spec)))


@pytest.mark.parametrize("name", WRITABLE)
def test_decode_is_the_plain_decode(name: str) -> None:
    ragged = step(name) == 1
    for shape in ((5, 300), (130, 7), (1, 1), (3, 128)) if ragged else ((3, 2 * step(name)),):
        q = encode(normal(*shape), FORMATS[name].weight)
        np.testing.assert_allclose(decode(q).numpy(), plain.decode(q), rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", ROUNDED)
def test_every_weight_takes_the_nearest_code(name: str) -> None:
    for shape in ((5, 300), (130, 7), (1, 1)):
        w = normal(*shape, seed=1)
        q = encode(w, FORMATS[name].weight)
        error = (decode(q) - w).abs().double().numpy()
        np.testing.assert_allclose(error, plain.nearest(q, w), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", WRITABLE)
def test_leading_axes_are_that_many_matrices(name: str) -> None:
    k = 2 * step(name) if step(name) > 1 else 70
    w = normal(3, 2, 9, k)
    q = encode(w, FORMATS[name].weight)
    back = decode(q)
    for e in range(3):
        for f in range(2):
            one = encode(w[e, f], FORMATS[name].weight)
            assert_same(one, QTensor(q.spec, q.shape[2:], {n: p[e, f] for n, p in q.planes.items()}))
            assert torch.equal(back[e, f], decode(one))


@pytest.mark.parametrize("name", WRITABLE)
def test_a_large_tensor_is_worked_on_in_pieces(name: str) -> None:
    """Pieces end on block edges: the whole equals what its own rows give with the same scales."""
    w = normal(2, 1100, 256) if step(name) == 256 else normal(2, 800, 384)
    q = encode(w, FORMATS[name].weight)
    part = QTensor(q.spec, q.shape[1:], {n: p[1] for n, p in q.planes.items()})
    top = qtensor.slice(part, -2, 0, 128)
    assert torch.equal(decode(q)[1, :128], decode(top))
    assert torch.equal(decode(q)[1], decode(part))


@pytest.mark.parametrize("name", [n for n in WRITABLE if step(n) > 1])
def test_ggmls_blocks_must_divide(name: str) -> None:
    with pytest.raises(SpecError, match="does not divide"):
        encode(normal(4, step(name) + 1), FORMATS[name].weight)


@pytest.mark.parametrize("name", READ_ONLY)
def test_codebooks_refuse_to_encode(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"cannot encode to {name}\n  - its codebook search"):
        encode(normal(4, 256), FORMATS[name].weight)


@pytest.mark.parametrize("name", WRITABLE)
def test_zeros_stay_zeros(name: str) -> None:
    w = torch.zeros(4, 512)
    assert torch.equal(decode(encode(w, FORMATS[name].weight)), w)
    w[2:] = normal(2, 512)
    if FORMATS[name].weight.scales[0].block[0] in (1, FLAT) and name not in ("q1_0", "nf4-dq"):
        assert torch.equal(decode(encode(w, FORMATS[name].weight))[:2], w[:2])


@pytest.mark.parametrize("value", [1e-38, -1e-40, 1.4e-45, 1e-7, 1e38, -1.7e38, 1e6, 1.0])
@pytest.mark.parametrize("name", WRITABLE)
def test_extremes_are_finite_or_refused(name: str, value: float) -> None:
    noise = normal(4, 512).clamp(-1, 1) * value
    for w in (torch.full((4, 512), value), noise):
        try:
            back = decode(encode(w, FORMATS[name].weight))
        except SpecError as error:
            assert re.search("ends at 65504|is far beyond what .* f16.* holds", str(error)), error
            assert abs(value) >= 1e6
            continue
        assert torch.isfinite(back).all()
        assert (back - w).abs().max() <= 1.01 * abs(value) + 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3.4e38, -3.4028234663852886e38])
@pytest.mark.parametrize("name", WRITABLE)
def test_what_is_not_finite_is_named(name: str, bad: float) -> None:
    w = normal(2, 3, 512)
    w[1, 2, 77] = bad
    with pytest.raises(SpecError, match=r"element \[1, 2, 77\] of \[2, 3, 512\] is .*1 such elements"):
        encode(w, FORMATS[name].weight)


@pytest.mark.parametrize("shape", [(), (8,), (0, 8), (8, 0), (0, 4, 4)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match=r"want \[..., N, K\]"):
        encode(torch.zeros(shape), FORMATS["int4-g128"].weight)


@pytest.mark.parametrize("name", WRITABLE)
def test_fake_quant_is_decode_of_encode(name: str) -> None:
    w = normal(6, 512)
    weight = FORMATS[name].weight
    want = decode(encode(w, weight))
    assert torch.equal(fake_quant(w, weight), want)
    cubed = fake_quant(w.view(2, 3, 512).bfloat16(), weight)
    assert (cubed.shape, cubed.dtype) == ((2, 3, 512), torch.bfloat16)
    assert torch.equal(cubed.view(6, 512), decode(encode(w.bfloat16(), weight)).bfloat16())
    assert fake_quant(w[:0], weight).shape == (0, 512)


# the rows whose largest value of a block always decodes to itself, and so choose the same scales again
EXACT_AGAIN = [n for n in WRITABLE if n.startswith(("mx", "nf4", "fp4")) and n not in ("nf4-dq", "mxfp4-ggml")] + [
    "q8_0"
]


@pytest.mark.parametrize("name", EXACT_AGAIN)
def test_encoding_again_changes_nothing(name: str) -> None:
    once = decode(encode(normal(64, 512), FORMATS[name].weight))
    assert torch.equal(decode(encode(once, FORMATS[name].weight)), once)


@pytest.mark.parametrize("name", [n for n in WRITABLE if n.startswith("fp8")])
def test_encoding_again_moves_fp8_by_rounding_of_its_scale_only(name: str) -> None:
    once = decode(encode(normal(256, 512), FORMATS[name].weight))
    torch.testing.assert_close(decode(encode(once, FORMATS[name].weight)), once, rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", ROWS)
def test_name_of_finds_each_row_or_its_equal(name: str) -> None:
    row = FORMATS[name]
    found = name_of(row)
    assert found is not None
    same = FORMATS[found]
    floats = {F16: F32, BF16: F32}

    def shape(s: QuantSpec) -> list[object]:
        return [s.element, *((floats.get(c.element, c.element), c.block) for c in (*s.scales, *s.zeros))]

    assert shape(same.weight) == shape(row.weight)
    assert (same.act is None) == (row.act is None)


def test_name_of_looks_past_the_float_type_and_direction_of_scales() -> None:
    nvfp4 = QuantSpec(E2M1, (Scale(E4M3, (1, 16)), Scale(F32, (0, 0), "div")))
    assert name_of(Format(nvfp4)) == "nvfp4-a16"
    assert name_of(Format(nvfp4, FORMATS["nvfp4"].act)) == "nvfp4"
    assert name_of(Format(spec(INT4, (BF16, 1, 128)))) == "int4-g128"
    assert name_of(Format(spec(UINT4, (F32, 1, 64), zeros=((UINT4, 1, 64),)))) == "int4-g64-asym"
    assert name_of(Format(spec(INT4, (F16, 1, 96)))) is None


def test_get_names_what_is_near() -> None:
    assert formats.get("nvfp4") is FORMATS["nvfp4"]
    with pytest.raises(SpecError, match="'int4' is not known; near: int4-tensor, int4-tensor-asym"):
        formats.get("int4")
    with pytest.raises(SpecError, match=r"'nvf4' is not known; near: .*nvfp4"):
        formats.get("nvf4")


def test_describe() -> None:
    assert describe(FORMATS["nvfp4"].weight) == "e2m1 x e4m3[1x16] x f32[tensor]"
    assert describe(FORMATS["fp8-block"].weight) == "e4m3 x f32[128x128]"
    assert describe(FORMATS["int4-g128-asym"].weight) == "uint4 x f16[1x128] - uint4[1x128]"
    assert describe(FORMATS["nf4-dq"].weight) == "nf4 x dynamic8[flat64] x f32[flat16384] + f32[tensor]"
    assert describe(FORMATS["fp8-channel"].act or FORMATS["fp8-channel"].weight) == "e4m3 x f32[row dynamic]"


def test_a_spec_refuses_a_block_that_is_none() -> None:
    for block in ((-2, 4), (1, -1), (FLAT, 0)):
        with pytest.raises(SpecError, match="rows and cols must be >= 0"):
            Scale(F32, block) and QuantSpec(INT4, (Scale(F32, block),))


def test_an_unknown_rule_names_the_known() -> None:
    with pytest.raises(SpecError, match="rule 'guess' is not known; known: amax, double, four-over-six"):
        encode(normal(2, 32), replace(FORMATS["mxfp4"].weight, rule="guess"))
