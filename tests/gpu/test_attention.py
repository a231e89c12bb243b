"""The attention kernels compiled for a GPU, at sizes that models have, against plain torch in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit.kernels import saturation, triton_attention
from fewbit.kernels.cache import Cache
from fewbit.kernels.table import BLOCK, New
from fewbit.kernels.triton_runtime import lacking
from tests.kernels.caches import WHOLE, rounding
from tests.kernels.test_triton_attention import Case, Made, by_a_launch, by_kernels, copied, make, plainly, planes, same

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(lacking(CUDA) is not None, reason=str(lacking(CUDA))),
]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
E4M3, HEADS, E5M2, INT8 = "fp8 measured", "fp8-head measured", "fp8_e5m2 measured", "int8"
MANY = tuple((1, 37 * i % 301 + 1) for i in range(200))
MIXED = ((1, 1), (1, 0), (1, 17), (1, 4000), (1, 2048), (1, 129), (700, 700), (130, 3000), (64, 64), (3, 1000), (40, 0))
SHORT = ((1, 1), (1, 64), (1, 700), (33, 50), (5, 300))
CASES: dict[str, Case] = {
    "llama": Case((32, 8), 128, dtype=BF16, requests=MIXED),
    "llama e4m3": Case((32, 8), 128, dtype=BF16, held=E4M3, requests=MIXED),
    "llama e4m3 of each token": Case((32, 8), 128, dtype=BF16, held="fp8_per_token_head", requests=MIXED),
    "llama e5m2": Case((32, 8), 128, dtype=BF16, held=E5M2, requests=MIXED),
    "llama int8": Case((32, 8), 128, dtype=BF16, held=INT8, requests=MIXED, page=32),
    "llama float16": Case((32, 8), 128, dtype=F16, requests=SHORT),
    "llama float32": Case((32, 8), 128, dtype=F32, requests=SHORT),
    "many": Case((32, 8), 128, dtype=BF16, requests=MANY),
    "many int8": Case((32, 8), 128, dtype=BF16, held=INT8, requests=MANY),
    "many e4m3 by head": Case((32, 8), 128, dtype=BF16, held=HEADS, requests=MANY),
    "one long e4m3": Case((32, 8), 128, dtype=BF16, held=E4M3, requests=((1, 20000),)),
    "one long": Case((32, 8), 128, dtype=BF16, requests=((1, 20000),)),
    "a chunk of a long text": Case((32, 8), 128, dtype=BF16, requests=((512, 9000),)),
    "qwen 0.5": Case((14, 2), 64, dtype=BF16, requests=MIXED),
    "gemma 2": Case((8, 4), 256, dtype=BF16, requests=MIXED, how={"sliding_window": 512, "softcap": 50.0}),
    "gemma 2 e4m3 by head": Case(
        (8, 4), 256, dtype=BF16, held=HEADS, requests=MIXED, how={"sliding_window": 512, "softcap": 50.0}
    ),
    "gpt-oss": Case((64, 8), 64, dtype=BF16, requests=MIXED, how={"sliding_window": 128}, sinks=True),
    "gpt-oss e4m3": Case((64, 8), 64, dtype=BF16, held=E4M3, requests=SHORT, sinks=True),
    "gpt-oss int8": Case((64, 8), 64, dtype=BF16, held=INT8, requests=SHORT, sinks=True),
    "falcon": Case((71, 1), 64, dtype=BF16, requests=SHORT),
    "phi": Case((32, 32), 80, dtype=BF16, requests=SHORT),
    "keys wider": Case((16, 16), 192, 128, dtype=BF16, requests=SHORT),
    "512": Case((8, 1), 512, dtype=BF16, requests=SHORT),
    "deepseek v3": Case((128, 1), 576, 512, True, dtype=BF16, requests=MIXED),
    "deepseek v3, eighth": Case((16, 1), 576, 512, True, dtype=BF16, requests=MANY),
    "deepseek v3, one long": Case((128, 1), 576, 512, True, dtype=BF16, requests=((1, 20000),)),
    "deepseek v3, a chunk": Case((16, 1), 576, 512, True, dtype=BF16, requests=((512, 5000),), page=32),
    "within, all": Case(
        (20, 1), 288, 256, True, dtype=F16, requests=SHORT, how={"sliding_window": 100, "softcap": 5.0}, sinks=True
    ),
    "within, in float32": Case((16, 1), 576, 512, True, dtype=F32, requests=SHORT),
    "within, small": Case((4, 1), 40, 32, True, dtype=BF16, requests=SHORT),
    "within, odd": Case((4, 2), 45, 40, True, dtype=BF16, requests=SHORT),
    "windows in float32": Case((4, 2), 64, dtype=F32, requests=MIXED, how={"sliding_window": 100}),
    "softcap and sinks in float32": Case((4, 2), 32, dtype=F32, requests=SHORT, how={"softcap": 5.0}, sinks=True),
    "e4m3 in float32": Case((4, 2), 32, dtype=F32, held=E4M3, requests=SHORT),
    "int8 measured by head in float32": Case((4, 2), 32, dtype=F32, held="int8-head measured", requests=SHORT),
    "int8 in float32": Case((4, 2), 32, dtype=F32, held=INT8, requests=SHORT),
    "256 in float32": Case((4, 2), 256, dtype=F32, requests=SHORT),
}


def truth(made: Made, case: Case) -> Tensor:
    """The same texts and the same cache, computed in float64."""
    key = made.key.double()
    value = key[..., : made.value.shape[3]] if made.cache.shared else made.value.double()
    wide = replace(made, query=made.query.double(), key=key, value=value)
    return plainly(wide, case)[0].float()


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """float32 to its rounding; else weights and results are rounded to 16 bits."""
    assert bool(got.isfinite().all())
    if dtype == F32:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=5e-6)
        return
    torch.testing.assert_close(got.float(), want, rtol=2.0**-6, atol=2.0**-6)
    assert float((got.float() - want).norm() / want.norm()) < 2.0**-8


@pytest.mark.parametrize("name", CASES)
def test_equals_plain_torch(name: str) -> None:
    case = CASES[name]
    made = make(case, "cuda")
    got, written = by_kernels(made, case)
    close(got, truth(made, case), case.dtype)
    same(written, plainly(made, case)[1])


@pytest.mark.parametrize("held", [BF16, F16, *WHOLE])
def test_writes_the_same_bits(held: torch.dtype | str) -> None:
    """Of ordinary numbers, of those that 8 bits cannot hold, and of NaN where a format has one."""
    draw = torch.Generator("cuda").manual_seed(0)
    key, value = (
        torch.randn(1, 300, 8, d, generator=draw, device="cuda", dtype=BF16).transpose(1, 2) for d in (128, 80)
    )
    key = key * 10.0 ** torch.randint(-6, 6, (300, 1), generator=draw, device="cuda").to(BF16)
    key[:, :, 7] = 0
    coded = rounding(held, 8) if isinstance(held, str) else None
    if coded is None or coded[0].element.kind == "float" or coded[0].dynamic:  # whose scale can hold it
        key[:, :, 9, 3] = torch.nan
    slots = torch.randperm(500, device="cuda")[:300]
    caches = [Cache.like(500, key, value, None if coded else held, coded) for _ in range(2)]  # type: ignore[arg-type]
    cut = []
    for cache, write in zip(caches, (Cache.write, by_a_launch), strict=True):
        for plane in planes(cache):
            if plane is not None:
                plane.zero_()
        count = saturation.count_of(key.device)
        before = int(count)
        write(cache, slots, key, value)
        cut.append(int(count) - before)
    assert cut[0] == cut[1] and (cut[0] > 0) == (coded is not None and not coded[0].dynamic)
    for got, want in zip(planes(caches[1]), planes(caches[0]), strict=True):
        if want is not None and got is not None:
            got, want = got.float(), want.float()
            assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num())


def recorded(held: Made, case: Case, out: Tensor) -> torch.cuda.CUDAGraph:
    """Writing and attending, as a graph."""
    how = case.how or {}

    def step() -> None:
        triton_attention.attend(held.query, held.cache, out, held.table, case.size**-0.5, how.get("sliding_window"),
                                how.get("softcap"), held.sinks, new=New(held.key, held.value, held.slots))  # fmt: skip

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.parametrize("name", ["llama", "llama e4m3", "llama int8", "gpt-oss"])
def test_inside_a_graph(name: str) -> None:
    """Captured for one set of texts, replayed for others that are copied over it: also with fewer of them."""
    bound = {"reach": 5000, "longest": 800}
    case = CASES[name]
    first, second = (replace(case, requests=r) for r in (((1, 5),) * 6 + ((300, 300), (20, 20)),
                                                         ((1, 3000), (1, 0), (1, 700), (1, 1), (1, 64), (1, 0),
                                                          (170, 2000), (150, 150))))  # fmt: skip
    held, fresh = make(first, "cuda"), make(second, "cuda")
    width = max(held.table.pages.shape[1], fresh.table.pages.shape[1])
    held.table = replace(held.table, pages=torch.zeros(8, width, dtype=torch.int32, device="cuda"), **bound)
    held.cache = copied(fresh.cache)  # so that there is room for the texts to come
    out = torch.full((held.query.shape[2], case.heads[0], case.size), torch.nan, dtype=case.dtype, device="cuda")
    graph = recorded(held, case, out)
    renew(held, fresh)
    out.fill_(torch.nan)
    graph.replay()
    close(out, truth(fresh, second), case.dtype)


@pytest.mark.parametrize("name", ["llama", "llama e4m3", "gpt-oss"])
def test_inside_a_graph_of_any_step(name: str) -> None:
    """Its table lists blocks: who decodes, who has no rows and who has many changes between replays."""
    case = CASES[name]
    first = replace(case, requests=((1, 5), (1, 9), (0, 0), (298, 298), (0, 0)))
    second = replace(case, requests=((130, 2000), (1, 3000), (2, 64), (1, 1), (166, 166)))
    held, fresh = make(first, "cuda"), make(second, "cuda")

    def lines(of: Case) -> Tensor:
        found = [(i, at) for i, (count, _) in enumerate(of.requests) if count > 1 for at in range(0, count, BLOCK)]
        return torch.tensor((found + [(-1, 0)] * 8)[:8], dtype=torch.int32, device="cuda")

    pages = torch.zeros(5, fresh.table.pages.shape[1], dtype=torch.int32, device="cuda")
    held.table = replace(held.table, pages=pages, blocks=lines(first), ones=5, reach=5000, longest=300)
    held.cache = copied(fresh.cache)
    out = torch.full((300, case.heads[0], case.size), torch.nan, dtype=case.dtype, device="cuda")
    graph = recorded(held, case, out)
    renew(held, fresh)
    assert held.table.blocks is not None
    held.table.blocks.copy_(lines(second))
    out.fill_(torch.nan)
    graph.replay()
    close(out, truth(fresh, second), case.dtype)


def renew(held: Made, fresh: Made) -> None:
    """What a graph reads, with new contents where it lies."""
    pairs: list[tuple[Any, Any]] = [(getattr(held, n), getattr(fresh, n)) for n in ("query", "key", "value", "slots")]
    pairs += [(getattr(held.table, n), getattr(fresh.table, n)) for n in ("lengths", "starts")]
    pairs += [(held.table.pages[:, : fresh.table.pages.shape[1]], fresh.table.pages)]
    pairs += [(h, f) for h, f in zip(planes(held.cache), planes(fresh.cache), strict=True) if f is not None]
    if held.sinks is not None:
        pairs.append((held.sinks, fresh.sinks))
    for old, new in pairs:
        old.copy_(new)


@pytest.mark.parametrize("held", [None, E4M3, INT8])
def test_the_same_bits_beside_others(held: str | None) -> None:
    """Where a text is cut into as many parts: of 132 requests and of 150 there is one part each."""
    case = Case((32, 8), 128, dtype=BF16, held=held, requests=tuple((1, 7 * i + 1) for i in range(150)))
    made = make(case, "cuda")
    together, cache = by_kernels(made, case)
    t, first = made.table, 18
    table = replace(t, pages=t.pages[first:], lengths=t.lengths[first:], starts=t.starts[first:] - first, ones=132)
    some = replace(made, query=made.query[:, :, first:], key=made.key[:, :, first:], value=made.value[:, :, first:],
                   slots=made.slots[first:], cache=cache, table=table)  # fmt: skip
    assert torch.equal(by_kernels(some, case)[0], together[first:])
