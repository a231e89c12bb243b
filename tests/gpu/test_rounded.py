"""Rounding in one pass on a GPU: quant.reference.fake_quant bit for bit, and its counts."""

import pytest
import torch

from fewbit.kernels import saturation
from fewbit.kernels.rounded import rounded
from fewbit.quant.reference import fake_quant
from tests.kernels.rounding_cases import SPECS, TYPES, numbers, planes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("name", SPECS)
def test_equals_the_reference(name: str) -> None:
    s = SPECS[name]
    held = {n: plane.cuda() for n, plane in planes(s).items()}
    for dtype in TYPES:
        for columns in (128, 2048, 14336):
            x = numbers(dtype, columns).cuda()
            count = saturation.count_of(x.device)
            before = int(count)
            got = rounded(x, s, held)
            middle = int(count)
            saturation.count(x, s, held)
            want = fake_quant(x, s, held)
            assert got.dtype == dtype and torch.equal(got, want), (dtype, columns, int((got != want).sum()))
            assert middle - before == int(count) - middle


@pytest.mark.parametrize("kind", ["given", "by row", "mx-ceil", "in two levels", "under the largest of all"])
def test_within_a_graph(kind: str) -> None:
    s = SPECS[f"e2m1 {kind}"]
    held = {n: plane.cuda() for n, plane in planes(s).items()}
    x = numbers(torch.bfloat16, 2048).cuda()
    rounded(x, s, held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = rounded(x, s, held)
    x.mul_(0.37)
    graph.replay()
    assert torch.equal(got, fake_quant(x, s, held))
