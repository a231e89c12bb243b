"""hqq over every format: integers lose no more than rounding to nearest does, others are searched and say so."""

from fewbit.algos import get
from fewbit.quant.formats import ROWS
from fewbit.quant.reference import decode, encode
from tests.algos.plain import cases, same, sound, weight

HQQ = get("hqq")


def lost(q, w, power=0.7):
    return float((decode(q) - w).double().abs().pow(power).sum())


def test_never_worse_than_rounding_to_nearest_and_repeats_itself():
    for name, spec, w in cases():
        found, again = (HQQ.encode([w], [spec], None, HQQ.options())[0] for _ in range(2))
        sound(found.weight, spec, w)
        assert same(found.weight, again.weight), name
        if name.startswith(("int", "mxint")) and "why" not in found.log:
            assert lost(found.weight, w) <= lost(encode(w, spec), w) * (1 + 1e-6), name
            assert found.log["loss"] <= found.log["rtn_loss"] * (1 + 1e-6), name
        else:
            squares = [float((decode(q) - w).double().square().sum()) for q in (found.weight, encode(w, spec))]
            assert squares[0] <= squares[1] * (1 + 1e-6), name


def test_integers_with_float_scales_are_optimised_and_others_say_why():
    w = weight((24, 256))
    for name in ("int4-g64", "int3-g64-asym", "int8-channel"):
        assert "why" not in HQQ.encode([w], [ROWS[name].weight], None, HQQ.options())[0].log, name
    for name in ("nf4", "mxint8", "q4_0", "nvfp4"):
        assert "squared error" in HQQ.encode([w], [ROWS[name].weight], None, HQQ.options())[0].log["why"], name


def test_rounds_pay_over_the_search_they_start_from():
    w = weight((64, 512))
    for name in ("int4-g64-asym", "int3-g64", "int2-g64-asym"):
        spec = ROWS[name].weight
        start, end = (HQQ.encode([w], [spec], None, HQQ.options(rounds=rounds))[0].weight for rounds in (0, 20))
        assert lost(end, w) < lost(start, w), name
