"""Greedy tokens of a GPU: those of a CPU, whatever stands beside a row, and in a CUDA graph."""

import pytest
import torch

from fewbit.engine.params import SamplingParams
from fewbit.engine.sampler import Sampler
from fewbit.engine.sampler_row import Row
from fewbit.kernels.triton_argmax import argmax
from tests.kernels.test_triton_argmax import named

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
ROW = Row(SamplingParams(temperature=0), [1], [], 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1003, 32000, 128256, 262147])
def test_greedy_as_a_cpu(vocab: int, dtype: torch.dtype) -> None:
    logits = torch.randn(33, vocab, generator=torch.Generator().manual_seed(0)).to(dtype)  # with ties in 16 bits
    logits[3, 7], logits[5], logits[6, 99] = torch.nan, -torch.inf, torch.inf
    want = [int((row == row.max()).nonzero()[0]) for row in logits.nan_to_num(9.0)]
    for count in (1, 5, 33):
        found = Sampler(vocab, "cuda").sample(logits[-count:].cuda(), [ROW] * count)
        sound = [i for i, bad in enumerate(found.bad) if not bad]
        assert [found.tokens[i] for i in sound] == [want[i - count] for i in sound]
        assert found.bad == [not bool(row.max().isfinite()) for row in logits[-count:]]


def test_in_a_graph() -> None:
    logits = torch.randn(4, 50000, device="cuda")
    argmax(logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, values = named(argmax(logits))
    for _ in range(3):
        logits.normal_()
        graph.replay()
        assert torch.equal(values, logits.amax(-1).double()) and torch.equal(tokens, logits.argmax(-1))
