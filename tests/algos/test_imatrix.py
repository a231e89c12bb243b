"""imatrix over every format: errors weighted by their input never lose more, and the K types gain."""

import pytest

from fewbit.algos import get
from fewbit.quant.formats import ROWS
from fewbit.quant.reference import decode, encode
from tests.algos.plain import cases, same, sound, stats, weight

IMATRIX = get("imatrix")


def weighted(q, w, cost):
    return float(((decode(q) - w).double().square() * cost.double()).sum())


def test_never_worse_than_rounding_to_nearest_and_repeats_itself():
    for name, spec, w in cases():
        seen = stats(w.shape[1])
        found, again = (IMATRIX.encode([w], [spec], seen, IMATRIX.options())[0] for _ in range(2))
        sound(found.weight, spec, w)
        assert same(found.weight, again.weight), name
        floor = weighted(encode(w, spec), w, seen.square)
        assert weighted(found.weight, w, seen.square) <= floor * (1 + 1e-4), name
        assert found.log["loss"] <= floor * (1 + 1e-4), name


@pytest.mark.parametrize(
    "name", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "q4_0", "q5_1", "int4-g32"]
)
def test_importance_pays(name):
    w, seen = weight((48, 512)), stats(512)
    spec = ROWS[name].weight
    found = IMATRIX.encode([w], [spec], seen, IMATRIX.options())[0].weight
    assert weighted(found, w, seen.square) < 0.97 * weighted(encode(w, spec), w, seen.square)


def test_without_statistics_it_says_so():
    w, spec = weight((24, 256)), ROWS["q4_k"].weight
    (found,) = IMATRIX.encode([w], [spec], None, IMATRIX.options())
    assert same(found.weight, encode(w, spec))
    assert "no statistics" in found.log["why"]
