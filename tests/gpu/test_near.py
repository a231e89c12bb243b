"""Sums through memory that ranks share, with both ranks on one GPU: what two GPUs do is in test_parallel."""

import time

import pytest
import torch

from fewbit.kernels import few, near
from fewbit.kernels.near import MOST, Near

CUDA = torch.device("cuda", 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(few.lacking(CUDA) is not None, reason=str(few.lacking(CUDA))),
]


@pytest.fixture
def ranks() -> list[Near]:
    rooms = [torch.zeros(near.room_bytes(2), dtype=torch.uint8, device=CUDA) for _ in range(2)]
    made = [Near(rank, [room.data_ptr() for room in rooms], CUDA) for rank in range(2)]
    made[0].kept = rooms  # type: ignore[attr-defined]
    return made


def streams() -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(CUDA) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sums(dtype: torch.dtype, ranks: list[Near]) -> None:
    """Of all sizes one after another: memory is used again and again."""
    draw, each = torch.Generator(CUDA).manual_seed(0), streams()
    sizes = [4, 8, 1024, 4096, 100, 8 * 8192, MOST // dtype.itemsize, 12, 8192]
    for count in sizes * 3:
        given = [torch.randn(count, generator=draw, device=CUDA).to(dtype) for _ in ranks]
        torch.cuda.synchronize()
        found = []
        for rank, x, stream in zip(ranks, given, each, strict=True):
            assert rank.takes(x)
            with torch.cuda.stream(stream):
                found.append(rank.sum(x))
        torch.cuda.synchronize()
        want = (given[0].float() + given[1].float()).to(dtype)
        assert torch.equal(found[0], want) and torch.equal(found[1], want)


def test_in_graphs(ranks: list[Near]) -> None:
    x, each = [torch.randn(8192, device=CUDA).bfloat16() for _ in ranks], streams()
    graphs, found = [], []
    for rank, given, stream in zip(ranks, x, each, strict=True):
        rank._function(torch.bfloat16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found.append(rank.sum(rank.sum(given)))
        graphs.append(graph)
    for turn in range(4):
        for given in x:
            given.fill_(turn)
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, each, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert all(bool((y == 4 * turn).all()) for y in found)


def test_what_it_does_not_take(ranks: list[Near]) -> None:
    x = torch.zeros(64, 64, device=CUDA)
    assert ranks[0].takes(x) and not ranks[0].takes(x.T[:, 1:]) and not ranks[0].takes(x.double())
    assert not ranks[0].takes(x[0, :3]) and not ranks[0].takes(torch.zeros(MOST, device=CUDA))


def test_gives_up(ranks: list[Near]) -> None:
    """The other never comes."""
    x = torch.zeros(64, device=CUDA)
    ranks[0]._function(x.dtype)
    ranks[0].sum(x)
    time.sleep(0.2)
    assert not torch.cuda.current_stream(CUDA).query()
    begun = time.monotonic()
    ranks[0].give_up()
    torch.cuda.synchronize()
    assert time.monotonic() - begun < 5
