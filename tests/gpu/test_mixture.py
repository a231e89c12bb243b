"""Routers, experts and latent attention on a GPU: each launch against what it stands for, and whole models."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fewbit.kernels.triton_experts import run_plain
from fewbit.models import fuse, hf, twin
from fewbit.models.fill import settle
from fewbit.models.shrink import shrink
from fewbit.modules import latent, norm, rotary, router
from fewbit.modules.norm import NormForm
from fewbit.modules.router import Choice, Groups, RouteForm
from tests.gpu.test_fuse import DTYPES, nan_memory, near, random

__all__ = ["nan_memory"]  # for each test
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
ROWS = (1, 7, 300)
DEEPSEEK = RouteForm("k", "wide", "sigmoid", "b", groups=Groups("g", "t"), divide="plus", eps=1e-20, scale="s")
CHOICES = {  # and experts
    "deepseek_v3": (Choice(DEEPSEEK, 8, 2.5, 8, 4), 256),
    "one group": (Choice(DEEPSEEK, 8, 2.5, 1, 1), 160),
    "deepseek_v2": (
        Choice(RouteForm("k", groups=Groups("g", "t", "one", 0.0, True), scale="s"), 6, 16.0, 8, 3), 160,
    ),
    "qwen3": (Choice(RouteForm("k", divide="plus"), 8), 128),
    "mixtral": (Choice(RouteForm("k", divide="plus"), 2), 8),
    "gpt_oss": (Choice(RouteForm("k", score="none", then="softmax"), 4), 32),
    "ernie": (Choice(RouteForm("k", bias="b", divide="least", eps=1e-12), 6), 64),
    "kolibri": (Choice(RouteForm("k", score="none", bias="b", then="sigmoid", divide="plus"), 10), 512),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_choice(name: str, dtype: torch.dtype) -> None:
    """Scores that are a rounding apart may change places, so nearly all tokens choose the same."""
    from fewbit.kernels import triton_choose

    by, count = CHOICES[name]
    bias = random(count, seed=1) / 8 if by.form.bias else None
    for rows in ROWS:
        logits = random(rows, count, seed=2)
        assert triton_choose.takes(logits, bias, by.top)
        weights, experts = triton_choose.choose(logits, bias, by, dtype)
        wanted, order = router.chosen(logits, bias, by)
        same = (experts == order).all(-1)
        assert float(same.float().mean()) >= (1.0 if rows < 100 else 0.99) and weights.dtype == dtype
        torch.testing.assert_close(weights[same].float(), wanted[same], rtol=1e-5 if dtype == torch.float32 else 2**-8,
                                   atol=1e-30)  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_choice_of_what_is_odd(name: str) -> None:
    from fewbit.kernels import triton_choose

    by, count = CHOICES[name]
    bias = torch.zeros(count, device="cuda") if by.form.bias else None
    flat = torch.zeros(3, count, device="cuda")
    _, experts = triton_choose.choose(flat, bias, by, torch.float32)
    assert experts.tolist() == [list(range(by.top))] * 3  # of equals the first
    flat[1, count - 1] = torch.nan
    weights, experts = triton_choose.choose(flat, bias, by, torch.float32)
    assert bool(((experts >= 0) & (experts < count)).all()) and bool(weights[1].isnan().any())
    assert bool(weights[[0, 2]].isfinite().all())
    if by.form.score != "softmax":
        assert experts[1, 0] == count - 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_in_float32(dtype: torch.dtype) -> None:
    for rows in ROWS:
        x, w = random(rows, 1024, dtype=dtype), random(64, 1024, dtype=dtype, seed=1)
        got = router.product(x, w, None, "wide")
        assert got.dtype == torch.float32
        assert twin.relative(got.double(), x.double() @ w.double().T) < 1e-5


@pytest.mark.parametrize("form", rotary.FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_assemble(form: rotary.RotaryForm, dtype: torch.dtype) -> None:
    from fewbit.kernels import triton_latent

    for tokens, heads, plain, rope, value in ((1, 128, 128, 64, 128), (300, 16, 128, 64, 128), (1100, 5, 96, 32, 64)):
        q, kv = (random(1, tokens, heads, plain + n, dtype=dtype, seed=s) for s, n in ((0, rope), (1, value)))
        turned = random(1, tokens, 512 + rope, dtype=dtype, seed=2)[..., 512:]
        entries = rope // 2 if form.table == "short" else rope
        cos, sin = (random(1, tokens, entries, dtype=dtype, seed=s) for s in (4, 5))
        assert triton_latent.takes(q, kv, turned, cos, sin, form.width(cos))
        got, want = (f(q, kv, turned, cos, sin, form) for f in (latent.assemble, latent.assembled))
        for a, b in zip(got, want, strict=True):
            near(a, b, of=8.0)
            assert torch.equal(a[..., :plain], b[..., :plain])


@pytest.mark.parametrize("form", rotary.FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_join(form: rotary.RotaryForm, dtype: torch.dtype) -> None:
    """A product of each head in its place, and one key for all heads."""
    for tokens, heads, plain, rope, rank in ((1, 128, 128, 64, 512), (300, 16, 128, 64, 512), (1100, 5, 96, 32, 40)):
        q = random(1, tokens, heads, plain + rope, dtype=dtype)
        both = random(1, tokens, rank + rope, dtype=dtype, seed=2)
        up = random(heads, plain + 64, rank, dtype=dtype, seed=3)[:, :plain] / plain**0.5
        entries = rope // 2 if form.table == "short" else rope
        cos, sin = (random(1, tokens, entries, dtype=dtype, seed=s) for s in (4, 5))
        queries, key = latent.absorb(q, both[..., :rank], both[..., rank:], up, cos, sin, form)
        want = torch.empty_like(queries.transpose(1, 2))
        want[..., :rank] = torch.einsum("bthp,hpc->bthc", q[..., :plain].float(), up.float())
        other = latent.joined(q, both[..., :rank], both[..., rank:], cos, sin, want, form)
        near(key.transpose(1, 2), other, of=8.0)
        near(queries.transpose(1, 2), want, of=8.0)


@pytest.mark.parametrize("times", norm.TIMES)
def test_norm_of_two(times: Any) -> None:
    from fewbit.kernels import triton_norm

    w, v = random(1536, dtype=torch.bfloat16, seed=1), random(512, dtype=torch.bfloat16, seed=2)
    for rows in ROWS:
        both = random(1, rows, 1536 + 576, dtype=torch.bfloat16)
        x, y = both[..., :1536], both[..., 1536 : 1536 + 512]
        assert triton_norm.takes_pair(x, y)
        got = norm.normed_pair(x, w, NormForm(1e-6, times), y, v, NormForm(1e-5, times))
        near(got[0], norm.norm(x, w, None, NormForm(1e-6, times)))
        near(got[1], norm.norm(y, v, None, NormForm(1e-5, times)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_read_tokens_where_they_stand(dtype: torch.dtype) -> None:
    w = random(8, 96, 256, dtype=dtype, seed=1) / 16
    for tokens in ROWS:
        x = random(tokens, 256, dtype=dtype)
        choices = torch.randint(0, 8, (tokens * 2,), generator=torch.Generator().manual_seed(tokens)).cuda()
        token, rows = choices.argsort(stable=True) // 2, torch.bincount(choices, minlength=8)
        assert torch.equal(run_plain(x, w, False, rows, token), run_plain(x[token], w, False, rows))


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe", "glm4_moe_lite", "mixtral", "gpt_oss", "minimax_m2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_logits(model_type: str, dtype: torch.dtype) -> None:
    extra = {"head_dim": 128} if model_type == "mixtral" else {}
    config = hf.read_config({"model_type": model_type, **extra})
    small = shrink(config)
    made = [twin.filled(small, twin.require(config))[1].to("cuda") for _ in range(2)]
    report = fuse.apply(made[1], fuse.plan(config))
    settle(made[1])
    assert report.count("route"), str(report)
    ids = torch.randint(10, 100, (2, 21), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.inference_mode():
        exact = made[0](input_ids=ids, use_cache=False).logits
        want, got = (m.to(dtype)(input_ids=ids, use_cache=False).logits for m in made)
    if dtype == torch.float32:
        assert twin.relative(got, want) < 1e-4
        return
    ours, theirs = ((t.float() - exact).square().mean(-1).sqrt().median() for t in (got, want))
    assert ours < 1.3 * theirs + 1e-3, f"from float32: fused {ours:.4f}, unfused {theirs:.4f}"


def test_a_choice_that_keeps_its_numbers() -> None:
    """Of one form with other numbers: nothing of the first call stays."""
    from fewbit.kernels import triton_choose

    by, count = CHOICES["deepseek_v3"]
    logits, bias = random(5, count), random(count, seed=1) / 8
    for changed in (by, replace(by, kept=1), replace(by, groups=4, kept=2), replace(by, top=3, scale=1.0)):
        got, want = (
            f(logits, bias, changed) for f in (lambda *a: triton_choose.choose(*a, torch.float32), router.chosen)
        )
        assert torch.equal(got[1], want[1])
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-30)
