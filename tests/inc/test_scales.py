"""Scale methods against numpy and ml_dtypes, and against scales that INC itself wrote on a Gaudi 2."""

import math

import numpy as np
import pytest
import torch

from fewbit.inc.scales import (
    METHODS,
    UNITS,
    Rule,
    act_spec,
    candidates,
    channel_scales,
    least,
    losses,
    scale_of,
    weight_spec,
)
from fewbit.quant.reference import encode, fake_quant
from tests.inc import plain

MAXIMA = (0.0, 1e-4, 0.03, 0.1162109375, 0.9, 4.40625, 60.0, 60.1, 91.5, 1500.0, 1e5)


@pytest.mark.parametrize("unit", UNITS, ids="-".join)
@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if not m.dynamic])
def test_activations(name: str, unit: tuple[str, str]) -> None:
    for amax in MAXIMA:
        found = scale_of(amax, METHODS[name].act, UNITS[unit], plain.ACT).item()
        want = plain.act(name.lower(), amax, unit) or 1.0  # a tensor of zeros is divided by something
        assert math.isclose(found, want, rel_tol=1e-12), (amax, found, want)


@pytest.mark.parametrize("unit", UNITS, ids="-".join)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("spread", [0.02, 1.0, 700.0])
def test_weights(name: str, unit: tuple[str, str], spread: float) -> None:
    w = torch.randn(6, 64, generator=torch.Generator().manual_seed(7)) * spread
    w[2] *= 30
    rule, own = METHODS[name].weight, UNITS[unit]
    if rule.per == "channel":
        found = channel_scales(w, rule, own, plain.WEIGHT)
    elif rule.choose == "opt":
        steps = candidates(rule, own)
        found = torch.tensor(steps[least(losses(w, [torch.tensor(s) for s in steps], own.element).sum(-1))])
    else:
        found = scale_of(w.abs().amax(), rule, own, plain.WEIGHT)
    np.testing.assert_allclose(found.numpy(), plain.weight(name.lower(), w.numpy(), unit), rtol=1e-12)


@pytest.mark.parametrize("unit", UNITS, ids="-".join)
def test_values_are_what_the_device_has(unit: tuple[str, str]) -> None:
    """Every rounding, and what is beyond the largest value: 240 on a Gaudi 2, where 448 would be on others."""
    x = torch.cat([torch.linspace(-600, 600, 20001), torch.logspace(-8, 6, 4000), torch.tensor([240.0, 248.0, 449.0])])
    own = UNITS[unit]
    for scale in (1.0, 0.0625, 0.37):
        found = fake_quant(x[None], act_spec(Rule("none"), own), {"scale0": torch.tensor([[scale]])})[0]
        np.testing.assert_array_equal(found.numpy(), plain.rounded(x.numpy(), scale, unit))
    codes = encode(x[None], weight_spec(Rule("none"), own), {"scale0": torch.ones(1, 1)}).planes["codes"][0]
    want = np.clip(x.numpy(), -own.element.max, own.element.max).astype(plain.TYPES[unit][0]).view(np.uint8)
    np.testing.assert_array_equal(codes.numpy(), want)


@pytest.mark.parametrize("unit", [("GAUDI2", "E4M3"), ("GAUDI3", "E4M3")], ids="-".join)
def test_tokens(unit: tuple[str, str]) -> None:
    """A power of two for each row, chosen when it comes; the whole range is used."""
    x = torch.randn(9, 32) * torch.logspace(-3, 3, 9)[:, None]
    found = fake_quant(x, act_spec(METHODS["MAXABS_PCS_POW2"].act, UNITS[unit]))
    top = plain.TYPES[unit][1]
    for row, got in zip(x.numpy(), found.numpy(), strict=True):
        np.testing.assert_array_equal(got, plain.rounded(row, plain.pow2(float(np.abs(row).max()) / top), unit))


# maximum and scale: DeepSeek-R1-Distill-Llama-70B, maxabs_hw by INC on a Gaudi 2 (files of vllm-hpu-extension)
WRITTEN = {
    "input": [(4.40625, 1.0), (0.1162109375, 0.00390625), (0.625, 0.0625), (5.625, 1.0), (1.0, 0.0625), (0.25, 0.0625),
              (192.0, 16.0), (125.0, 16.0), (7.53125, 1.0), (1.4609375, 0.0625), (26.375, 1.0), (0.373046875, 0.0625),
              (0.044189453125, 0.00390625), (2.96875, 0.0625), (0.42578125, 0.0625)],
    "weight": [(91.5, 1.0), (0.625, 0.0625), (2.375, 0.0625), (10.5625, 1.0), (0.3984375, 0.00390625),
               (2.015625, 0.0625), (0.34375, 0.00390625), (5.125, 0.0625)],
}  # fmt: skip


@pytest.mark.parametrize("what", WRITTEN)
def test_scales_that_inc_wrote(what: str) -> None:
    backoff = {"input": plain.ACT, "weight": plain.WEIGHT}[what]
    for amax, scale in WRITTEN[what]:
        assert scale_of(amax, METHODS["MAXABS_HW"].act, UNITS["GAUDI2", "E4M3"], backoff).item() == scale, amax
