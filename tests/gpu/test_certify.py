"""Certificates of the kernels of a GPU: one format of each kind here, all of them with -m "gpu and slow"."""

import pytest
import torch

from fewbit.kernels import humming_linear
from fewbit.workflows.certify import ROWS, K, certify, writable

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("default"),  # those of humming and its compiler are not ours
]  # fmt: skip
KEY = ("fp8-tensor", "fp8-channel", "fp8-block", "int4-g128", "int4-g128-a8fp8", "int8-channel-a8", "nvfp4", "mxfp4",
       "q4_k", "q6_k", "nf4")  # fmt: skip
REST = [name for name in writable() if name not in KEY]


@pytest.mark.parametrize("name", [*KEY, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)])
def test_holds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(humming_linear, "ROWS", (*ROWS, K))
    found = list(certify([name], "cuda", ("scaled", "humming", "humming-rounded", "triton")))
    assert found and all(one.ok for one in found), [one for one in found if not one.ok]
