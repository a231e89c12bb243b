"""The three fused kernels in Triton's interpreter against their torch forms."""

from math import inf

import pytest
import torch
from torch import Tensor

from fewbit.kernels.input_rounding import Wanted
from fewbit.kernels.triton_runtime import lacking
from fewbit.modules import glu, norm, rotary
from fewbit.modules.glu import Gating
from tests.kernels.test_quantize_rows import SPECS, how

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(lacking(torch.device(DEVICE)) is not None, reason=str(lacking(torch.device(DEVICE)))),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]
DTYPES = (torch.float32, torch.bfloat16)
TURNS = [  # forms, numbers and tables; what is turned in float32 is so where one of the two is float32 anyway
    (form, dtype, tables) for form in rotary.FORMS
    for dtype, tables in (*((d, d) for d in DTYPES), (torch.bfloat16, torch.float32))
    if not form.wide or tables == torch.bfloat16
]  # fmt: skip
# two roundings of a value each one off; the interpreter cuts bfloat16 where a GPU rounds
STEP = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-6}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def near(got: Tensor, want: Tensor, of: float = 0.0) -> None:
    """of: the size of what is added up, where results can be smaller."""
    assert got.shape == want.shape and got.dtype == want.dtype
    step = STEP[want.dtype]
    torch.testing.assert_close(got, want, rtol=step, atol=max(1e-6, of * step))


