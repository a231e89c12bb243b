"""Exchanges through memory that ranks share, with both ranks on one GPU: what two GPUs do is in test_parallel."""

import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbit.kernels import few, near
from fewbit.kernels.input_rounding import Rounding, Wanted, offered
from fewbit.kernels.near import PLACES, ROWS, WIDTH, Near
from fewbit.modules.norm import Norm, NormForm

CUDA = torch.device("cuda", 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(few.lacking(CUDA) is not None, reason=str(few.lacking(CUDA))),
]
HOW = Rounding("e4m3", 0, False, 448.0, 1.0, False)
PATIENCE = 60  # seconds


class Pair:
    """Two ranks, whose kernels run at once in two streams."""

    def __init__(self) -> None:
        self.held = [torch.full((near.room_bytes(2),), near.EMPTY, dtype=torch.uint8, device=CUDA) for _ in range(2)]
        self.ranks = [Near(rank, [room.data_ptr() for room in self.held], CUDA) for rank in range(2)]
        self.streams = [torch.cuda.Stream(CUDA) for _ in range(2)]

    def warm(self, call: Callable[[int], Any]) -> None:
        """One after the other, each told to give up: nothing is compiled or loaded while a kernel waits."""
        for rank, one in enumerate(self.ranks):
            one.end[0] = 1
            call(rank)
            torch.cuda.synchronize()
            one.turns.zero_()
        for room in self.held:
            room.fill_(near.EMPTY)
        for one in self.ranks:
            one.end[0] = 0
        torch.cuda.synchronize()

    def __call__(self, call: Callable[[int], Any]) -> list[Any]:
        """call(rank) for both -> what they give."""
        self.warm(call)
        return self.again(call)

    def again(self, call: Callable[[int], Any]) -> list[Any]:
        found = []
        torch.cuda.synchronize()
        for rank, stream in enumerate(self.streams):
            with torch.cuda.stream(stream):
                found.append(call(rank))
        begun = time.monotonic()
        while not all(stream.query() for stream in self.streams):
            if time.monotonic() - begun > PATIENCE:
                for one in self.ranks:
                    one.give_up()
                torch.cuda.synchronize()
                pytest.fail("the ranks wait for one another for ever")
            time.sleep(1e-4)
        torch.cuda.synchronize()
        return found


@pytest.fixture
def pair() -> Pair:
    return Pair()


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator(CUDA).manual_seed(seed)
    if dtype == torch.int64:
        return [torch.randint(0, 1 << 40, shape, generator=draw, device=CUDA) for _ in range(2)]
    return [torch.randn(shape, generator=draw, device=CUDA).to(dtype) for _ in range(2)]


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", near.TYPES, ids=str)
def test_sums(dtype: torch.dtype, pair: Pair) -> None:
    """Of all sizes one after another: memory is used again and again.

    Both ranks must fit on this GPU at once, and the longest programs take a processor each (125 registers by 512).
    """
    half = torch.cuda.get_device_properties(CUDA).multi_processor_count // 2
    wide = torch.int64 if dtype == torch.int64 else torch.float32
    for count in (1, 3, 8, 100, 1024, 4096, 8192, 64 * 8192 + 7, (half - 1) * WIDTH // dtype.itemsize - 7):
        x = drawn(count, dtype=dtype, seed=count)
        assert all(rank.takes(x[0]) for rank in pair.ranks)
        pair.warm(lambda rank: pair.ranks[rank].sum(x[rank]))  # noqa: B023 - called at once
        for _ in range(3):
            found = pair.again(lambda rank: pair.ranks[rank].sum(x[rank]))  # noqa: B023
            want = (x[0].to(wide) + x[1].to(wide)).to(dtype)
            assert same(found[0], want) and same(found[1], want)


def test_sums_of_all_bits(pair: Pair) -> None:
    """What says that nothing has come is a number too."""
    x = [torch.arange(1 << 16, dtype=torch.int32, device=CUDA).to(torch.int16).view(torch.bfloat16) for _ in range(2)]
    x[1] = x[1].flip(0)
    found = pair(lambda rank: pair.ranks[rank].sum(x[rank]))
    want = (x[0].float() + x[1].float()).bfloat16()
    assert all(torch.equal(y.isnan(), want.isnan()) and same(y.nan_to_num(0), want.nan_to_num(0)) for y in found)


@pytest.mark.parametrize("dtype", near.TYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (100, 28), (64128, 64128), (32064, 40000)], ids=str)
def test_parts_side_by_side(sizes: tuple[int, int], dtype: torch.dtype, pair: Pair) -> None:
    for rows in (1, 2, 7, 30):
        x = [part.contiguous() for part in drawn(rows, sum(sizes), dtype=dtype, seed=rows)[0].split(sizes, 1)]
        assert pair.ranks[0].takes_parts(x[0], sizes) or rows * max(sizes) * dtype.itemsize > PLACES * WIDTH // 2
        if rows * max(sizes) * dtype.itemsize > PLACES * WIDTH // 2:  # both ranks must fit on this GPU
            continue
        for given in (x, [part.flip(0).contiguous() for part in x]):
            found = pair(lambda rank: pair.ranks[rank].gather(given[rank], sizes))  # noqa: B023
            assert all(same(y, torch.cat(given, 1)) for y in found)


