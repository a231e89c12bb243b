"""ggml's block types against gguf-py: bytes to planes and back, decoded floats, and the codes of its quantizers."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType
from gguf import quants

from fewbit.errors import SpecError, UnsupportedError
from fewbit.quant import ggml, qtensor
from fewbit.quant.elements import E4M3
from fewbit.quant.ggml_rules import FITS, encode_blocks
from fewbit.quant.reference import decode, encode
from fewbit.quant.runs import RUNS
from fewbit.quant.spec import QuantSpec

SHAPE = (6, 512)
EXACT = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq2_0", "mxfp4")
SEARCHED = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs")
SIGNED_ZERO = ("mxfp4", "nvfp4")  # ggml's table has no -0: the value is the same, the sign bit of a zero is not
BITS = {
    "q2_k": 2.625,
    "q3_k": 3.4375,
    "q4_k": 4.5,
    "q5_k": 5.5,
    "q6_k": 6.5625,
    "iq4_xs": 4.25,
    "mxfp4": 4.25,
    "q1_0": 1.125,
}


def blocks(name: str, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    """Random bytes, with scales kept to numbers that a file could hold."""
    t = ggml.TYPES[name]
    raw = np.random.default_rng(len(name)).integers(0, 256, (*shape[:-1], shape[-1] // t.weights, t.nbytes), np.uint8)
    if name == "nvfp4":
        raw[..., :4] %= 0x7F
    if name == "mxfp4":
        raw[..., 0] %= 255
    return torch.from_numpy(raw.reshape(*shape[:-1], -1))


@pytest.mark.parametrize("name", ggml.TYPES)
def test_block_sizes_are_ggmls(name: str) -> None:
    t = ggml.TYPES[name]
    assert (t.weights, t.nbytes) == gguf.GGML_QUANT_SIZES[GGMLType[name.upper()]]
    bits = qtensor.bits_per_weight(t.spec)
    assert bits == pytest.approx(8 * t.nbytes / t.weights)
    assert bits == BITS.get(name, bits)


@pytest.mark.parametrize("shape", [SHAPE, (3, 2, 256), (1, 768)])
@pytest.mark.parametrize("name", ggml.TYPES)
def test_blocks_come_back_as_they_were(name: str, shape: tuple[int, ...]) -> None:
    raw = blocks(name, shape)
    q = ggml.from_blocks(raw, name, shape)
    assert q.shape == shape
    assert ggml.type_of(q.spec) == name
    assert torch.equal(ggml.to_blocks(q), raw)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", [name for name in ggml.TYPES if name != "q1_0"])
def test_decoded_floats_are_gguf_pys(name: str) -> None:
    raw = blocks(name)
    mine = decode(ggml.from_blocks(raw, name, SHAPE)).numpy()
    theirs = quants.dequantize(raw.numpy(), GGMLType[name.upper()])
    both_nan = np.isnan(mine) & np.isnan(theirs)
    if name in SIGNED_ZERO:
        assert (both_nan | (mine == theirs)).all()
    else:
        assert (both_nan | (mine.view(np.int32) == theirs.view(np.int32))).all()


def test_one_bit_blocks_are_signs_of_their_scale() -> None:
    raw = torch.zeros(1, 18, dtype=torch.uint8)
    raw[0, :2] = torch.tensor([2.5]).half().view(torch.uint8)
    raw[0, 2] = 0b101
    values = decode(ggml.from_blocks(raw, "q1_0", (1, 128)))
    assert values[0, :4].tolist() == [2.5, -2.5, 2.5, -2.5]
    assert torch.equal(ggml.to_blocks(encode(values, ggml.TYPES["q1_0"].spec)), raw)


def test_nvfp4_keeps_its_tensor_scale_beside_the_blocks() -> None:
    raw = blocks("nvfp4", (2, 4, 64))
    scale = torch.tensor([0.5, 4.0]).view(2, 1, 1)
    plain = ggml.from_blocks(raw, "nvfp4", (2, 4, 64))
    scaled = ggml.from_blocks(raw, "nvfp4", (2, 4, 64), {"scale1": scale})
    assert ggml.TYPES["nvfp4"].side == ("scale1",)
    assert torch.equal(decode(scaled), decode(plain) * scale)


def weights() -> dict[str, np.ndarray]:
    g = np.random.default_rng(0)
    normal = g.standard_normal((24, 512)).astype(np.float32)
    mixed = normal.copy()
    mixed[:2], mixed[2:4], mixed[4:6] = 0, 1, np.abs(mixed[4:6])
    mixed[6:8] *= 1e-6
    mixed[8:10] *= 1e4
    power = np.ldexp(np.float32(1), np.arange(-20, 4))[:, None]
    edges = g.uniform(-1, 1, (24, 512)).astype(np.float32) * power
    edges[:, ::32] = np.nextafter(power, np.float32(0))
    edges[:, 1::64] = power
    ties = (g.integers(-8, 8, (24, 512)) / 4).astype(np.float32)
    return {
        "normal": normal,
        "bf16": torch.from_numpy(normal).bfloat16().float().numpy(),
        "mixed": mixed,
        "edges": edges,
        "ties": ties,
    }


@pytest.mark.parametrize("name", EXACT)
def test_simple_rules_repeat_gguf_py_to_the_byte(name: str) -> None:
    for label, w in weights().items():
        mine = ggml.to_blocks(encode(torch.from_numpy(w), ggml.TYPES[name].spec), name)
        assert np.array_equal(mine.numpy(), quants.quantize(w, GGMLType[name.upper()])), label


def plain(w: torch.Tensor, name: str) -> torch.Tensor:
    """Rounding between each sub-block's extremes with an exact scale: the bar a search has to clear."""
    t = ggml.TYPES[name]
    x = torch.unflatten(w, -1, (-1, t.spec.scales[0].block[1]))
    low = x.amin(-1, keepdim=True).clamp(max=0) if t.spec.zeros else torch.zeros(1)
    reach = t.spec.element.max if t.spec.zeros else -t.spec.element.min
    scale = (x - low).abs().amax(-1, keepdim=True).clamp(min=1e-30) / reach
    table = torch.tensor(sorted(t.spec.element.table) or range(int(t.spec.element.min), int(t.spec.element.max) + 1))
    nearest = ((x - low) / scale).unsqueeze(-1).sub(table.float()).abs().argmin(-1)
    return (table.float()[nearest] * scale + low).flatten(-2)


