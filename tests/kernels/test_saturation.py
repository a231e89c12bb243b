"""Values that static scales cut off are counted; where a scale is chosen at each call, none are."""

import pytest
import torch

from fewbit.kernels import saturation
from fewbit.kernels.rounded import rounded
from fewbit.quant.elements import F32, INT8
from fewbit.quant.formats import FORMATS, TENSOR_FP8, TOKEN_FP8, TOKEN_INT8
from fewbit.quant.reference import fake_quant
from fewbit.quant.spec import QuantSpec, spec

STATIC_INT8 = spec(INT8, (F32, 0, 0))


@pytest.mark.parametrize(("form", "low", "high"), [(TENSOR_FP8, -896.0, 896.0), (STATIC_INT8, -256.0, 254.0)])
def test_static(form: QuantSpec, low: float, high: float) -> None:
    planes = {"scale0": torch.full((1, 1), 2.0)}
    x = torch.tensor([[low, low - 5, high, high + 5], [1.0, 0.0, 1e5, float("nan")]])
    before = saturation.total()
    got = rounded(x, form, planes)
    assert saturation.total() - before == 3
    assert torch.equal(got[0], fake_quant(x, form, planes)[0])


def test_dynamic() -> None:
    before = saturation.total()
    for form in (TOKEN_FP8, TOKEN_INT8, FORMATS["mxfp8"].act):
        assert form is not None
        rounded(torch.randn(3, 64) * 1e6, form, {})
    assert saturation.total() == before


def test_counted_first_in_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saturation, "_COUNTS", {})
    x, planes = torch.full((1, 2), 1e5), {"scale0": torch.full((1, 1), 2.0)}
    with torch.inference_mode():
        rounded(x, TENSOR_FP8, planes)
    rounded(x, TENSOR_FP8, planes)
    assert saturation.total() == 4
