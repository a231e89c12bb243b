"""An addition and the norms beside it in one call: on a CPU the bits of two calls, in Triton those of its norm."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit.kernels import fused
from fewbit.kernels.compiled import left_to_torch
from fewbit.kernels.rows import times
from fewbit.kernels.triton_runtime import lacking
from fewbit.modules import residual
from fewbit.modules.norm import TIMES, Norm, NormForm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
FORMS = [NormForm(1e-5, times, centred) for times in TIMES for centred in (False, True)]
SHAPES = ((1, 1, 24), (7, 24), (24,), (1, 3, 640), (300, 128))
native = pytest.mark.skipif(fused._native() is None, reason="needs a C++ compiler")
triton = pytest.mark.skipif(lacking(torch.device(DEVICE)) is not None, reason=str(lacking(torch.device(DEVICE))))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(d: int, form: NormForm, dtype: torch.dtype, seed: int, weight: bool = True, bias: bool = False) -> Norm:
    """A norm with random parameters, or without them."""
    w, b = (torch.nn.Parameter(random(d, dtype=dtype, seed=seed + i), requires_grad=False) for i in (0, 1))
    return Norm(w if weight else None, b if bias else None, form)


def norms(d: int, form: NormForm, dtype: torch.dtype) -> list[tuple[Norm | None, Norm | None]]:
    """Before and after."""
    one, other = made(d, form, dtype, 1), made(d, form, dtype, 3, bias=True)
    none = made(d, form, dtype, 5, weight=False)
    return [(None, one), (one, None), (one, other), (other, one), (none, other), (None, none)]


def pair(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and residual; small where eps matters."""
    x, r = random(*shape, dtype=dtype), 3 * random(*shape, dtype=dtype, seed=1)
    x.view(-1, shape[-1])[-1] *= 1e-3
    return x, r


def same(got: Tensor | None, want: Tensor | None) -> bool:
    return got is want if got is None or want is None else got.dtype == want.dtype and torch.equal(got, want)


@native
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_to_the_bit(form: NormForm, dtype: torch.dtype) -> None:
    """What torch's addition and the kernel of a norm give."""
    for shape in SHAPES:
        x, r = pair(shape, dtype)
        for before, after in norms(shape[-1], form, dtype):
            parts = before and before.norm_parts, after and after.norm_parts
            assert fused.takes_sum(x, r, *parts)
            total, y = fused.add_norm(x, r, *parts)
            want = r + (x if before is None else residual.by(before, x))
            assert same(total, want) and same(y, None if after is None else residual.by(after, want))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_near_the_oracle(form: NormForm, dtype: torch.dtype) -> None:
    """Strided ones too, and 16-bit ones with parameters in float32, which are left to two calls."""
    step = {torch.float32: 2.0**-19, torch.bfloat16: 2.0**-6}[dtype]
    wide = random(3, 4, 64, dtype=dtype)
    for x, r in (pair((5, 24), dtype), (wide[..., :24], wide[..., 30:54]), (wide[:, 1, :24], wide[:, 2, :24])):
        for of in DTYPES:
            for before, after in norms(24, form, of):
                got, want = (f(x, r, before, after) for f in (residual.add_normed, residual.add_norm))
                for a, b in zip(got, want, strict=True):
                    assert (a is None) == (b is None)
                    if a is not None and b is not None:
                        torch.testing.assert_close(a, b, rtol=step, atol=8 * step)


@triton
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton(form: NormForm, dtype: torch.dtype) -> None:
    """To the bit what the kernel of a norm makes of the sum; the interpreter cuts bfloat16 where torch rounds."""
    from fewbit.kernels import triton_add_norm, triton_norm

    def by(norm: Norm | None, x: Tensor) -> Tensor:
        return x if norm is None else triton_norm.norm(x, *norm.norm_parts)

    for shape in ((1, 1, 24), (7, 24), (24,), (1, 3, 640)):
        x, r = (t.to(DEVICE) for t in pair(shape, dtype))
        for before, after in norms(shape[-1], form, dtype):
            parts: Any = [norm and norm.to(DEVICE).norm_parts for norm in (before, after)]
            assert triton_add_norm.takes_sum(x, r, *parts) == (before is None or dtype != torch.float32)
            total, y = triton_add_norm.add_norm(x, r, *parts)
            torch.testing.assert_close(total, r + by(before, x), rtol=2.0**-7, atol=1e-6)
            assert same(y, None if after is None else by(after, total))


@triton
def test_triton_of_many_short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.kernels import triton_add_norm, triton_norm

    monkeypatch.setattr(triton_norm, "MANY", 1)
    (x, r), norm = (t.to(DEVICE) for t in pair((11, 16), torch.float32)), made(16, FORMS[0], torch.float32, 1)
    total, y = triton_add_norm.add_norm(x, r, None, norm.to(DEVICE).norm_parts)
    assert torch.equal(total, r + x) and same(y, triton_norm.norm(total, *norm.norm_parts))
    assert all(t is None or t.shape == (0, 16) for t in triton_add_norm.add_norm(x[:0], r[:0], None, norm.norm_parts))


def test_what_is_left_to_two_calls() -> None:
    from fewbit.kernels import triton_add_norm

    x, r, norm = random(3, 16), random(3, 16), made(16, FORMS[0], torch.float32, 1)
    for kernel in (triton_add_norm, fused) if lacking(torch.device(DEVICE)) is None else (fused,):
        takes: Any = kernel.takes_sum
        if kernel is not fused or fused._native() is not None:
            assert takes(x, r, None, norm.norm_parts)
        assert not takes(x, r[:1], None, norm.norm_parts) and not takes(x, r.bfloat16(), None, norm.norm_parts)
        assert not takes(x.T, r.T, None, None) and not takes(x[:, ::2], r[:, ::2], None, None)
        assert not takes(x.bfloat16(), r.bfloat16(), None, norm.norm_parts)
    with left_to_torch():
        assert not fused.takes_sum(x, r, None, norm.norm_parts)
    assert not fused.takes_sum(x.clone().requires_grad_(), r, None, norm.norm_parts)


@triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", [(True, False), (False, True), (True, True)], ids=str)
def test_scales_are_rounded_as_by_a_launch_of_their_own(which: tuple[bool, bool], dtype: torch.dtype) -> None:
    from fewbit.kernels import triton_add_norm

    for shape in SHAPES:
        x, r = (t.to(DEVICE) for t in pair(shape, dtype))
        held = random(x.numel() // shape[-1], 1, seed=7).to(DEVICE), random(shape[-1], seed=8).to(DEVICE)
        scales = tuple(t if asked else None for t, asked in zip(held, which, strict=True))
        after = made(shape[-1], FORMS[0], dtype, 1).to(DEVICE).norm_parts
        for before in (None, after):
            if not triton_add_norm.takes_sum(x, r, before, after):
                continue
            got = triton_add_norm.add_norm(x, r, before, after, None, scales)
            want = triton_add_norm.add_norm(times(x, *scales), r, before, after)
            step = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-6}[dtype]  # the interpreter cuts where a GPU rounds
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=step, atol=step * 8)
