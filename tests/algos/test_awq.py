"""awq: scales that pay, ranges that pay, never worse than rtn by the Hessian."""

import pytest
import torch
from torch import Tensor

from fewbit.algos import awq
from fewbit.algos.algo import Stats, shared_planes
from fewbit.algos.clip import row_errors
from fewbit.algos.scaling import judge
from fewbit.errors import SpecError
from fewbit.quant.formats import FORMATS
from fewbit.quant.reference import decode, encode

ROWS = [
    *("int4-g64", "int4-g64-asym", "int4-channel", "int4-tensor", "int3-g32-asym", "int2-g64", "int8-channel"),
    *("fp8-channel", "fp8-tensor", "fp8-block", "nvfp4", "nvfp4-46", "mxfp4", "mxfp6-e2m3", "nf4", "nf4-dq", "fp4"),
]
SHAPES = [(1, 64), (7, 100), (33, 192), (130, 130)]
OPTIONS = awq.Options()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stats(k: int, outliers: float = 1.0, hessian: bool = True, sample: bool = True) -> Stats:
    x = noise(256, k, seed=k) @ (torch.eye(k) + 0.2 * noise(k, k, seed=k + 1))
    x[:, ::17] *= outliers
    h = x.T @ x / len(x)
    given = (h if hessian else None, x[:100] if sample else None)
    return Stats(len(x), x.abs().amax(0), x.abs().mean(0), x.square().mean(0), *given)


def error(w: Tensor, found: Tensor, h: Tensor) -> float:
    """The trace, in float64 and by another path than row_errors."""
    d = (found - w).double()
    return float(torch.trace(d @ h.double() @ d.T))


@pytest.mark.parametrize("name", ROWS)
def test_never_worse_than_rtn(name: str) -> None:
    spec = FORMATS[name].weight
    for n, k in SHAPES:
        group, st = [noise(n, k), 3 * noise(5, k, seed=1)], stats(k, 10)
        assert st.hessian is not None
        found = awq.ALGO.encode(group, [spec] * 2, st, OPTIONS)
        again = awq.ALGO.encode(group, [spec] * 2, st, OPTIONS)
        for w, given, one, two in zip(group, shared_planes(group, [spec] * 2), found, again, strict=True):
            plain = encode(w, spec, given)
            assert error(w, decode(one.weight), st.hessian) <= error(w, decode(plain), st.hessian) * (1 + 1e-5), (n, k)
            assert all(torch.equal(p, two.weight.planes[x]) for x, p in one.weight.planes.items())


@pytest.mark.parametrize("name", ["int4-g64", "int4-g64-asym", "int2-g64", "nvfp4"])
def test_clipping_pays_at_few_bits(name: str) -> None:
    w, st, spec = noise(64, 256), stats(256), FORMATS[name].weight
    assert st.hessian is not None
    (found,) = awq.ALGO.encode([w], [spec], st, OPTIONS)
    assert error(w, decode(found.weight), st.hessian) < 0.9 * error(w, decode(encode(w, spec)), st.hessian)


@pytest.mark.parametrize("kind", ["sample", "moments"])
def test_stats_without_a_hessian(kind: str) -> None:
    w, spec = noise(32, 128), FORMATS["int3-g64"].weight
    whole, st = stats(128, 5), stats(128, 5, hessian=False, sample=kind == "sample")
    assert whole.hessian is not None
    (found,) = awq.ALGO.encode([w], [spec], st, OPTIONS)
    assert error(w, decode(found.weight), whole.hessian) < error(w, decode(encode(w, spec)), whole.hessian)
    assert float(row_errors(decode(found.weight) - w, st).sum()) < float(
        row_errors(decode(encode(w, spec)) - w, st).sum()
    )


def test_without_stats_it_is_rtn() -> None:
    w, spec = noise(8, 64), FORMATS["int4-g64"].weight
    (found,) = awq.ALGO.encode([w], [spec], None, OPTIONS)
    assert torch.equal(decode(found.weight), decode(encode(w, spec)))


def test_siblings_share_the_outer_scale() -> None:
    group, spec = [noise(16, 64), 9 * noise(8, 64, seed=1)], FORMATS["nvfp4"].weight
    a, b = awq.ALGO.encode(group, [spec] * 2, stats(64), OPTIONS)
    assert torch.equal(a.weight.planes["scale1"], b.weight.planes["scale1"])


@pytest.mark.parametrize("name", ROWS)
def test_scale_never_loses_and_repeats(name: str) -> None:
    format = FORMATS[name]
    for n, k in SHAPES[1:]:
        group, st = [noise(n, k), noise(5, k, seed=1)], stats(k, 30)
        for act in {None, format.act}:
            s = awq.ALGO.scale(group, [format.weight] * 2, act, st, OPTIONS)  # type: ignore[misc]
            measure = judge(group, [format.weight] * 2, act, st)
            assert s.shape == (k,) and bool((s > 0).all())
            assert measure(s) <= measure(torch.ones(k))
            assert torch.equal(s, awq.scale(group, [format.weight] * 2, act, st, OPTIONS))


@pytest.mark.parametrize(
    ("name", "factor"), [("int4-g64", 0.6), ("int4-g64-asym", 0.4), ("int3-g64", 0.6), ("nvfp4", 0.2)]
)
def test_outlier_channels(name: str, factor: float) -> None:
    """A few inputs carry most of the output: scaled up, their weights are held more exactly."""
    w, st, spec = noise(64, 256), stats(256, 50), FORMATS[name].weight
    assert st.hessian is not None
    s = awq.scale([w], [spec], None, st, OPTIONS)
    assert error(w, decode(encode(w * s, spec)) / s, st.hessian) < factor * error(
        w, decode(encode(w, spec)), st.hessian
    )
    assert float(s[::17].min()) > float(s[1::17].max())


def test_identity_where_nothing_is_gained() -> None:
    """Weights that the format holds exactly."""
    w = torch.randint(-8, 8, (16, 64), generator=torch.Generator().manual_seed(0)).float()
    w[:, 0] = -8
    w[:, 1:].clamp_(max=7)
    spec = FORMATS["int4-g64-asym"].weight
    w[:, 1] = 7
    assert torch.equal(decode(encode(w, spec)), w)
    assert torch.equal(awq.scale([w], [spec], None, stats(64, 20), OPTIONS), torch.ones(64))


def test_channels_of_one_row_of_the_producer_share_a_scale() -> None:
    share = torch.arange(32).repeat(2, 2, 1).flatten().view(2, 2, 32).add(torch.tensor([0, 32]).view(2, 1, 1)).flatten()
    s = awq.scale([noise(64, 128)], [FORMATS["int4-g64"].weight], None, stats(128, 50), OPTIONS, share)
    slots = [s[share == i] for i in range(64)]
    assert all(len(v) == 2 and v[0] == v[1] for v in slots) and len(s.unique()) > 2


def test_what_is_refused() -> None:
    for wrong in ({"duo": "maybe"}, {"clip": 0.0}, {"steps": 0}):
        with pytest.raises(SpecError, match="awq"):
            awq.Options(**wrong)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="neither"):
        awq.scale([noise(8, 64)], [FORMATS["int4-g64"].weight], None, stats(64, 1, False, False), OPTIONS)
