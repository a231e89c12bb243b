"""linear against plain torch: transforms, static and dynamic activations, bias, leading axes."""

import pytest
import torch
from torch.nn.functional import linear as plain_linear

from fewbit.errors import SpecError
from fewbit.quant.elements import E4M3, F32, INT8, UINT8
from fewbit.quant.formats import FORMATS, ROWS, TENSOR_FP8
from fewbit.quant.qtensor import Quantized, Transform
from fewbit.quant.reference import decode, encode, fake_quant, linear, transformed
from fewbit.quant.spec import Format, spec

N, K = 24, 512
GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(2, 5, K, generator=GENERATOR)
BIAS = torch.randn(N, generator=GENERATOR)
INDEX = torch.randperm(K, generator=GENERATOR)
SCALE = torch.rand(K, generator=GENERATOR) + 0.5
MATRIX = torch.linalg.qr(torch.randn(64, 64, generator=GENERATOR)).Q
A, B = torch.randn(4, K, generator=GENERATOR), torch.randn(N, 4, generator=GENERATOR)
WEIGHT = torch.randn(N, K, generator=GENERATOR)

PERMUTE = Transform("permute", {"index": INDEX})
INPUT_SCALE = Transform("input_scale", {"scale": SCALE})
ROTATE = Transform("rotate", {"matrix": MATRIX})
LOW_RANK = Transform("low_rank", {"a": A, "b": B})


