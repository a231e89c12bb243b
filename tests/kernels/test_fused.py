"""The loops between the linears on a CPU against their torch forms, whatever the strides."""

import pytest
import torch
from torch import Tensor

from fewbit.kernels import fused
from fewbit.kernels.compiled import left_to_torch
from fewbit.modules import glu, norm, rotary
from fewbit.modules.glu import Gating

pytestmark = pytest.mark.skipif(fused._native() is None, reason="needs a C++ compiler")
DTYPES = (torch.float32, torch.bfloat16)
STEP = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-6}  # two roundings of a value, each one off


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(got: Tensor, want: Tensor, of: float = 0.0) -> None:
    """of: the size of what is added up, where results can be smaller."""
    assert got.shape == want.shape and got.dtype == want.dtype
    step = STEP[want.dtype]
    torch.testing.assert_close(got, want, rtol=step, atol=max(1e-7, of * step))


FORMS = [norm.NormForm(1e-5, times, centred) for times in norm.TIMES for centred in (False, True)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(form: norm.NormForm, dtype: torch.dtype) -> None:
    w, b = random(24, dtype=dtype, seed=1), random(24, dtype=dtype, seed=2)
    wide = random(1, 3, 2, 40, dtype=dtype, seed=3)
    wide[:, 1] *= 1e-3  # where eps matters
    many = random(4000, 24, dtype=dtype)  # for which threads are asked
    for x, weight, bias in (
        (wide[0, :, 0, :24].contiguous(), w, None), (wide[..., :24].transpose(1, 2), w, b), (wide[..., 8:32], None, b),
        (wide[..., 8:32], None, None), (wide[0, 1, 0, :24], w, None), (many, w, None),
    ):  # fmt: skip
        assert fused.takes_norm(x, weight, bias)
        got = fused.norm(x, weight, bias, form.eps, form.times, form.centred)
        near(got, norm.norm(x, weight, bias, form), of=4.0)
        assert got.stride() == (x + 0).stride()


GATINGS = [Gating(act, glu.ALPHA.get(act, 1.0)) for act in fused.ACTS]
GATINGS += [Gating("quick_gelu", 1.5, limit=2.0, plus=1.0), Gating("silu", limit=2.0), Gating("relu", plus=1.0)]


@pytest.mark.parametrize("by", GATINGS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_glu(by: Gating, dtype: torch.dtype) -> None:
    numbers = by.act, by.alpha, by.limit, by.plus
    both = 3 * random(70, 2, 600, dtype=dtype)
    ends = torch.tensor([0.0, -0.0, 1e-30, 20.0, -20.0, 200.0, -200.0, 1e4, -1e4], dtype=dtype)
    halves = [half(both) for half in glu.HALVES.values()]
    for gate, up in (*halves, (both[:, 0], both[:, 1]), (ends, ends.new_ones(9)), (ends.new_ones(9), ends)):
        assert fused.takes_gate(gate, up, by.act)
        near(fused.act_mul(gate, up, *numbers), glu.multiplied(gate, up, by), of=4.0)
    none, one = torch.full((3,), torch.nan, dtype=dtype), torch.ones(3, dtype=dtype)
    assert all(bool(fused.act_mul(*pair, *numbers).isnan().all()) for pair in ((none, one), (one, none)))


@pytest.mark.parametrize("form", rotary.FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tables", DTYPES, ids=str)
def test_rotary(form: rotary.RotaryForm, dtype: torch.dtype, tables: torch.dtype) -> None:
    if (dtype, tables) == (torch.float32, torch.bfloat16):
        pytest.skip("no model has such tables")
    held = random(2, 5, 6, 20, dtype=dtype)  # [B, T, H, D]
    q, k = held[:, :, :4], held[:, :, 4:]
    for width in (12, 20):
        entries = width // 2 if form.table == "short" else width
        for batches in (1, 2):
            cos, sin = (
                random(batches, 5, entries, dtype=tables, seed=1),
                random(batches, 5, entries, dtype=tables, seed=2),
            )
            for heads in (1, 2):
                a, b = (t.transpose(1, 2) if heads == 1 else t for t in (q, k))
                assert fused.takes_rotary(a, b, cos, sin, width, heads)
                found = rotary.rotate(a, b, cos, sin, form, heads)
                wide = cos.unsqueeze(heads), sin.unsqueeze(heads)
                for got, x in zip(found, (a, b), strict=True):
                    want = rotary.turned(x, *wide, form)
                    near(got, want, of=4.0)
                    assert got.stride() == want.stride()


def test_what_is_gone_back_through_is_left_to_torch() -> None:
    x, w = random(3, 16), random(16).requires_grad_()
    assert not fused.takes_norm(x, w, None) and not fused.takes_gate(w, w, "silu")
    with torch.inference_mode():
        assert fused.takes_norm(x, w, None)
    assert not fused.takes_norm(x, w.detach().bfloat16(), None) and not fused.takes_gate(x.half(), x.half(), "silu")
    with left_to_torch():
        assert not fused.takes_norm(x, None, None)
    assert fused.takes_norm(x, None, None)
    assert not fused.takes_norm(x.T, None, None) and not fused.takes_gate(x, x, "gelu")
    assert not fused.takes_gate(x.T, x.T, "silu") and not fused.takes_gate(x[:, ::2], x[:, :8], "silu")
