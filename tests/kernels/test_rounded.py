"""One pass rounds as quant.reference.fake_quant does, bit for bit: in C++, and in Triton through its interpreter."""

import ctypes

import pytest
import torch

from fewbit.kernels import rounded as module
from fewbit.kernels import saturation
from fewbit.kernels.compiled import library
from fewbit.kernels.rounded import Grid, grid, rounded
from fewbit.quant.elements import E5M2, F32, NF4
from fewbit.quant.reference import fake_quant
from fewbit.quant.spec import spec
from tests.kernels.rounding_cases import SPECS, TYPES, numbers, planes


@pytest.mark.parametrize("name", SPECS)
def test_on_a_cpu(name: str) -> None:
    if not isinstance(library("round"), ctypes.CDLL):
        pytest.skip(str(library("round")))
    s = SPECS[name]
    assert isinstance(grid(s), Grid)
    for dtype in TYPES:
        for columns in (128, 2000):
            x = numbers(dtype, columns)
            want = fake_quant(x, s, planes(s))
            got = rounded(x, s, planes(s))
            assert got.dtype == dtype and torch.equal(got, want), (dtype, columns, int((got != want).sum()))


def test_what_it_does_not_take_is_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    x = numbers(torch.float32, 96)
    table = spec(NF4, (F32, 1, 32), dynamic=1)
    assert isinstance(grid(table), str) and torch.equal(rounded(x, table, {}), fake_quant(x, table))
    runs = SPECS["e4m3 by 32"]
    ragged = x[..., :40]
    assert torch.equal(rounded(ragged, runs, {}), fake_quant(ragged, runs))
    monkeypatch.setattr(module, "library", lambda name: "no compiler")
    assert torch.equal(rounded(x, runs, {}), fake_quant(x, runs))


@pytest.mark.parametrize("kind", ["by row", "mx-ceil", "in two levels"])
@pytest.mark.parametrize("element", ["e4m3", "e2m1", "int8"])
def test_a_number_that_is_none_is_seen(element: str, kind: str) -> None:
    x = torch.randn(3, 64)
    x[1, 5] = torch.nan
    s = SPECS[f"{element} {kind}"]
    got = rounded(x, s, planes(s))
    assert bool(got[1, 5].isnan()) and bool(got[[0, 2]].isfinite().all())


def test_what_a_given_scale_cuts_off_is_counted() -> None:
    s = spec(E5M2, (F32, 0, 0))
    x = torch.tensor([[1.0, 57344.0, 57345.0, -1e6] * 8192])
    before = saturation.total()
    rounded(x, s, {"scale0": torch.ones(1, 1)})
    assert saturation.total() - before == 2 * 8192


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where a GPU would be silent
@pytest.mark.parametrize("name", [n for n in SPECS if n.split()[0] in ("inputs", "e2m1", "e5m2", "int4")])
def test_in_triton(name: str) -> None:
    triton_round = pytest.importorskip("fewbit.kernels.triton_round")
    s, how = SPECS[name], grid(SPECS[name])
    assert isinstance(how, Grid)
    x = numbers(torch.float32, 128)  # the interpreter cuts 16-bit results off
    count = torch.zeros((), dtype=torch.int64)
    given = module._given(how, s, planes(s))
    got = triton_round.rounded(x, how, given, count if how.rule == module.GIVEN else None)
    assert torch.equal(got, fake_quant(x, s, planes(s)))
    if how.rule == module.GIVEN:
        before = saturation.total()
        saturation.count(x, s, planes(s))
        assert int(count) == saturation.total() - before > 0


def test_rows_longer_than_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_round = pytest.importorskip("fewbit.kernels.triton_round")
    monkeypatch.setattr(triton_round, "HELD", 32)
    s = SPECS["e4m3 by row"]
    x = numbers(torch.float32, 80)
    how = grid(s)
    assert isinstance(how, Grid)
    assert torch.equal(triton_round.rounded(x, how, None, None), fake_quant(x, s))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["inputs of nvfp4", "e2m1 under the largest of all"])
@pytest.mark.parametrize("times", [1.0, 0.0, 1e-36, torch.inf, torch.nan])
def test_the_largest_of_all(name: str, times: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by several programs, as C++ does; also where there is none, or none that a scale can be made of."""
    triton_round = pytest.importorskip("fewbit.kernels.triton_round")
    monkeypatch.setattr(triton_round, "PARTS", 4)
    s = SPECS[name]
    how = grid(s)
    assert isinstance(how, Grid) and how.whole
    x = torch.randn(33, 256, generator=torch.Generator().manual_seed(0))
    x[20:, 7] *= times
    x[:20] *= 1.0 if times == 1.0 else 0.0
    want = rounded(x, s, {})
    assert times * 0 != 0 or torch.equal(want, fake_quant(x, s))  # codes of 4 bits have no NaN
    torch.testing.assert_close(triton_round.rounded(x, how, None, None), want, rtol=0, atol=0, equal_nan=True)