def test_in_graphs(pair: Pair) -> None:
    x = [torch.randn(8192, device=CUDA).bfloat16() for _ in range(2)]
    pair.warm(lambda rank: pair.ranks[rank].sum(x[rank]))
    graphs, found = [], []
    for one, given, stream in zip(pair.ranks, x, pair.streams, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found.append(one.sum(one.sum(given)))
        graphs.append(graph)
    for turn in range(4):
        for given in x:
            given.fill_(turn)
        pair.again(lambda rank: graphs[rank].replay())
        assert all(bool((y == 4 * turn).all()) for y in found)


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("scales", ["none", "rows", "columns", "both"])
def test_a_sum_and_its_norm(rows: int, scales: str, pair: Pair) -> None:
    """To the bit what the sum, an addition and a norm give one after another."""
    from fewbit.kernels.triton_add_norm import add_norm

    d = 5120
    x, (residual, _) = drawn(rows, d), drawn(rows, d, seed=1)
    weight = torch.randn(d, device=CUDA).bfloat16()
    by_row = torch.rand(rows, 1, device=CUDA) if scales in ("rows", "both") else None
    by_column = torch.rand(d, device=CUDA) if scales in ("columns", "both") else None
    before = Norm(nn.Parameter(weight, requires_grad=False), None, NormForm(1e-5)).norm_parts
    whole = x[0].float() + x[1].float()
    for scale in (by_column, by_row):
        whole = whole if scale is None else whole * scale
    for first in (None, before):
        want = add_norm(whole.bfloat16(), residual, first, before)
        found = pair(lambda rank: add_norm(x[rank], residual, first, before, None, (by_row, by_column),  # noqa: B023
                                           pair.ranks[rank]))  # fmt: skip
        assert all(same(a, b) for each in found for a, b in zip(each, want, strict=True))


def ranks_of(pair: Pair, x: list[Tensor]) -> list[Any]:
    """Ranks that are near, and ranks that are not."""
    top = torch.stack([each.abs().amax(1).float() for each in x]).amax(0)
    far = SimpleNamespace(near=None, largest=lambda _: top)
    return [[SimpleNamespace(near=one) for one in pair.ranks], [far, far]]


@pytest.mark.parametrize("shape", [(1, 4096), (5, 14336), (64, 20000), (300, 96)], ids=str)
def test_codes_by_scales_of_whole_rows(shape: tuple[int, int], pair: Pair) -> None:
    from fewbit.kernels.triton_quantize import quantize_rows

    x = drawn(*shape)
    x[1][0] *= 30
    codes, scales = quantize_rows(torch.cat(x, 1), HOW)
    for ranks in ranks_of(pair, x):
        hows = [replace(HOW, ranks=each) for each in ranks]
        found = pair(lambda rank: quantize_rows(x[rank], hows[rank]))  # noqa: B023
        for part, (made, by) in zip(codes.chunk(2, 1), found, strict=True):
            assert same(made, part) and same(by, scales)


def test_codes_as_a_gate_makes_them(pair: Pair) -> None:
    from fewbit.kernels.triton_glu import act_mul
    from fewbit.kernels.triton_quantize import quantize_rows

    gate, up = drawn(3, 14336), drawn(3, 14336, seed=1)
    y = [act_mul(g, u, "silu", 1.0, float("inf"), 0.0) for g, u in zip(gate, up, strict=True)]
    codes, scales = quantize_rows(torch.cat(y, 1), HOW)
    near_ranks, far = ranks_of(pair, y)
    for ranks in (near_ranks, far):
        hows = [replace(HOW, ranks=each) for each in ranks]
        made = pair(lambda rank: act_mul(gate[rank], up[rank], "silu", 1.0, float("inf"), 0.0, Wanted(hows[rank])))  # noqa: B023
        for rank, part in enumerate(codes.chunk(2, 1)):
            found = offered(made[rank], hows[rank])
            assert same(made[rank], y[rank]) and (found is None) == (ranks is far)
            assert found is None or (same(found[0], part) and same(found[1], scales))


def test_what_it_does_not_take(pair: Pair) -> None:
    one, x = pair.ranks[0], torch.zeros(64, 64, device=CUDA)
    assert one.takes(x) and not one.takes(x.T[:, 1:]) and not one.takes(x.double())
    assert not one.takes(x[:0]) and not one.takes(torch.zeros(WIDTH * PLACES + 4, dtype=torch.uint8, device=CUDA))
    assert not one.takes(torch.zeros(WIDTH * PLACES // 4 + 1, device=CUDA))
    assert one.takes_rows(x) and not one.takes_rows(x.T[:, 1:]) and not one.takes_rows(x[:0])
    assert not one.takes_rows(torch.zeros(PLACES + 1, 8, device=CUDA))
    assert not one.takes_rows(torch.zeros(1, WIDTH // 4 + 1, device=CUDA))
    assert one.takes_parts(x, (64, 80)) and not one.takes_parts(x, (64, 0)) and not one.takes_parts(x.T[:, 1:], (63, 1))
    assert not one.takes_parts(x[:0], (64, 64)) and not one.takes_parts(x, (64, PLACES // 64 * WIDTH // 4 + 1))
    assert ROWS >= 16384  # rows of a prompt's chunk


def test_gives_up(pair: Pair) -> None:
    """The other never comes."""
    x = torch.zeros(64, device=CUDA)
    pair.warm(lambda rank: pair.ranks[rank].sum(x))
    pair.ranks[0].sum(x)
    time.sleep(0.2)
    assert not torch.cuda.current_stream().query()
    pair.ranks[0].give_up()
    begun = time.monotonic()
    torch.cuda.synchronize()
    assert time.monotonic() - begun < 5