def error(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor | float = 1.0) -> float:
    return float(((a - b).square() * weight).sum())


@pytest.mark.parametrize("name", SEARCHED)
def test_searched_scales_lose_less_than_plain_rounding(name: str) -> None:
    normal = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    for w in (normal, normal**3, normal.abs()):
        assert error(decode(encode(w, ggml.TYPES[name].spec)), w) < error(plain(w, name), w)


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_moves_the_error_to_where_it_costs_less(name: str) -> None:
    g = torch.Generator().manual_seed(2)
    w, importance = torch.randn(32, 512, generator=g), torch.rand(512, generator=g) ** 4
    spec = ggml.TYPES[name].spec
    even = decode(encode(w, spec))
    weighted = decode(encode_blocks(FITS[spec.rule], w, spec, importance))
    assert error(weighted, w, importance) < error(even, w, importance)
    assert error(weighted, w) > error(even, w)


@pytest.mark.parametrize("name", [*EXACT, *SEARCHED, "q1_0"])
def test_encode_survives_what_weights_may_be(name: str) -> None:
    spec = ggml.TYPES[name].spec
    for value in (0.0, 1.0, -3.0, 1e-30, -1e-8):
        w = torch.full((2, 256), value)
        back = decode(encode(w, spec))
        assert bool(torch.isfinite(back).all())
        assert error(back, w) <= max(error(w, torch.zeros(1)) * 0.2, 1e-12)
    assert torch.equal(decode(encode(torch.zeros(3, 2, 256), spec)), torch.zeros(3, 2, 256))


def test_refusals_say_what_would_work() -> None:
    with pytest.raises(UnsupportedError, match="iq2_xs"):
        encode(torch.zeros(1, 256), ggml.TYPES["iq2_xs"].spec)
    with pytest.raises(SpecError, match="blocks of 256; a row of 288"):
        encode(torch.zeros(1, 288), ggml.TYPES["q4_k"].spec)
    with pytest.raises(SpecError, match="float16 ends at 65504"):
        encode(torch.full((1, 32), 1e6), ggml.TYPES["q4_0"].spec)
    with pytest.raises(SpecError, match=r"want uint8 \[2, 18\]"):
        ggml.from_blocks(torch.zeros(2, 17, dtype=torch.uint8), "q4_0", (2, 32))
    with pytest.raises(SpecError, match="e4m3 is not a ggml type"):
        ggml.to_blocks(qtensor.empty(QuantSpec(E4M3), (1, 32)))


def test_runs_are_the_types_without_scale_planes() -> None:
    assert {e.name for e in RUNS} == {name for name, t in ggml.TYPES.items() if not t.spec.scales}
