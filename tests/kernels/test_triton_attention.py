"""The kernels of attention for GPUs, by Triton's interpreter, against modules.paged in plain torch.

What nobody may read is NaN: slots that no text has, scales beside them, pages beyond a text, outputs before the call.
The interpreter cannot multiply bfloat16: tests/gpu does that.
"""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbit.kernels import saturation, triton_attention
from fewbit.kernels.cache import HELD, Cache, Rounding
from fewbit.kernels.cache_packed import room
from fewbit.kernels.table import BLOCK, New, Rotary, Table
from fewbit.kernels.triton_runtime import lacking
from fewbit.modules import paged, rotary
from fewbit.modules.attention_sides import weighed
from fewbit.modules.paged import Span, Step, stepping
from fewbit.quant.kv import FP8
from tests.kernels.caches import FORMATS, WHOLE, rounding

LACKING = lacking(torch.device("cpu"))
pytestmark = pytest.mark.skipif(LACKING is not None or torch.cuda.is_available(), reason=str(LACKING))

if LACKING is None:
    import triton
    import triton.language as tl

    from fewbit.kernels.triton_attention_parts import as_e4m3

    @triton.jit
    def rounds(x, y, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(y + i, as_e4m3(tl.load(x + i)))


@dataclass(frozen=True)
class Case:
    heads: tuple[int, int] = (4, 2)  # H, G
    size: int = 32
    value_size: int = 0  # 0: as size
    within: bool = False  # values are the first numbers of keys
    page: int = 16
    requests: tuple[tuple[int, int], ...] = ((1, 37), (1, 5), (7, 40), (19, 19))  # rows, length
    how: dict[str, Any] | None = None  # sliding_window, softcap
    sinks: bool = False
    dtype: torch.dtype = torch.float32
    held: torch.dtype | str | None = None  # a format by its name in tests.kernels.caches

    @property
    def grid(self) -> torch.dtype:
        """Where values are drawn, so that writing them rounds nothing: the interpreter does not round to nearest."""
        element = FORMATS[self.held].element if isinstance(self.held, str) else None
        return HELD[element] if element in HELD and HELD[element].is_floating_point else self.dtype


BOTH = ((1, 50), (1, 0), (1, 16), (21, 70))
CASES = {
    "as many heads": Case((2, 2)),
    "four on one": Case((4, 1)),
    "three on one": Case((6, 2)),
    "eight on one": Case((8, 1), requests=((1, 33), (3, 20))),
    "seventeen on one": Case((17, 1), requests=((1, 33), (3, 20))),
    "64": Case(size=64),
    "80": Case(size=80, requests=((1, 20), (5, 20))),
    "128": Case((2, 1), 128, requests=((1, 70), (5, 20))),
    "256": Case((2, 1), 256, requests=((1, 40), (5, 20))),
    "within": Case((6, 1), 80, 64, True),
    "within, wide": Case((17, 1), 576, 512, True, requests=((1, 40), (5, 20))),
    "within, all of it": Case((4, 2), 32, 32, True),
    "within, odd": Case((4, 2), 45, 40, True, requests=BOTH, how={"sliding_window": 40, "softcap": 2.0}, sinks=True),
    "within, halves": Case((6, 1), 80, 64, True, dtype=torch.float16, requests=BOTH, how={"sliding_window": 20}),
    "within, another cache": Case((6, 1), 48, 32, True, held=torch.float16, requests=BOTH),
    "512": Case((2, 1), 512, requests=((1, 40), (5, 20))),
    "keys wider": Case(size=48, value_size=32),
    "pages of 32": Case(page=32),
    "pages of 3": Case(page=3),
    "window": Case(requests=BOTH, how={"sliding_window": 20}),
    "window of 1": Case(requests=BOTH, how={"sliding_window": 1}),
    "wide window": Case(requests=BOTH, how={"sliding_window": 1000}),
    "softcap": Case(requests=BOTH, how={"softcap": 5.0}),
    "sinks": Case(requests=BOTH, sinks=True),
    "all": Case(requests=BOTH, how={"sliding_window": 40, "softcap": 2.0}, sinks=True),
    "decode alone": Case(requests=((1, 130), (1, 1), (1, 64), (1, 65))),
    "chunk behind a long text": Case(requests=((40, 120),)),
    "nobody's rows": Case(requests=((1, 9), (3, 10), (5, 0))),
    "float16": Case(dtype=torch.float16),
    "e4m3": Case(held="fp8 measured"),
    "e4m3, all": Case(
        (6, 2), 40, 24, held="fp8-head measured", requests=BOTH, how={"sliding_window": 30, "softcap": 3.0}, sinks=True
    ),
    "e4m3, one on one": Case((2, 2), 64, held="fp8-head measured", requests=BOTH),
    "e4m3 of Gaudi": Case(held="fp8_inc measured", requests=BOTH, how={"softcap": 2.0}),
    "e4m3 of each token": Case(held="fp8_per_token_head", requests=BOTH, how={"sliding_window": 20}),
    "e5m2": Case(held="fp8_e5m2 measured"),
    "int8": Case(held="int8", requests=BOTH, sinks=True),
    "int8 measured": Case(held="int8-head measured", requests=BOTH, how={"sliding_window": 20}),
    "float16 cache": Case(held=torch.float16),
    "halves of e4m3": Case(dtype=torch.float16, held="fp8 measured"),
    "halves of e4m3, all": Case(
        (6, 2),
        40,
        24,
        dtype=torch.float16,
        held="fp8-head measured",
        requests=BOTH,
        how={"sliding_window": 30, "softcap": 3.0},
        sinks=True,
    ),
    "halves of e4m3 of each token": Case(dtype=torch.float16, held="fp8_per_token_head", requests=BOTH),
    "halves of e5m2": Case(dtype=torch.float16, held="fp8_e5m2 measured"),
    "halves of int8": Case(dtype=torch.float16, held="int8", requests=BOTH, sinks=True, how={"softcap": 2.0}),
    "halves of int8 measured": Case(size=80, dtype=torch.float16, held="int8-head measured", requests=BOTH),
    "an odd size": Case(size=33, dtype=torch.float16, held="int8-head measured", requests=BOTH),
    "a small size": Case(size=16, dtype=torch.float16, held="int8-head measured", requests=BOTH),
}


@dataclass
class Made:
    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None
    cache: Cache
    slots: Tensor
    spans: list[Span]
    table: Table


def make(case: Case, device: str = "cpu", held: torch.dtype | str | None = None) -> Made:
    """Texts on pages in random order; all but each request's own rows are in the cache."""
    draw = torch.Generator().manual_seed(0)
    (heads, groups), wide = case.heads, case.value_size or case.size
    rows, lengths = zip(*case.requests, strict=True)
    needs = [-(-n // case.page) for n in lengths]
    order = torch.randperm(sum(needs) + 2, generator=draw)
    pages = torch.full((len(rows), max(needs) + 1), 1 << 30, dtype=torch.int32)
    total = sum(rows)

    def drawn(*shape: int) -> Tensor:
        found = torch.randn(1, *shape, generator=draw).to(case.grid).to(case.dtype)
        if case.held == "fp8_per_token_head":  # the largest is 448 x a power of two
            found = found.clamp(-3.5, 3.5)
            found[..., 0] = 3.5
        return found.transpose(1, 2)

    query = drawn(total, heads, case.size)

    def pair(count: int) -> tuple[Tensor, Tensor]:
        key = drawn(count, groups, case.size)
        return key, key[..., :wide] if case.within else drawn(count, groups, wide)

    key, value = pair(total)
    capacity = len(order) * case.page + 1
    cache = empty(capacity, key, value, held or case.held)
    spans, slots, at = [], [], 0
    for i, (count, length) in enumerate(case.requests):
        mine = order[sum(needs[:i]) :][: needs[i]]
        pages[i, : needs[i]] = mine
        text = (mine[:, None] * case.page + torch.arange(case.page)).flatten()[:length]
        if length and count:
            cache.write(text[: length - count], *pair(length - count))
            spans.append(Span(at, at + count, length, text))
        slots.append(text[length - count : length] if length else torch.full((count,), capacity - 1))
        at += count
    starts = torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32)
    ones = next((i for i, n in enumerate(rows) if n != 1), len(rows))
    table = Table(pages, torch.tensor(lengths, dtype=torch.int32), starts, ones, max(rows), max(lengths), case.page)
    sinks = torch.randn(heads, generator=draw) if case.sinks else None
    return on(Made(query, key, value, sinks, cache, torch.cat(slots), spans, table), device)


def empty(capacity: int, key: Tensor, value: Tensor, held: torch.dtype | str | None) -> Cache:
    """NaN wherever the type has one, else the largest code."""
    coded = rounding(held, key.shape[1], even=True) if isinstance(held, str) else None
    cache = Cache.like(capacity, key, value, None if isinstance(held, str) else held, coded)
    for plane in planes(cache):
        if plane is not None:
            plane.copy_(torch.tensor(127 if plane.dtype == torch.int8 else torch.nan))
    return cache


def on(made: Any, device: str) -> Any:
    """The same with its tensors there."""
    if isinstance(made, Tensor):
        return made.to(device)
    if isinstance(made, list):
        return [on(each, device) for each in made]
    if not is_dataclass(made):
        return made
    if isinstance(made, Cache) and made.shared:
        return together(made, made.key.to(device))
    if isinstance(made, Made) and made.cache.shared:
        key = made.key.to(device)
        moved = {f.name: on(getattr(made, f.name), device) for f in fields(made)}
        return replace(made, **moved | {"key": key, "value": key[..., : made.value.shape[3]]})
    return replace(made, **{f.name: on(getattr(made, f.name), device) for f in fields(made)})


def together(cache: Cache, key: Tensor) -> Cache:
    return Cache(key, key[..., : cache.value.shape[2]])


def copied(cache: Cache) -> Cache:
    if cache.shared:
        return together(cache, cache.key.clone())
    fields = {"key", "value", "key_scale", "value_scale"}
    return replace(cache, **{n: t.clone() for n in fields if (t := getattr(cache, n)) is not None})


def planes(cache: Cache) -> list[Tensor | None]:
    return [cache.key, cache.value, cache.key_scale, cache.value_scale]


def plainly(made: Made, case: Case, table: Table | None = None) -> tuple[Tensor, Cache]:
    """modules.paged on a copy of the cache -> [T, H, Dv], and that cache."""
    module, cache = nn.Module(), copied(made.cache)
    module.layer_idx = 0  # type: ignore[assignment]
    step = Step(made.slots, lambda: made.spans, {0: cache}, len(cache.key), table=table)
    with stepping(step), torch.inference_mode():
        out, _ = paged.forward(module, made.query, made.key, made.value, None, s_aux=made.sinks, **(case.how or {}))
    assert table is None or step.refused is None
    return out[0], cache


def by_kernels(made: Made, case: Case, rotary: Rotary | None = None) -> tuple[Tensor, Cache]:
    cache, how = copied(made.cache), case.how or {}
    assert triton_attention.refusal(made.query, cache) is None
    out = torch.full_like(made.query[0].transpose(0, 1)[..., :1], torch.nan).repeat(1, 1, made.value.shape[3])
    triton_attention.attend(made.query, cache, out, made.table, case.size**-0.5, how.get("sliding_window"),
                            how.get("softcap"), made.sinks,
                            new=New(made.key, made.value, made.slots, rotary))  # fmt: skip
    return out, cache


def by_a_launch(cache: Cache, slots: Tensor, key: Tensor, value: Tensor) -> None:
    triton_attention.write(cache, New(key, value, slots), key)


def bound(case: Case) -> dict[str, float]:
    return {"rtol": 1e-5, "atol": 3e-6} if case.dtype == torch.float32 else {"rtol": 2.0**-7, "atol": 2.0**-9}


def same(a: Cache, b: Cache) -> None:
    """But for the last slot: rows of nobody write there, in an order that is nobody's either."""
    for x, y in zip(planes(a), planes(b), strict=True):
        if x is not None and y is not None:
            torch.testing.assert_close(x[:-1].float(), y[:-1].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
def test_equals_plain_torch(name: str) -> None:
    """Rows of nobody are 0; what is written is the same bits."""
    case = CASES[name]
    made = make(case)
    want, kept = plainly(made, case)
    got, written = by_kernels(made, case)
    torch.testing.assert_close(got, want, **bound(case))
    same(written, kept)


TURNED = {
    "decoding": Case(requests=((1, 37), (1, 5), (1, 1), (1, 0), (1, 64))),
    "in parts": Case((4, 2), requests=((1, 200), (1, 0), (1, 65))),
    "one key head for many": Case((17, 1), requests=((1, 33), (1, 20))),
    "all": Case((6, 2), 48, 32, requests=((1, 50), (1, 0), (1, 16)), sinks=True,
                how={"sliding_window": 20, "softcap": 2.0}),
    "a prompt beside it": Case(requests=((1, 37), (21, 70))),
    "e4m3": Case(held="fp8 measured", requests=((1, 37), (1, 5))),
    "e4m3, a prompt beside it": Case(held="fp8 measured", requests=((1, 37), (4, 5))),
}  # fmt: skip


@pytest.mark.parametrize("form", [rotary.FORMS[0], rotary.FORMS[7], rotary.FORMS[14]], ids=str)
@pytest.mark.parametrize("name", TURNED)
def test_keys_and_queries_are_turned_by_who_attends(name: str, form: rotary.RotaryForm) -> None:
    """What a cache of 8 bits keeps of them is as close as a step of its own, for the interpreter's casts are others."""
    case = TURNED[name]
    made, tokens, width = make(case), sum(count for count, _ in case.requests), case.size - case.size // 4
    draw = torch.Generator().manual_seed(1)
    shape = (1, tokens, width // 2 if form.table == "short" else width)
    cos, sin = (torch.randn(shape, generator=draw) for _ in range(2))
    query, key = rotary.rotate(made.query, made.key, cos, sin, form)
    want, kept = plainly(replace(made, query=query, key=key), case)
    got, written = by_kernels(made, case, form.with_tables(cos, sin, case.dtype))
    if case.held is None:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        for x, y in zip(planes(written), planes(kept), strict=True):
            if x is not None and y is not None:
                torch.testing.assert_close(x[:-1], y[:-1], rtol=1e-6, atol=1e-6, equal_nan=True)
    else:
        assert float((got - want).norm() / want.norm()) < 0.1


ANYHOW = ((7, 40), (1, 37), (0, 20), (1, 0), (150, 160), (1, 5), (0, 0), (19, 19), (3, 0))
LISTED = {
    "plain": Case(requests=ANYHOW),
    "split": Case((2, 1), requests=((3, 20), (1, 130), (1, 33), (1, 0), (0, 70))),
    "all": Case(size=48, value_size=32, requests=ANYHOW, how={"sliding_window": 40, "softcap": 2.0}, sinks=True),
    "halves of e4m3": Case(dtype=torch.float16, held="fp8 measured", requests=ANYHOW),
    "within": Case((3, 1), 48, 32, True, requests=ANYHOW, how={"sliding_window": 40}),
}


@pytest.mark.parametrize("alone", [False, True], ids=["beside decoding", "all of it"])
@pytest.mark.parametrize("name", LISTED)
def test_blocks_that_are_listed(name: str, alone: bool) -> None:
    """Requests in any order, some without rows. Rows behind the last request, and those not listed, stay untouched."""
    case = LISTED[name]
    made = make(case)
    lines = [(i, at) for i, (count, _) in enumerate(case.requests) if alone or count > 1
             for at in range(0, count, BLOCK)]  # fmt: skip
    blocks = torch.tensor([*reversed(lines), *[(-1, 0)] * 3], dtype=torch.int32)
    made.table = replace(made.table, blocks=blocks, ones=0 if alone else len(case.requests))
    want, _ = plainly(made, case)
    got, cache = by_kernels(made, case)
    torch.testing.assert_close(got, want, **bound(case))
    wide = torch.full((len(got) + 4, *got.shape[1:]), torch.nan, dtype=got.dtype)
    query = torch.cat([made.query, made.query[:, :, :4]], 2)
    how = case.how or {}
    made.table.blocks = blocks[1:]
    triton_attention.attend(query, cache, wide, made.table, case.size**-0.5, how.get("sliding_window"),
                            how.get("softcap"), made.sinks)  # fmt: skip
    left_out, at = lines[-1]
    first = int(made.table.starts[left_out]) + at
    silent = [*range(first, min(first + BLOCK, int(made.table.starts[left_out + 1]))), *range(len(got), len(wide))]
    assert wide.isnan().all((1, 2)).nonzero().flatten().tolist() == silent


def test_a_step_with_a_table_makes_no_spans() -> None:
    case = CASES["all"]
    made = make(case)
    want, _ = plainly(made, case)
    got, _ = plainly(replace(made, spans=[]), case, made.table)
    torch.testing.assert_close(got, want, **bound(case))


def test_a_refused_step_says_why_to_who_makes_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["as many heads"]
    made = make(case)
    monkeypatch.setattr(triton_attention, "refusal", lambda *_: "not today")
    module, said = nn.Module(), []
    module.layer_idx = 0  # type: ignore[assignment]
    step = Step(made.slots, lambda: said.append(step.refused) or made.spans, {0: made.cache}, 1, table=made.table)
    with stepping(step), torch.inference_mode():
        out, _ = paged.forward(module, made.query, made.key, made.value, None)
    assert said == ["not today"] and bool(out.isfinite().all())


@pytest.mark.parametrize("window", [None, 100])
def test_the_same_bits_beside_others(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many parts, whatever the others' lengths and the bound on them."""
    from fewbit.kernels import triton_attention_decode as decode

    case = Case(requests=((1, 90), (1, 33), (1, 7), (1, 200)), how={"sliding_window": window})
    made = make(case)
    monkeypatch.setattr(decode, "SPLITS", ((2, 64, decode.SMALL),))
    monkeypatch.setattr(decode, "processors", lambda _: 4)
    together, cache = by_kernels(made, case)
    parts = decode.shape(made.query, cache, made.table, window).parts
    monkeypatch.setattr(decode, "processors", lambda _: 1)  # as many parts for one request as four had
    for i in range(4):
        t = made.table
        table = replace(t, pages=t.pages[i : i + 1], lengths=t.lengths[i : i + 1], starts=t.starts[:2], ones=1)
        of_one = {"query": made.query, "key": made.key, "value": made.value}
        one = replace(made, **{n: x[:, :, i : i + 1] for n, x in of_one.items()}, slots=made.slots[i : i + 1],
                      table=table)  # fmt: skip
        assert decode.shape(one.query, cache, table, window).parts == parts == 2
        assert torch.equal(by_kernels(one, case)[0][0], together[i])


@pytest.mark.parametrize("name", ["64", "within", "window", "window of 1", "softcap", "sinks", "all", "within, odd",
                                  "chunk behind a long text", "e4m3 of each token"])  # fmt: skip
def test_queries_by_few_are_all_queries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle attends to a prompt by runs of queries, each with the keys that it sees."""
    case = CASES[name]
    want, _ = plainly(made := make(case), case)
    for queries in (1, 4, 7):
        monkeypatch.setattr(paged, "QUERIES", queries)
        torch.testing.assert_close(plainly(made, case)[0], want, **bound(case))


@pytest.mark.parametrize("room", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("window", [None, 100])
def test_parts_that_are_worth_it(room: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that fall into as many parts as there may be, into fewer, and such as stay whole beside them."""
    from fewbit.kernels import triton_attention_decode as decode

    lengths = (1, 63, 64, 65, 129, 200, 390, 2100)
    case = Case((2, 1), requests=tuple((1, n) for n in lengths), how={"sliding_window": window})
    made = make(case)
    key_heads = made.key.shape[1]
    monkeypatch.setattr(decode, "processors", lambda _: room * len(lengths) * key_heads // decode.PROGRAMS)
    found, cache = by_kernels(made, case)
    parts = decode.shape(made.query, cache, made.table, window).parts
    assert parts == ({64: 4}.get(room, 1) if window else {1: 1, 2: 1, 4: 2, 16: 8, 64: 64}[room])
    want, _ = plainly(made, case)
    torch.testing.assert_close(found, want, **bound(case))
    assert parts == 1 if cache.ended is None else not cache.ended.any()
    again, _ = by_kernels(replace(made, cache=cache), case)
    assert torch.equal(again, found)


@pytest.mark.parametrize("form", [name for name in WHOLE if name.endswith("measured")])
def test_what_a_measured_scale_cuts_off_is_counted(form: str) -> None:
    """Both ways to write count alike. NaN stays NaN where there is one, but for the interpreter's own casts."""
    spec, key_scale, value_scale = rounding(form, 2, even=True)
    one = float(key_scale["scale0"].flatten()[0])
    top, least = one * spec.element.max, one * spec.element.min
    key = torch.tensor([1e6, -1e6, 1.0, -0.5]).repeat(2, 4).view(1, 2, 1, 16)
    key[0, 1, 0, 2:] = 0.0
    for write in (Cache.write, by_a_launch):
        cache = Cache.like(3, key, key, None, (spec, key_scale, value_scale))
        before = saturation.total()
        write(cache, torch.tensor([1]), key, -key)
        assert saturation.total() - before == 2 * (8 + 2)
        got, _ = cache.read(torch.tensor([1]), torch.float32)
        assert got[0, 0, 0, :4].tolist() == [top, least, 1.0, -0.5]
        if cache.key.is_floating_point() and write is Cache.write:
            write(cache, torch.tensor([1]), key * torch.nan, key)
            assert bool(cache.read(torch.tensor([1]), torch.float32)[0].isnan().all())


@pytest.mark.parametrize("form", ["int8", "fp8_per_token_head"])
def test_one_number_that_is_none_takes_its_row_along(form: str) -> None:
    """Both ways to write: the scale says it, since codes may not."""
    key = torch.ones(1, 2, 3, 16)
    key[0, 1, 2, 5] = torch.nan
    for write in (Cache.write, by_a_launch):
        cache = Cache.like(3, key, key, None, rounding(form, 2))
        write(cache, torch.arange(3), key, key)
        for held in cache.read(torch.arange(3), torch.float32):
            assert held.isnan().all(-1)[0].tolist() == [[False] * 3, [False, False, True]]
            assert bool(held[~held.isnan()].eq(1).all())


@pytest.mark.parametrize("form", ["int8", "fp8_per_token_head"])
def test_a_scale_of_each_row_is_as_close_as_its_step(form: str) -> None:
    draw = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 2, 9, 20, generator=draw) * 10.0 ** torch.arange(9)[:, None] for _ in range(2))
    key[:, :, 3] = 0
    cache = room(9, key, value, None, rounding(form, 2))
    assert cache.slot_bytes == 2 * 2 * (20 + 4)
    slots = torch.randperm(9, generator=draw)
    cache.write(slots, key, value)
    step = 1 / 127 / 2 if form == "int8" else 1 / 28
    for got, want in zip(cache.read(slots, torch.float32), (key, value), strict=True):
        assert bool(((got - want).abs() <= want.abs().amax(-1, keepdim=True) * step * 1.001).all())


def test_int8_answers_nearly_as_bfloat16() -> None:
    """Against float32 of the same texts: within a few times what a cache of bfloat16 loses, better than e4m3."""
    errors: dict[Any, float] = {}
    truth = None
    for held in (torch.float32, torch.bfloat16, "int8", "fp8 measured"):
        case = Case(size=64, held=held, requests=((1, 150), (20, 100)))
        out, _ = plainly(make(replace(case, held=None), held=held), case)
        truth = out if truth is None else truth
        errors[held] = float((out - truth).norm() / truth.norm())
    assert errors[torch.bfloat16] < errors["int8"] < 0.01 < errors["fp8 measured"]


def test_says_why_not() -> None:
    query = torch.zeros(1, 1, 1, 16)
    cache = Cache.like(1, query, query)
    assert triton_attention.refusal(query, cache) is None
    assert "not torch.float64" in (triton_attention.refusal(query.double(), cache) or "")
    wide = torch.zeros(1, 1, 1, 576)
    assert "up to 512, not of 576" in (triton_attention.refusal(wide, Cache.like(1, wide, wide)) or "")


@pytest.mark.parametrize("coded", [None, (FP8, *[{"scale0": torch.ones(1, 1)}] * 2)])
def test_probabilities_in_fp8(coded: Rounding | None) -> None:
    """Where one tile holds the text, the largest seen so far is the largest: as modules.attention_sides has it.

    Keys and values are multiples of a quarter: the interpreter's own casts of e4m3 do not round as hardware does.
    """
    heads, size, length = 2, 16, 9
    q, k, v = (torch.randint(-8, 9, (1, heads, length, size)) / by for by in (32, 4, 4))
    cache = Cache.like(32, k, v, coded=coded)
    cache.write(torch.arange(length), k, v)
    scores = (q @ k.mT * size**-0.5).masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    want, plain = (x[0].transpose(0, 1) for x in (weighed(scores, v, 1.0), scores.softmax(-1) @ v))
    pages, lengths = torch.arange(2, dtype=torch.int32)[None], torch.tensor([length], dtype=torch.int32)
    for ones, rows in ((0, length), (1, 1)):
        table = Table(pages, lengths, torch.tensor([0, rows], dtype=torch.int32), ones, rows, length, 16)
        out = torch.full((rows, heads, size), float("nan"))
        triton_attention.attend(q[:, :, -rows:], cache, out, table, size**-0.5, None, None, None, 1.0)
        torch.testing.assert_close(out, want[-rows:], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(out, plain[-rows:], rtol=1e-3)


def test_as_e4m3() -> None:
    """Every float's neighbour, as torch casts it."""
    codes = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    x = torch.cat(
        [codes, middles, middles * (1 + 2.0**-20), middles * (1 - 2.0**-20), torch.rand(1543) * 448 ** torch.rand(1543)]
    )
    y = torch.full((2048,), float("nan"))
    rounds[(1,)](x[:2048].contiguous(), y, N=2048)
    assert torch.equal(y, x[:2048].to(torch.float8_e4m3fn).float())
