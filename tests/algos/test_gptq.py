"""gptq against the textbook in float64, over every format, and on Hessians that are hard on purpose."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fewbit.algos import get
from fewbit.algos.hessian import factor, usable
from fewbit.quant.formats import ROWS
from fewbit.quant.ggml import GGML_RULES
from fewbit.quant.qtensor import Quantized
from fewbit.quant.reference import decode, encode, linear
from fewbit.quant.spec import Format
from tests.algos.plain import cases, loss, same, sound, specs, stats, weight

GPTQ = get("gptq")
PLAIN = {"scale": "amax", "refine": 0}


def solve(ws, spec, seen, **given):
    group = ws if isinstance(ws, list) else [ws]
    return GPTQ.encode(group, [spec] * len(group), seen, GPTQ.options(**given))


def textbook(w, h, group, damp=0.01, order=None):
    """Frantar et al., column by column with the inverse of H; scales of signed 4-bit codes by the range."""
    w, h, k = w.double().clone(), h.double().clone(), w.shape[1]
    dead = h.diagonal() == 0
    mean = h.diagonal()[~dead].mean()
    h += damp * mean * torch.eye(k, dtype=torch.float64)
    h[dead, dead] = mean
    scales = torch.stack([(w[:, j : j + group].abs().amax(1) / 7.5).half().double() for j in range(0, k, group)], 1)
    index = torch.arange(k) if order is None else order
    w, h = w[:, index], h[index][:, index]
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    out = torch.zeros_like(w)
    for j in range(k):
        if order is None and j % group == 0:
            scales[:, j // group] = (w[:, j : j + group].abs().amax(1) / 7.5).half().double()
        s = scales[:, index[j] // group].where(scales[:, index[j] // group] > 0, torch.ones(()).double())
        out[:, j] = (w[:, j] / s).round().clamp(-8, 7) * s
        w[:, j + 1 :] -= ((w[:, j] - out[:, j]) / upper[j, j])[:, None] * upper[j, j + 1 :]
    return out[:, index.argsort()]


@pytest.mark.parametrize("how", ["off", "static"])
@pytest.mark.parametrize("damp", [0.01, 0.3])
def test_agrees_with_the_textbook(how, damp):
    torch.manual_seed(3)
    w, x = torch.randn(32, 256) * 0.02, torch.randn(900, 256) @ torch.randn(256, 256) / 16
    x[:, 5] *= 10
    h = x.T @ x / 900
    seen = replace(stats(256), hessian=h)
    (found,) = solve(w, ROWS["int4-g64"].weight, seen, order=how, damp=damp, **PLAIN)
    order = None if how == "off" else torch.argsort(h.diagonal(), descending=True, stable=True)
    want = textbook(w, h, 64, damp, order)
    same_codes = torch.isclose(decode(found.weight).double(), want, rtol=1e-3, atol=1e-6)
    assert same_codes.double().mean() > 0.97  # one tie that falls the other way changes what follows in its row
    e = want - w
    assert found.log["loss"] == pytest.approx(float(((e @ h.double()) * e).sum()), rel=0.02)


def test_with_independent_inputs_it_is_rounding_to_nearest():
    for name, spec, w in cases():
        seen = replace(stats(w.shape[1]), hessian=torch.eye(w.shape[1]))
        (found,) = solve(w, spec, seen, order="off", **PLAIN)
        plain = encode(w, spec)
        if spec.rule in GGML_RULES:  # they round with scales that are not stored yet, and halves away from zero
            assert loss(found.weight, w, seen.hessian) <= loss(plain, w, seen.hessian), name
        else:
            assert torch.equal(decode(found.weight), decode(plain)), name


def test_never_worse_than_rounding_to_nearest_and_repeats_itself():
    for i, (name, spec, w) in enumerate(cases()):
        seen = stats(w.shape[1])
        (found,) = solve(w, spec, seen)
        sound(found.weight, spec, w)
        floor = loss(encode(w, spec), w, seen.hessian)
        assert loss(found.weight, w, seen.hessian) <= floor * (1 + 1e-4), name
        assert found.log["rtn_loss"] == pytest.approx(floor, rel=1e-3), name
        assert i % 5 or same(found.weight, solve(w, spec, seen)[0].weight), name


@pytest.mark.parametrize("name", list(specs()))
def test_every_format_gains(name):
    w, spec = torch.randn(24, 256, generator=torch.Generator().manual_seed(0)) * 0.02, specs()[name]
    (found,) = solve(w, spec, stats(256))
    assert "why" not in found.log
    assert found.log["loss"] < 0.8 * found.log["rtn_loss"]


@pytest.mark.parametrize("name", ["int4-g64", "int3-g64-asym", "nvfp4", "nf4", "int4-channel", "mxfp4", "q4_0"])
@pytest.mark.parametrize("how", ["off", "weight", "static", "group"])
def test_more_passes_never_cost_more(name, how):
    w, seen = torch.randn(24, 256, generator=torch.Generator().manual_seed(1)) * 0.02, stats(256)
    losses = [solve(w, ROWS[name].weight, seen, order=how, refine=n)[0].log["loss"] for n in (0, 1, 2, 5)]
    assert all(b <= a * (1 + 5e-3) for a, b in pairwise(losses)), losses
    assert losses[-1] < losses[0]


def test_siblings_are_solved_as_if_alone():
    ws = [weight((24, 256)), weight((8, 256), 4), weight((24, 256), 5)]
    for name in ("int4-g64", "int3-g32-asym", "nf4", "int8-tensor", "fp8-block", "q4_k"):
        spec = ROWS[name].weight
        together = solve(ws, spec, stats(256))
        for w, found in zip(ws, together, strict=True):
            (alone,) = solve(w, spec, stats(256))
            close = torch.isclose(decode(found.weight), decode(alone.weight), rtol=1e-3, atol=1e-5).float().mean()
            assert close > 0.95, name  # products of matrices of other sizes round otherwise


def test_siblings_of_several_specs_keep_their_own():
    mixed = [ROWS[name].weight for name in ("int4-g64", "nvfp4", "int4-g64", "nvfp4")]
    ws = [weight((16, 256), seed) for seed in range(4)]
    found = GPTQ.encode(ws, mixed, stats(256), GPTQ.options())
    assert [e.weight.spec for e in found] == mixed
    assert torch.equal(found[1].weight.planes["scale1"], found[3].weight.planes["scale1"])


@pytest.mark.parametrize("given", [{"order": "group"}, {"hadamard": 32}, {"order": "group", "hadamard": 16}])
@pytest.mark.parametrize("name", ["int4-g64", "int4-g32-asym", "nvfp4"])
def test_transforms_belong_to_the_weight(name, given):
    w, seen, spec = weight((24, 256)), stats(256), ROWS[name].weight
    (found,) = solve(w, spec, seen, **given)
    kinds = tuple(t.kind for t in found.transforms)
    assert kinds == ("rotate",) * ("hadamard" in given) + ("permute",) * ("order" in given)
    x = seen.sample
    y = linear(x, Quantized(Format(spec, None, kinds), found.weight, {}, found.transforms))
    plain = x @ decode(encode(w, spec)).T
    assert (y - x @ w.T).square().sum() < (plain - x @ w.T).square().sum()


def test_a_rotation_that_does_not_divide_is_left_out_and_said():
    (found,) = solve(weight((7, 301)), ROWS["int4-g64"].weight, stats(301), hadamard=64)
    assert found.transforms == ()
    assert "do not divide 301" in found.log["why"]


def hessians():
    g = torch.Generator().manual_seed(2)
    k = 128
    few = torch.randn(5, k, generator=g)
    full = torch.randn(4000, k, generator=g)
    full[:, 3] *= 1e6
    zero, one = torch.zeros(k, k), torch.zeros(k, k)
    one[7, 7] = 3
    bad = full.T @ full
    bad[0, 0] = torch.nan
    indefinite = torch.randn(k, k, generator=g)
    return {
        "rank 5": few.T @ few,
        "outlier": full.T @ full / 4000,
        "equal columns": torch.ones(k, k),
        "tiny": few.T @ few * 1e-30,
        "huge": few.T @ few * 1e25,
        "one column": one,
        "zero": zero,
        "nan": bad,
        "indefinite": indefinite + indefinite.T + 8 * torch.eye(k),
    }


@pytest.mark.parametrize("kind", list(hessians()))
@pytest.mark.parametrize("name", ["int4-g64", "int2-g32-asym", "nvfp4", "q4_0", "fp8-channel"])
def test_no_hessian_kills_it(kind, name):
    w, h, spec = weight((8, 128)), hessians()[kind], ROWS[name].weight
    for damp in (0.0, 0.01):
        (found,) = solve(w, spec, replace(stats(128), hessian=h), damp=damp)
        sound(found.weight, spec, w)
        if kind in ("zero", "nan"):
            assert "rounded to nearest" in found.log["why"]
            assert same(found.weight, encode(w, spec))
        else:
            assert found.log["loss"] <= found.log["rtn_loss"]


def test_without_statistics_it_rounds_to_nearest_and_says_so():
    w, spec = weight((8, 128)), ROWS["int4-g64"].weight
    for seen in (None, replace(stats(128), hessian=None)):
        (found,) = solve(w, spec, seen)
        assert same(found.weight, encode(w, spec))
        assert "no hessian" in found.log["why"]


def test_damping_grows_until_it_pays_and_is_logged():
    h = hessians()["indefinite"]
    assert factor(usable(h), 0.01) is None
    (found,) = solve(weight((8, 128)), ROWS["int4-g64"].weight, replace(stats(128), hessian=h))
    assert found.log["damp"] > 0.01


def test_dead_columns_are_counted_and_rounded_plainly():
    seen = stats(256)
    (found,) = solve(weight((8, 256)), ROWS["int4-channel"].weight, seen, **PLAIN)
    assert found.log["dead"] == 1
    plain = decode(encode(weight((8, 256)), ROWS["int4-channel"].weight))
    assert torch.equal(decode(found.weight)[:, 9], plain[:, 9])


def test_weights_of_any_float_type_are_left_as_they_were():
    w = weight((8, 128)).bfloat16()
    before, seen = w.clone(), stats(128)
    h = seen.hessian.clone()
    solve(w, ROWS["int4-g64"].weight, seen)
    assert torch.equal(w, before)
    assert torch.equal(seen.hessian, h)