FORMS = [norm.NormForm(1e-5, times, centred) for times in norm.TIMES for centred in (False, True)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(form: norm.NormForm, dtype: torch.dtype) -> None:
    from fewbit.kernels import triton_norm

    w, b = random(24, dtype=dtype, seed=1), random(24, dtype=dtype, seed=2)
    wide = random(1, 3, 2, 40, dtype=dtype, seed=3)
    wide[:, 1] *= 1e-3  # where eps matters
    for x, weight, bias in (
        (wide[0, :, 0, :24].contiguous(), w, None), (wide[..., :24].transpose(1, 2), w, b),
        (wide[..., 8:32], None, None), (wide[0, 1, 0, :24], w, None),
    ):  # fmt: skip
        assert triton_norm.takes(x)
        got = triton_norm.norm(x, weight, bias, form.eps, form.times, form.centred)
        near(got, norm.norm(x, weight, bias, form), of=0.0 if bias is None else 4.0)
        assert got.stride() == (x + 0).stride()


def test_norm_of_many_short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.kernels import triton_norm

    monkeypatch.setattr(triton_norm, "MANY", 1)
    x, w = random(11, 16), random(16, seed=1)
    near(triton_norm.norm(x, w, None, 1e-6, "wide"), norm.norm(x, w, None, norm.NormForm(1e-6)))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_of_two(form: norm.NormForm, dtype: torch.dtype) -> None:
    """Each as if alone; parts of one product, of other widths and eps, also of another type than their weights."""
    from fewbit.kernels import triton_norm

    both, rows = random(2, 3, 80, dtype=dtype, seed=3), random(5, 80, dtype=dtype, seed=4)
    for x, y in ((both[..., :24], both[..., 24:69]), (both[:1, :, :24], both[:1, :, 24:69]), (rows, rows[:, 7:9])):
        for kind in {dtype, torch.float32}:
            w, v = random(x.shape[-1], dtype=kind, seed=1), random(y.shape[-1], dtype=kind, seed=2)
            assert triton_norm.takes_pair(x, y)
            got = triton_norm.pair(x, w, form.eps, y, v, 1e-2, form.times, form.centred)
            for found, t, weight, eps in zip(got, (x, y), (w, v), (form.eps, 1e-2), strict=True):
                alone = triton_norm.norm(t, weight, None, eps, form.times, form.centred)
                assert torch.equal(found, alone) and found.dtype == alone.dtype and found.is_contiguous()
    assert not triton_norm.takes_pair(both.transpose(0, 1), both.transpose(0, 1))
    assert not triton_norm.takes_pair(both, both[:, :2]) and not triton_norm.takes_pair(both, both[:, :, ::2])
    assert not triton_norm.takes_pair(rows[0], rows[0])


def test_norm_with_a_weight_of_another_type() -> None:
    from fewbit.kernels import triton_norm

    x, w = random(3, 16, dtype=torch.bfloat16), random(16, seed=1)
    for times in norm.TIMES:
        got, want = triton_norm.norm(x, w, None, 1e-6, times), norm.norm(x, w, None, norm.NormForm(1e-6, times))
        assert got.dtype == want.dtype
        near(got.bfloat16(), want.bfloat16())


GATINGS = [Gating(act, glu.ALPHA.get(act, 1.0)) for act in glu.ACTIVATIONS]
GATINGS += [Gating("quick_gelu", 1.5, limit=2.0, plus=1.0), Gating("silu", limit=2.0), Gating("relu", plus=1.0)]


@pytest.mark.parametrize("by", GATINGS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_glu(by: Gating, dtype: torch.dtype) -> None:
    from fewbit.kernels import triton_glu

    both = 3 * random(1, 2, 600, dtype=dtype)
    for gate, up in (*(half(both) for half in glu.HALVES.values()), (both[0, 0], both[0, 1])):
        assert triton_glu.takes(gate, up)
        got = triton_glu.act_mul(gate, up, by.act, by.alpha, by.limit, by.plus)
        near(got, glu.multiplied(gate, up, by), of=4.0)
    assert set(triton_glu.ACTS) == set(glu.ACTIVATIONS)


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("of", ["rows", "columns", "both"])
@pytest.mark.parametrize("half", glu.HALVES)
def test_glu_of_what_is_yet_to_be_scaled(half: glu.Half, of: str, rounds: bool) -> None:
    """To the bit what scaling and rounding first gives; and so does the way without a kernel."""
    from fewbit.kernels import triton_glu
    from fewbit.kernels.triton_scale import scale_

    y = 3 * random(5, 200, dtype=torch.float32 if DEVICE == "cpu" else torch.bfloat16)
    rows = random(5, 1).abs() if of != "columns" else None
    columns = random(200).abs() if of != "rows" else None
    scales = (rows, *(glu.HALVES[half](columns) if columns is not None else (None, None)))
    wanted = Wanted(how(SPECS["token"])) if rounds else None
    want = triton_glu.act_mul(*glu.HALVES[half](scale_(y.clone(), rows, columns, None)), "silu", 1.0, inf, 0.0)
    assert torch.equal(triton_glu.act_mul(*glu.HALVES[half](y), "silu", 1.0, inf, 0.0, wanted, scales), want)
    near(glu.multiplied(*glu.scaled(*glu.HALVES[half](y), scales), Gating("silu")), want, of=4.0)


def test_glu_in_large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.kernels import triton_glu

    monkeypatch.setattr(triton_glu, "FULL", 1)
    for half in glu.HALVES.values():
        gate, up = half(random(2, 1100))
        near(triton_glu.act_mul(gate, up, "silu", 1.0, 0.5, 0.0), glu.multiplied(gate, up, Gating("silu", limit=0.5)))


def test_no_limit_hides_nan() -> None:
    from fewbit.kernels import triton_glu

    none, one = torch.full((3,), torch.nan, device=DEVICE), torch.ones(3, device=DEVICE)
    for pair in ((none, one), (one, none)):
        assert bool(triton_glu.act_mul(*pair, "quick_gelu", 1.7, 7.0, 1.0).isnan().all())


@pytest.mark.parametrize(("form", "dtype", "tables"), TURNS, ids=str)
def test_rotary(form: rotary.RotaryForm, dtype: torch.dtype, tables: torch.dtype) -> None:
    from fewbit.kernels import triton_rotary

    packed = random(2, 3, 9, 16, dtype=dtype)
    q, k = packed[:, :, :5], packed[:, :, 6:8]
    for heads in (1, 2):
        q, k = (t.transpose(1, 2) for t in (q, k))
        for width, batch in ((16, 2), (12, 1)):
            entries = width // 2 if form.table == "short" else width
            cos, sin = (random(batch, 3, entries, dtype=tables, seed=s) for s in (4, 5))
            got = triton_rotary.rotate(q, k, form.with_tables(cos, sin, dtype), heads)
            for found, x in zip(got, (q, k), strict=True):
                near(found, rotary.turned(x, cos.unsqueeze(heads), sin.unsqueeze(heads), form), of=4.0)
                assert found.stride() == (x + 0).stride()
