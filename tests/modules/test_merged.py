"""Merged linears give what each gave alone, multiply once for one tensor, and keep nothing afterwards."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn

from fewbit.errors import UnsupportedError
from fewbit.modules.linear import Linear, Options
from fewbit.modules.merged import Slice, merge
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import Quantized, Transform
from fewbit.quant.reference import encode

SIZES = (48, 16, 32)


def dense(bias: bool = True) -> list[Linear]:
    torch.manual_seed(0)
    return [Linear.of(nn.Linear(64, n, bias=bias).requires_grad_(False)) for n in SIZES]


def quantized(name: str, n: int, **beside: object) -> Quantized:
    w = torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) / 8
    return Quantized(FORMATS[name], encode(w, FORMATS[name].weight), **beside)  # type: ignore[arg-type]


def bound(name: str = "int4-g32") -> list[Linear]:
    linears = dense()
    for linear, n in zip(linears, SIZES, strict=True):
        linear.bind((quantized(name, n),), Options())
    return linears


@pytest.mark.parametrize("make", [dense, lambda: dense(False), bound, lambda: bound("nvfp4")])
def test_equal(make: Callable[[], list[Linear]]) -> None:
    alone, slices = make(), merge(make())
    x = torch.randn(2, 3, 64)
    with torch.inference_mode():
        for one, slice in zip(alone, slices, strict=True):
            torch.testing.assert_close(slice(x), one(x))
            assert torch.equal(slice.weight, one.weight)
            assert (slice.bias is None) == (one.bias is None)


def test_multiplies_once_and_keeps_nothing() -> None:
    slices = merge(dense())
    merged, calls = slices[0].merged, []
    merged.linear.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 64)
    for order in ((0, 1, 2), (2, 0, 1)):
        calls.clear()
        for i in order:
            slices[i](x)
        assert len(calls) == 1 and merged.x is None and not merged.waiting


def test_another_tensor_multiplies_anew() -> None:
    alone, slices = dense(), merge(dense())
    x, other = torch.randn(2, 64), torch.randn(2, 64)
    for i, given in ((0, x), (1, other), (1, other), (0, x), (2, x), (1, x)):
        torch.testing.assert_close(slices[i](given), alone[i](given))


def test_a_tensor_that_was_changed_in_place_multiplies_anew() -> None:
    alone, slices = dense(), merge(dense())
    x = torch.randn(2, 64)
    with torch.no_grad():
        for one, slice in zip(alone, slices, strict=True):
            torch.testing.assert_close(slice(x), one(x))
            x.mul_(1.25)


def test_weights_are_views_that_move_with_the_whole() -> None:
    model = nn.ModuleList(merge(dense()))
    assert [n for n, _ in model.named_parameters()] == ["0.whole.weight", "0.whole.bias"]
    copy = deepcopy(model)
    for held in (model, copy):
        held.to(torch.float64)
        assert all(m.weight.dtype == torch.float64 and m.weight._base is not None for m in held)
        assert held[2](torch.randn(1, 64).double()).shape == (1, 32)
    assert copy[0].merged.linear is copy[0].whole is not model[0].whole
    assert isinstance(copy[1], Slice)


def test_several_parts_of_one_linear_become_one() -> None:
    linears = [Linear.of(nn.Linear(64, 48)), Linear.of(nn.Linear(64, 16))]
    linears[0].bind((quantized("int4-g32", 16), quantized("int4-g32", 32)), Options())
    linears[1].bind((quantized("int4-g32", 16),), Options())
    whole = merge(linears)[0].whole
    assert len(whole.pending) == 1 and whole.pending[0].weight.shape == (64, 64)


def hooked() -> list[Linear]:
    linears = dense()
    linears[1].register_forward_hook(lambda *_: None)
    return linears


def settled() -> list[Linear]:
    linears = bound()
    for linear in linears:
        linear.settle()
    return linears


def mixed(*held: Quantized) -> list[Linear]:
    linears = dense()
    for linear, q in zip(linears, held, strict=False):
        linear.bind((q,), Options())
    return linears


def scaled(n: int, value: float) -> Quantized:
    return quantized("int4-g32", n, transforms=(Transform("input_scale", {"scale": torch.full((64,), value)}),))


REFUSED: tuple[tuple[Callable[[], list[Linear]], str], ...] = (
    (hooked, "before or after"),
    (settled, "layout of a kernel"),
    (lambda: [*dense()[:2], *dense(False)[2:]], "some have a bias"),
    (lambda: mixed(quantized("int4-g32", 48)), "are quantized"),
    (lambda: [*dense()[:2], Linear.of(nn.Linear(32, 8))], "different widths"),
    (lambda: [*dense()[:2], dense()[2].half()], "differ in type"),
    (lambda: [dense()[0]] * 2, "a linear of its own"),
    (lambda: mixed(quantized("int4-g32", 48), quantized("int8-channel", 16), quantized("int4-g32", 32)), "beside"),
    (lambda: mixed(scaled(48, 1.0), scaled(16, 2.0), scaled(32, 1.0)), "different values"),
    (lambda: mixed(scaled(48, 1.0), quantized("int4-g32", 16), scaled(32, 1.0)), "different transforms"),
)


@pytest.mark.parametrize(("make", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_refuses(make: Callable[[], list[Linear]], why: str) -> None:
    linears = make()
    with pytest.raises(UnsupportedError, match=why):
        merge(linears)
    assert all(linear.bias is None or linear.bias.shape == (linear.out_features,) for linear in linears)


def test_equal_transforms_merge() -> None:
    linears = mixed(*(scaled(n, 0.5) for n in SIZES))
    slices, x = merge(linears), torch.randn(3, 64)
    alone = mixed(*(scaled(n, 0.5) for n in SIZES))
    for one, slice in zip(alone, slices, strict=True):
        torch.testing.assert_close(slice(x), one(x))