def rotated(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([part @ MATRIX for part in x.split(64, -1)], -1)


TRANSFORMS = {
    "none": ((), lambda x: x, 0),
    "permute": ((PERMUTE,), lambda x: x[..., INDEX], 0),
    "input scale": ((INPUT_SCALE,), lambda x: x * SCALE, 0),
    "rotate": ((ROTATE,), rotated, 0),
    "low rank": ((LOW_RANK,), lambda x: x, 1),
    "in order": ((INPUT_SCALE, PERMUTE), lambda x: (x * SCALE)[..., INDEX], 0),
    "the other order": ((PERMUTE, INPUT_SCALE), lambda x: x[..., INDEX] * SCALE, 0),
    "all": ((INPUT_SCALE, ROTATE, PERMUTE, LOW_RANK), lambda x: rotated(x * SCALE)[..., INDEX], 1),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("act", [None, "fp8-channel", "nvfp4"])
def test_transforms(name: str, act: str | None) -> None:
    transforms, rewrite, low_rank = TRANSFORMS[name]
    rounding = FORMATS[act].act if act else None
    q = Quantized(
        Format(FORMATS["int4-g128"].weight, rounding), encode(WEIGHT, FORMATS["int4-g128"].weight), {}, transforms
    )
    x = rewrite(X)  # the same to the bit but for rotations, whose sums may be taken in another order
    torch.testing.assert_close(transformed(X, transforms), x, rtol=1e-5, atol=1e-5)
    rounded = fake_quant(transformed(X, transforms), rounding) if rounding else x
    want = plain_linear(rounded, decode(q.weight), BIAS)
    if low_rank:
        want = want + x @ A.T @ B.T
    torch.testing.assert_close(linear(X, q, BIAS), want, rtol=1e-5, atol=1e-4)
    off = plain_linear(x, decode(q.weight), BIAS) + (x @ A.T @ B.T if low_rank else 0)
    torch.testing.assert_close(linear(X, q, BIAS, activations=False), off, rtol=1e-5, atol=1e-4)


def test_a_rewrite_of_both_sides_is_exact() -> None:
    """permute, scale and rotate, undone in the weight, give the plain linear."""
    weight = (WEIGHT / SCALE)[:, INDEX]
    exact = Format(spec(E4M3, (F32, 1, 1)))  # a scale to each weight: as good as float
    q = Quantized(exact, encode(weight, exact.weight), {}, (INPUT_SCALE, PERMUTE))
    torch.testing.assert_close(linear(X, q), plain_linear(X, WEIGHT), rtol=1e-4, atol=1e-3)
    turned = torch.cat([part @ MATRIX for part in WEIGHT.split(64, -1)], -1)
    q = Quantized(exact, encode(turned, exact.weight), {}, (ROTATE,))
    torch.testing.assert_close(linear(X, q), plain_linear(X, WEIGHT), rtol=1e-4, atol=1e-3)


def test_an_unknown_transform_is_an_error() -> None:
    q = Quantized(FORMATS["mxfp4-a16"], encode(WEIGHT, FORMATS["mxfp4"].weight), {}, (Transform("twist", {}),))
    with pytest.raises(SpecError, match="transform 'twist' is not known"):
        linear(X, q)


@pytest.mark.parametrize("name", [n for n, row in ROWS.items() if row.weight.element.kind != "run"])
def test_every_format(name: str) -> None:
    row = FORMATS[name]
    act = {"scale0": torch.full((1, 1), 0.01)} if row.act and not row.act.dynamic else {}
    q = Quantized(row, encode(WEIGHT, row.weight), act)
    rounded = fake_quant(X, row.act, act) if row.act else X
    want = plain_linear(rounded.double(), decode(q.weight).double(), BIAS.double())
    torch.testing.assert_close(linear(X, q, BIAS).double(), want, rtol=1e-5, atol=1e-3)
    y = linear(X.bfloat16(), q)
    assert y.dtype == torch.bfloat16


def test_static_activations_use_the_stored_scale() -> None:
    scale = torch.full((1, 1), 0.004)
    want = (X / 0.004).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.004
    torch.testing.assert_close(fake_quant(X, TENSOR_FP8, {"scale0": scale}), want, rtol=1e-6, atol=0)


def test_dynamic_activations_have_a_scale_for_each_token() -> None:
    x = X * torch.logspace(-3, 3, 10).view(2, 5, 1)
    rounded = fake_quant(x, FORMATS["int8-channel-a8"].act or TENSOR_FP8)
    step = x.abs().amax(-1, keepdim=True) / 127.5
    torch.testing.assert_close(rounded, (x / step).round().clamp(-128, 127) * step, rtol=1e-5, atol=0)
    one = fake_quant(x[1:2, 2:3], FORMATS["int8-channel-a8"].act or TENSOR_FP8)
    assert torch.equal(one, rounded[1:2, 2:3])


def test_asymmetric_activations_with_stored_zeros() -> None:
    act = spec(UINT8, (F32, 0, 0), zeros=((UINT8, 0, 0),), rule="range")
    planes = {"scale0": torch.full((1, 1), 0.05), "zero0": torch.full((1, 1), 100, dtype=torch.uint8)}
    want = ((X / 0.05 + 100).round().clamp(0, 255) - 100) * 0.05
    torch.testing.assert_close(fake_quant(X, act, planes), want, rtol=1e-6, atol=1e-6)


def test_half_given_activations_choose_the_rest() -> None:
    """NVFP4 input: the tensor scale is stored, the block scales are dynamic."""
    act = FORMATS["nvfp4"].act
    assert act is not None
    s2 = X.abs().max() / (6 * 448)
    rounded = fake_quant(X, act, {"scale1": s2.view(1, 1)})
    assert torch.equal(rounded, fake_quant(X, act))
    assert not torch.equal(rounded, fake_quant(X, act, {"scale1": s2.view(1, 1) * 3}))


def test_no_tokens_give_no_rows() -> None:
    for name in ("int8-channel-a8", "nvfp4", "mxfp8", "fp8-block", "q8_0"):
        row = FORMATS[name]
        q = Quantized(row, encode(WEIGHT, row.weight))
        assert linear(X[:0], q, BIAS).shape == (0, 5, N)


def test_integers_multiply_as_integers_would() -> None:
    """int8 by int8: the result is the integer product times both scales."""
    row = FORMATS["int8-channel-a8"]
    q = Quantized(row, encode(WEIGHT, row.weight))
    x = X.view(-1, K)
    assert row.act is not None
    qx = encode(x, row.act)
    integer = qx.planes["codes"].view(torch.int8).long() @ q.weight.planes["codes"].view(torch.int8).long().T
    want = integer.double() * qx.planes["scale0"].double() * q.weight.planes["scale0"].double().T
    torch.testing.assert_close(linear(x, q).double(), want, rtol=1e-4, atol=1e-3)
    assert row.weight.element == INT8
