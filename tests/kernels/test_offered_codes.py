"""What is rounded as it is made: the codes that its reader would have chosen, bit for bit, and only if asked for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit.kernels.input_rounding import Rounding, Wanted, offered
from fewbit.kernels.triton_runtime import lacking
from tests.kernels.test_quantize_rows import SPECS, how

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(lacking(torch.device(DEVICE)) is not None, reason=str(lacking(torch.device(DEVICE))))
BY_ROW = {name: how(spec) for name, spec in SPECS.items() if not how(spec).columns and not how(spec).given}
Made = Callable[[Tensor, Tensor, Wanted], Tensor]


def norm(x: Tensor, w: Tensor, wanted: Wanted) -> Tensor:
    from fewbit.kernels import triton_norm

    return triton_norm.norm(x, w, w, 1e-5, "late", wanted=wanted)


def add_norm(x: Tensor, w: Tensor, wanted: Wanted) -> Tensor:
    from fewbit.kernels import triton_add_norm

    y = triton_add_norm.add_norm(x, x * 0.5, None, (w, w, 1e-5, "plus", True), wanted)[1]
    assert y is not None
    return y


def gated(x: Tensor, w: Tensor, wanted: Wanted) -> Tensor:
    from fewbit.kernels import triton_glu

    return triton_glu.act_mul(x, x + w, "silu", 1.0, float("inf"), 0.0, wanted)


@pytest.mark.parametrize("width", [72, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BY_ROW)
@pytest.mark.parametrize("make", [norm, add_norm, gated])
def test_as_the_reader(make: Made, name: str, dtype: torch.dtype, width: int) -> None:
    from fewbit.kernels.triton_quantize import input_codes, quantize_rows

    draw = torch.Generator().manual_seed(width)
    x, w = (torch.randn(*size, width, generator=draw).to(DEVICE, dtype) for size in ((2, 3), ()))
    if make is gated:
        x[1, 2] = 0  # a row without a magnitude
    wanted, how = Wanted(), BY_ROW[name]
    plain = make(x, w, wanted)
    first = input_codes(plain, how)  # who reads it rounds it, and says how
    assert wanted.how == how and offered(plain, how) is None
    again = make(x, w, wanted)
    assert torch.equal(again, plain)
    found = input_codes(again, how)
    assert found is offered(again, how)
    for got, want, own in zip(found, first, quantize_rows(plain.view(-1, width), how), strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)) and torch.equal(want.float(), own.float())


@pytest.mark.parametrize(("act", "limit", "plus"), [("silu", float("inf"), 0.0), ("sigmoid", 0.7, 1.0)])
@pytest.mark.parametrize("name", BY_ROW)
def test_rows_of_several_steps(name: str, act: str, limit: float, plus: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one in part beyond the row; gate and up side by side in one tensor."""
    from fewbit.kernels import triton_glu
    from fewbit.kernels.triton_quantize import quantize_rows

    gate, up = torch.randn(3, 2 * 150, generator=torch.Generator().manual_seed(0)).to(DEVICE).chunk(2, -1)
    how = BY_ROW[name]
    plain = triton_glu.act_mul(gate, up, act, 1.0, limit, plus)
    monkeypatch.setattr(triton_glu, "_shape", lambda n, rows: (64, 3, 1))
    made = triton_glu.act_mul(gate, up, act, 1.0, limit, plus, Wanted(how))
    assert torch.equal(made, plain)
    codes = offered(made, how)
    assert codes is not None
    for got, want in zip(codes, quantize_rows(plain, how), strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("rows", [3, 256])
@pytest.mark.parametrize("n", [1, 100, 2048, 14336, 28672, 1 << 15])
def test_a_row_in_registers(n: int, rows: int) -> None:
    from fewbit.kernels.triton_glu import _shape

    block, steps, warps = _shape(n, rows)
    assert (steps - 1) * block < n <= steps * block <= 64 * 32 * warps


def test_of_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of another rounding are not taken, nor those of a view of the tensor."""
    from fewbit.kernels import triton_quantize

    one, other = (Rounding("e4m3", 0, False, reach, 1.0, False) for reach in (448.0, 240.0))
    wanted = Wanted(one)
    y = norm(torch.randn(4, 64, device=DEVICE), torch.ones(64, device=DEVICE), wanted)
    assert offered(y, one) is not None and offered(y[:2], one) is None and offered(y.clone(), one) is None
    assert offered(y, Rounding("e4m3", 32, False, 448.0, 1.0, False)) is None and wanted.how == one
    assert offered(y, other) is None and wanted.how == other
    asked: list[Any] = []
    monkeypatch.setattr(triton_quantize, "quantize_rows", lambda *a: asked.append(a) or (a[0], a[0]))
    triton_quantize.input_codes(y, other)
    assert len(asked) == 1


def test_codes_alone() -> None:
    """Who reads nothing else is given nothing else; asked for another rounding, it is told."""
    from fewbit.kernels.triton_quantize import input_codes

    one, other = (Rounding("e4m3", 0, False, reach, 1.0, False) for reach in (448.0, 240.0))
    x = torch.randn(2, 3, 72, device=DEVICE)
    want = input_codes(gated(x, x, Wanted()), one)
    made = gated(x, x, Wanted(one, codes_only=True))
    assert made.shape == x.shape and bool(made.isnan().all())
    for got, each in zip(input_codes(made, one), want, strict=True):
        assert torch.equal(got.view(torch.uint8), each.view(torch.uint8))
    with pytest.raises(AssertionError, match="240"):
        input_codes(made, other)
    assert not gated(x, x, Wanted(codes_only=True)).isnan().any()  # it has not said how it rounds
