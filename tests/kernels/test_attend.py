"""The kernels of single queries and of prompts against plain attention over the same slots, gathered."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit.errors import UnsupportedError
from fewbit.kernels import attend
from fewbit.kernels.cache import Cache
from fewbit.kernels.cache_packed import room
from fewbit.kernels.compiled import library
from fewbit.modules.attention import explicit
from tests.kernels.caches import FORMATS, WHOLE, rounding

pytestmark = pytest.mark.skipif(isinstance(library("attend"), str), reason=str(library("attend")))
SHAPES = [(4, 4, 64, 64), (8, 2, 64, 64), (6, 2, 128, 128), (4, 1, 256, 256), (4, 2, 40, 24), (3, 3, 7, 7)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "softcap", "sink"), [(None, None, False), (5, None, False), (None, 3.0, False),
                                                        (None, None, True), (9, 2.0, True)])  # fmt: skip
def test_equals_plain_attention(
    shape: tuple[int, int, int, int], dtype: torch.dtype, window: int | None, softcap: float | None, sink: bool
) -> None:
    heads, key_heads, size, value_size = shape
    draw = torch.Generator().manual_seed(1)
    key = torch.randn(100, key_heads, size, generator=draw).to(dtype)
    value = torch.randn(100, key_heads, value_size, generator=draw).to(dtype)
    query = torch.randn(6, heads, size, generator=draw).to(dtype)
    sinks = torch.randn(heads, generator=draw) if sink else None
    order = torch.randperm(100, generator=draw)
    spans = [(0, 1, 1, order[:1]), (1, 2, 37, order[3:40]), (2, 5, 30, order[40:70])]  # token 5 belongs to nobody
    out = torch.full((6, heads, value_size), torch.nan, dtype=dtype)
    attend.attend(query, Cache(key, value), out, attend.Queries.of(spans), size**-0.5, window, softcap, sinks)
    for start, stop, length, slots in spans:
        for row in range(start, stop):
            seen = slots[: length - stop + row + 1]
            seen = seen if window is None else seen[-window:]
            k, v = (t[seen].transpose(0, 1)[None].float() for t in (key, value))
            want = explicit(query[row].float()[None, :, None], k, v, None, size**-0.5, softcap, sinks)[0, :, 0]
            bound = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2.0**-8, "atol": 1e-6}
            torch.testing.assert_close(out[row].float(), want, **bound)
    assert bool(out[5].isnan().all())


@pytest.mark.parametrize("shape", [(8, 1, 80, 64), (16, 1, 576, 512), (4, 2, 40, 24), (3, 3, 7, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_keys_begin_with(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """They are written and held once."""
    heads, key_heads, size, value_size = shape
    draw = torch.Generator().manual_seed(3)
    key = torch.randn(1, 50, key_heads, size, generator=draw).to(dtype).transpose(1, 2)
    query, slots = torch.randn(2, heads, size, generator=draw).to(dtype), torch.randperm(70, generator=draw)[:50]
    together, apart = (Cache.like(70, key, value) for value in (key[..., :value_size], key[..., :value_size].clone()))
    assert together.shared and not apart.shared
    assert together.slot_bytes == key_heads * size * dtype.itemsize < apart.slot_bytes
    spans = attend.Queries.of([(0, 2, 50, slots)])
    found = []
    for cache in (together, apart):
        attend.write(cache, slots, key, key[..., :value_size])
        assert all(
            torch.equal(a, b) for a, b in zip(cache.read(slots, dtype), (key, key[..., :value_size]), strict=True)
        )
        found.append(torch.full((2, heads, value_size), torch.nan, dtype=dtype))
        attend.attend(query, cache, found[-1], spans, size**-0.5, 9, 2.0, None)
    assert torch.equal(*found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", WHOLE)
@pytest.mark.parametrize(("window", "softcap", "sink"), [(None, None, False), (9, 2.0, True)])
def test_codes_of_a_byte(
    form: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    window: int | None,
    softcap: float | None,
    sink: bool,
) -> None:
    """Against plain attention over the same cache, read; slots that nobody has are NaN where codes or scales can be."""
    heads, key_heads, size, value_size = shape
    draw = torch.Generator().manual_seed(2)
    key = torch.randn(1, key_heads, 50, size, generator=draw).to(dtype)
    value = torch.randn(1, key_heads, 50, value_size, generator=draw).to(dtype)
    query = torch.randn(4, heads, size, generator=draw).to(dtype)
    sinks = torch.randn(heads, generator=draw) if sink else None
    cache = room(100, key, value, None, rounding(form, key_heads))
    assert isinstance(cache, Cache) and cache.key.element_size() == 1
    for plane in (cache.key, cache.value, cache.key_scale, cache.value_scale):
        if plane is not None and plane.is_floating_point():
            plane.fill_(torch.nan)
    order = torch.randperm(100, generator=draw)[:50]
    cache.write(order, key, value)
    spans = [(0, 1, 1, order[:1]), (1, 4, 37, order[3:40])]
    out = torch.full((4, heads, value_size), torch.nan, dtype=dtype)
    assert attend.refusal(query, cache) is None
    attend.attend(query, cache, out, attend.Queries.of(spans), size**-0.5, window, softcap, sinks)
    for start, stop, length, slots in spans:
        for row in range(start, stop):
            seen = slots[: length - stop + row + 1]
            seen = seen if window is None else seen[-window:]
            k, v = cache.read(seen, torch.float32)
            want = explicit(query[row].float()[None, :, None], k, v, None, size**-0.5, softcap, sinks)[0, :, 0]
            bound = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2.0**-8, "atol": 2e-6}
            torch.testing.assert_close(out[row].float(), want, **bound)


def prompts(shape: tuple[int, int, int, int], form: str | None = None) -> tuple[Tensor, Cache, list[Any]]:
    """-> queries, a cache, and spans: a whole text, a few tokens behind a long one, and texts about a block long."""
    if not attend._native().many():
        pytest.skip("no AVX512 with BF16 and VNNI here")
    heads, key_heads, size, value_size = shape
    draw = torch.Generator().manual_seed(5)
    key, value = (torch.randn(1, key_heads, 500, n, generator=draw).bfloat16() for n in (size, value_size))
    query, order = (
        torch.randn(340, heads, size, generator=draw).bfloat16() * 2,
        torch.randperm(520, generator=draw)[:500],
    )
    cache = room(520, key, value, None, None if form is None else rounding(form, key_heads))
    assert isinstance(cache, Cache)
    for plane in (cache.key, cache.value, cache.key_scale, cache.value_scale):
        if plane is not None and plane.is_floating_point():
            plane.fill_(torch.nan)
    cache.write(order, key, value)
    parts = order.split([130, 170, 64, 65, 71])
    texts = ((0, 130), (130, 137), (137, 201), (201, 266), (266, 267))
    return query, cache, [(*rows, len(part), part) for rows, part in zip(texts, parts, strict=True)]


def of_prompts(query: Tensor, cache: Cache, spans: list[Any], *how: Any) -> Tensor:
    out = torch.full((len(query), query.shape[1], cache.value.shape[2]), torch.nan, dtype=query.dtype)
    attend.attend(query, cache, out, attend.Queries.whole(spans), query.shape[2] ** -0.5, *how)
    return out


@pytest.mark.parametrize("shape", [*SHAPES, (100, 1, 64, 32), (16, 1, 96, 80)])
@pytest.mark.parametrize("form", [None, *WHOLE])
@pytest.mark.parametrize(("window", "softcap", "sink"), [(None, None, False), (5, None, False), (100, 3.0, False),
                                                        (70, None, True)])  # fmt: skip
def test_prompts_equal_plain_attention(
    form: str | None, shape: tuple[int, int, int, int], window: int | None, softcap: float | None, sink: bool
) -> None:
    """Weights are rounded to bfloat16 before they meet the values, and the result is: no other error is that large."""
    query, cache, spans = prompts(shape, form)
    sinks = torch.randn(shape[0]) if sink else None
    out = of_prompts(query, cache, spans, window, softcap, sinks)
    for start, stop, length, slots in spans:
        k, v = cache.read(slots, torch.float32)
        at, keys = torch.arange(length - stop + start, length)[:, None], torch.arange(length)[None]
        hidden = (keys > at) if window is None else (keys > at) | (at - keys >= window)
        mask = torch.zeros(stop - start, length).masked_fill_(hidden, torch.finfo(torch.float32).min)
        asked = query[start:stop].float().transpose(0, 1)[None]
        want, most = (explicit(asked, k, values, mask, shape[2] ** -0.5, softcap, sinks)[0].transpose(0, 1)
                      for values in (v, v.abs()))  # fmt: skip
        off = (out[start:stop].float() - want).abs()
        assert bool((off <= 2.0**-8 * (most + want.abs()) + 1e-6).all()), float((off / most).max())
    assert bool(out[267:].isnan().all())  # which belong to nobody


@pytest.mark.parametrize("form", [None, WHOLE[0]])
def test_a_prompt_gives_the_same_bits_however_it_is_cut(form: str | None) -> None:
    query, cache, spans = prompts((8, 2, 64, 64), form)
    whole = of_prompts(query, cache, spans, 100, None, None)
    (start, stop, length, slots), *others = spans
    for cut in (1, 5, 64, 77):
        parts = [(start, start + cut, cut, slots), (start + cut, stop, length, slots)]
        for company in ([], others):
            assert torch.equal(
                of_prompts(query, cache, parts + company, 100, None, None)[start:stop], whole[start:stop]
            )


def test_says_why_not() -> None:
    half, full = torch.zeros(1, 1, 8, dtype=torch.float16), torch.zeros(1, 1, 8)
    assert "float32 or bfloat16" in (attend.refusal(half, Cache(half, half)) or "")
    assert attend.refusal(full, Cache(full.bfloat16(), full)) is not None
    assert attend.refusal(full, Cache(full, full)) is None
    packed = room(1, full[None], full[None], None, (FORMATS["nvfp4"], {}, {}))
    assert "codes of a byte" in (attend.refusal(full, packed) or "")


@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("held", [None, torch.float32, torch.bfloat16, torch.float16, "fp8_per_token_head"])
def test_writes_what_the_cache_would(
    held: torch.dtype | str | None, shape: tuple[int, int, int, int], tokens: int
) -> None:
    """Heads and tokens in either order, numbers of a head next to each other or not."""
    _, heads, size, value_size = shape
    draw = torch.Generator().manual_seed(3)
    slots = torch.randperm(250, generator=draw)[:tokens]
    for dtype, turned in ((torch.float32, False), (torch.bfloat16, True)):
        made = [torch.randn(1, tokens, heads, d, generator=draw).to(dtype).transpose(1, 2) for d in (size, value_size)]
        spread = [torch.stack([t, t], -1).flatten(3)[..., ::2] for t in made] if turned else made
        coded = rounding(held, heads) if isinstance(held, str) else None
        caches = [Cache.like(250, *made, None if coded else held, coded) for _ in range(3)]  # type: ignore[arg-type]
        for cache in caches:
            for plane in (cache.key, cache.value, cache.key_scale, cache.value_scale):
                if plane is not None:
                    plane.zero_()
        caches[0].write(slots, *made)
        attend.write(caches[1], slots, *made)
        attend.write(caches[2], slots, *spread)
        for cache in caches[1:]:
            assert torch.equal(cache.key.float(), caches[0].key.float())
            assert torch.equal(cache.value.float(), caches[0].value.float())


@pytest.mark.parametrize("given", [(1, 2, 5, 16), (1, 2, 3, 16), (1, 4, 4, 16), (1, 2, 4, 32)])
def test_nothing_is_written_for_slots_that_are_not_there(given: tuple[int, ...]) -> None:
    """More tokens than slots, other heads or sizes than the cache's: torch's own error, no memory of others."""
    key = torch.randn(1, 2, 4, 16)
    cache, other = Cache.like(16, key, key.clone()), torch.randn(given)
    slots = torch.arange(4)
    with pytest.raises((RuntimeError, IndexError)):
        attend.write(cache, slots, other, other)
    with pytest.raises((RuntimeError, IndexError)):
        attend.write(cache, slots, key, other)
    together = Cache.like(16, key, key[..., :8])
    for pair in ((other, other[..., :8]), (key, other[..., :8]), (key, key[..., 8:])):
        with pytest.raises((RuntimeError, IndexError, UnsupportedError)):
            attend.write(together, slots, *pair)
