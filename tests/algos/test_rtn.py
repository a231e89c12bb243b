"""rtn over every format: the rule's own scales to the bit, and searched ones that never lose more."""

import pytest
import torch

from fewbit.algos import get
from fewbit.algos.rounding import nearest
from fewbit.quant import elements
from fewbit.quant.formats import ROWS
from fewbit.quant.reference import decode, encode
from tests.algos.plain import cases, same, sound, specs, stats, weight

RTN = get("rtn")


def squared(q, w, cost=None):
    error = (decode(q) - w).double().square()
    return float((error if cost is None else error * cost).sum())


def test_amax_is_what_encode_gives():
    for name, spec, w in cases():
        (found,) = RTN.encode([w], [spec], None, RTN.options())
        assert same(found.weight, encode(w, spec)), name


def test_mse_never_loses_more_than_amax_and_repeats_itself():
    for name, spec, w in cases():
        found, again = (RTN.encode([w], [spec], None, RTN.options(scale="mse"))[0].weight for _ in range(2))
        sound(found, spec, w)
        assert same(found, again), name
        assert squared(found, w) <= squared(encode(w, spec), w) * (1 + 1e-6), name


def test_with_statistics_errors_count_by_their_input():
    for name, spec, w in cases():
        seen = stats(w.shape[1])
        found = RTN.encode([w], [spec], seen, RTN.options(scale="mse"))[0].weight
        cost = seen.square.double()
        assert squared(found, w, cost) <= squared(encode(w, spec), w, cost) * (1 + 1e-4), name


@pytest.mark.parametrize(
    ("name", "most"), [("int4-g64", 0.95), ("int3-g64", 0.85), ("int2-g64", 0.6), ("nvfp4", 0.9), ("nf4", 0.99)]
)
def test_a_search_pays(name, most):
    w, spec = weight((64, 512)), ROWS[name].weight
    found = RTN.encode([w], [spec], None, RTN.options(scale="mse"))[0].weight
    assert squared(found, w) < most * squared(encode(w, spec), w)


def test_a_search_beats_four_over_six():
    w = weight((64, 512))
    found = RTN.encode([w], [ROWS["nvfp4-46"].weight], None, RTN.options(scale="mse"))[0].weight
    assert squared(found, w) < squared(encode(w, ROWS["nvfp4-46"].weight), w)


@pytest.mark.parametrize("scale", ["amax", "mse"])
def test_siblings_share_an_outer_scale(scale):
    ws, spec = [weight((16, 256)), 3 * weight((8, 256), 5)], ROWS["nvfp4"].weight
    a, b = (e.weight for e in RTN.encode(ws, [spec] * 2, None, RTN.options(scale=scale)))
    assert torch.equal(a.planes["scale1"], b.planes["scale1"])
    assert not torch.equal(encode(ws[0], spec).planes["scale1"], a.planes["scale1"])


def test_rounding_to_values_is_decode_of_encode():
    x = torch.cat([torch.randn(20000) * size for size in (1e-4, 0.01, 1, 8, 300)])
    x = torch.cat(
        [x, torch.linspace(-10, 10, 4001), torch.arange(-600, 601) / 4, torch.tensor([0.0, -0.0, 1e30, -1e30])]
    )
    for element in {spec.element for spec in specs().values()}:
        found = nearest(element, x.device)(x, torch.empty_like(x))
        assert torch.equal(found, elements.decode(elements.encode(x, element), element)), element.name
