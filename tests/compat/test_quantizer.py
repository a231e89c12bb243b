"""A quantizer rounds as the reference does, holds the scales the reference chooses, and lets gradients through."""

import pytest
import torch

from fewbit.compat.quantizer import Quantizer, block_amax
from fewbit.errors import SpecError
from fewbit.quant.elements import E2M1, E4M3, E8M0, F32, INT4, INT8
from fewbit.quant.reference import choose, decode, encode, fake_quant
from fewbit.quant.spec import QuantSpec, Scale, spec

WEIGHTS = {
    "fp8": spec(E4M3, (F32, 0, 0)),
    "fp8-rows": spec(E4M3, (F32, 1, 0)),
    "fp8-blocks": spec(E4M3, (F32, 32, 32)),
    "int4": spec(INT4, (F32, 1, 32)),
    "int8": spec(INT8, (F32, 1, 0)),
    "nvfp4": spec(E2M1, (E4M3, 1, 16), (F32, 0, 0)),
    "nvfp4-46": QuantSpec(E2M1, (Scale(E4M3, (1, 16)), Scale(F32, (0, 0))), rule="four-over-six"),
    "mxfp4": spec(E2M1, (E8M0, 1, 32), rule="mx-ceil"),
    "mxfp8": spec(E4M3, (E8M0, 1, 32), rule="mx-ceil"),
}
INPUTS = {
    "fp8": spec(E4M3, (F32, 0, 0)),
    "int8": spec(INT8, (F32, 0, 0)),
    "nvfp4": QuantSpec(E2M1, (Scale(E4M3, (1, 16), dynamic=True), Scale(F32, (0, 0)))),
    "tokens": spec(E4M3, (F32, 1, 0), dynamic=1),
    "mxfp8": spec(E4M3, (E8M0, 1, 32), rule="mx-ceil", dynamic=1),
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("zero", [False, True])
def test_weights_are_what_encode_makes_of_them(name: str, zero: bool) -> None:
    w, s = noise(64, 96), WEIGHTS[name]
    if zero:
        w[3:40] = 0
    quantizer = Quantizer(s, weight=True)
    quantizer.hold(block_amax(w, s))
    assert torch.equal(quantizer(w), decode(encode(w, s)))
    assert torch.equal(quantizer(w.bfloat16()), decode(encode(w.bfloat16(), s, quantizer.planes)).bfloat16())
    chosen = choose(w, s, {})
    for plane, value in quantizer.planes.items():
        assert torch.equal(value, chosen[plane].expand(value.shape))


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_are_what_fake_quant_makes_of_them(name: str) -> None:
    quantizer = Quantizer(INPUTS[name])
    quantizer.hold(torch.tensor([[3.0]]))
    x = noise(2, 5, 96, seed=1)
    assert torch.equal(quantizer(x), fake_quant(x, INPUTS[name], quantizer.planes))
    again = Quantizer(INPUTS[name])
    again.hold(x.abs().max().view(1, 1))
    assert torch.equal(again(x), fake_quant(x, INPUTS[name]))


def test_a_stack_is_its_matrices() -> None:
    w = noise(3, 64, 96)
    for s in WEIGHTS.values():
        quantizer = Quantizer(s, weight=True)
        quantizer.hold(block_amax(w, s))
        assert torch.equal(quantizer(w), torch.stack([decode(encode(m, s)) for m in w]))


def test_watching_keeps_the_largest() -> None:
    quantizer = Quantizer(INPUTS["fp8"])
    quantizer.watch = "plain"
    for scale in (1.0, 4.0, 2.0):
        x = noise(3, 32) * scale
        assert torch.equal(quantizer(x), x)
    assert float(quantizer.amax) == float(noise(3, 32).abs().max() * 4)
    quantizer.watch = "rounded"
    assert not torch.equal(quantizer(x), x)


@pytest.mark.parametrize("name", WEIGHTS)
def test_gradients_pass_where_nothing_is_clipped(name: str) -> None:
    w = noise(64, 96)
    quantizer = Quantizer(WEIGHTS[name], weight=True)
    quantizer.hold(block_amax(w, WEIGHTS[name]))
    at = w.clone().requires_grad_()
    quantizer(at).backward(g := noise(64, 96, seed=2))
    assert torch.equal(at.grad, g)
    grown = (w * torch.linspace(0.1, 3, 96)).requires_grad_()
    quantizer(grown).backward(torch.ones(64, 96))
    moved = grown.grad == 0
    assert bool(moved.any()) == bool(quantizer.planes)  # scales that follow the weight clip nothing
    if name == "fp8":
        assert torch.equal(moved, grown.detach().abs() > w.abs().max() * 1.001)
    quantizer.pass_through = True
    grown.grad = None
    quantizer(grown).backward(torch.ones(64, 96))
    assert bool((grown.grad == 1).all())


def test_smoothing_comes_first_and_off_means_off() -> None:
    quantizer = Quantizer(INPUTS["fp8"])
    quantizer._pre_quant_scale = torch.full((96,), 0.5)
    quantizer.hold(torch.ones(1, 1))
    x = noise(4, 96)
    assert torch.equal(quantizer(x), fake_quant(x * 0.5, INPUTS["fp8"], quantizer.planes))
    quantizer.enabled = False
    assert torch.equal(quantizer(x), x * 0.5)
    assert torch.equal(Quantizer()(x), x)


def test_a_weight_that_is_not_finite() -> None:
    w = noise(8, 32)
    w[0, 0] = torch.nan
    with pytest.raises(SpecError, match="NaN"):
        Quantizer(WEIGHTS["fp8"], weight=True).encode(w)
