"""Queries and keys of latent attention in Triton's interpreter, against the operations of torch that they stand for."""

import pytest
import torch

from fewbit.modules import latent
from fewbit.modules.rotary import FORMS, RotaryForm
from tests.kernels import test_triton_fused
from tests.kernels.test_triton_fused import TURNS, near, random

pytestmark = test_triton_fused.pytestmark


def told(form: RotaryForm, wide: bool) -> tuple[bool, bool, str, bool]:
    return form.reads == "neighbours", form.writes == "neighbours", form.table, form.wide or wide


@pytest.mark.parametrize(("form", "dtype", "tables"), TURNS, ids=str)
def test_assemble(form: RotaryForm, dtype: torch.dtype, tables: torch.dtype) -> None:
    """Odd numbers of heads and channels, parts of merged products, one table for all texts, some channels unturned."""
    from fewbit.kernels import triton_latent

    q, kv = random(2, 3, 5, 24, dtype=dtype), random(2, 3, 5, 30, dtype=dtype, seed=1)[..., :25]
    both = random(2, 3, 20, dtype=dtype, seed=2)
    for width, rope, batch in ((12, 12, 2), (8, 12, 1), (4, 4, 1)):
        turned, entries = both[..., 20 - rope :], width // 2 if form.table == "short" else width
        cos, sin = (random(batch, 3, entries, dtype=tables, seed=s) for s in (4, 5))
        assert triton_latent.takes(q, kv, turned, cos, sin, form.width(cos))
        got = triton_latent.assemble(q, kv, turned, cos, sin, *told(form, tables != dtype))
        want = latent.assembled(q, kv, turned, cos, sin, form)
        for a, b in zip(got, want, strict=True):
            near(a, b, of=4.0)
            assert torch.equal(a[..., : 24 - rope], b[..., : 24 - rope])
            assert a.stride(-1) == 1


@pytest.mark.parametrize(("form", "dtype", "tables"), TURNS, ids=str)
def test_join(form: RotaryForm, dtype: torch.dtype, tables: torch.dtype) -> None:
    """One key for all heads; of queries the last channels alone are written."""
    from fewbit.kernels import triton_latent

    q, both = random(2, 3, 21, 24, dtype=dtype), random(2, 3, 20 + 13, dtype=dtype, seed=2)
    held = both[..., 20:]
    for width, rope in ((12, 12), (8, 12), (4, 4)):
        turned, entries = both[..., 20 - rope : 20], width // 2 if form.table == "short" else width
        cos, sin = (random(1, 3, entries, dtype=tables, seed=s) for s in (4, 5))
        assert triton_latent.takes(q, held.unsqueeze(2), turned, cos, sin, form.width(cos), 1)
        queries = [torch.full((2, 3, 21, 13 + rope), 7.0, dtype=dtype) for _ in range(2)]
        got = triton_latent.join(q, held, turned, cos, sin, queries[0], *told(form, tables != dtype))
        want = latent.joined(q, held, turned, cos, sin, queries[1], form)
        for a, b in ((got, want), queries):
            near(a, b, of=4.0)
            assert torch.equal(a[..., :13], b[..., :13])
        assert bool((queries[0][..., :13] == 7).all())


def test_many_heads_of_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.kernels import triton_latent

    monkeypatch.setattr(triton_latent, "MANY", 1)
    q, kv, turned = random(1, 2, 21, 12), random(1, 2, 21, 14, seed=1), random(1, 2, 4, seed=2)
    cos, sin = random(1, 2, 4, seed=3), random(1, 2, 4, seed=4)
    got = triton_latent.assemble(q, kv, turned, cos, sin, *told(FORMS[0], False))
    for a, b in zip(got, latent.assembled(q, kv, turned, cos, sin, FORMS[0]), strict=True):
        near(a, b, of=4.0)
    none = triton_latent.assemble(q[:, :0], kv[:, :0], turned[:, :0], cos[:, :0], sin[:, :0], *told(FORMS[0], False))
    assert [t.shape for t in none] == [(1, 21, 0, 12)] * 2


def test_what_it_leaves_to_torch() -> None:
    from fewbit.kernels import triton_latent

    q, kv, turned, table = random(1, 2, 3, 12), random(1, 2, 3, 14), random(1, 2, 4), random(1, 2, 4)
    takes = triton_latent.takes
    assert takes(q, kv, turned, table, table, 4)
    assert not takes(q, kv, random(1, 2, 12), table, table, 4) and not takes(q, kv, turned, table, table, 3)
    assert not takes(q, kv.bfloat16(), turned, table, table, 4) and not takes(q, kv[:, :, :2], turned, table, table, 4)
    assert not takes(q, kv, turned, table[:, :1].expand(1, 3, 4), table[:, :1].expand(1, 3, 4), 4)
