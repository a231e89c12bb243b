"""join: every value of what is joined is what it was."""

import pytest
import torch

from fewbit.errors import SpecError
from fewbit.quant.formats import FORMATS
from fewbit.quant.join import join
from fewbit.quant.qtensor import Quantized, make
from fewbit.quant.reference import decode, encode
from fewbit.quant.spec import FLAT

K = 512


def quantized(name: str, n: int, seed: int) -> Quantized:
    w = torch.randn(n, K, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
    return Quantized(FORMATS[name], encode(w, FORMATS[name].weight))


WRITABLE = [name for name in FORMATS if not name.startswith(("iq1", "iq2", "iq3", "tq1"))]  # encode can


@pytest.mark.parametrize("name", WRITABLE)
def test_decodes_to_the_same(name: str) -> None:
    parts = [quantized(name, n, i) for i, n in enumerate((256, 128, 128))]
    spec = FORMATS[name].weight
    if any(scale.block[0] == FLAT for scale in (*spec.scales, *spec.zeros)):
        with pytest.raises(SpecError, match="rows of the whole tensor"):
            join(parts)
        return
    found = join(parts)
    make(found.weight.spec, found.weight.shape, found.weight.planes)
    assert torch.equal(decode(found.weight), torch.cat([decode(p.weight) for p in parts]))
    assert found.format.act == FORMATS[name].act
    widened = any(scale.block == (0, 0) for scale in (*spec.scales, *spec.zeros))
    assert (found.weight.spec == spec) == (not widened)


def test_one_value_for_all_stays_one() -> None:
    part = quantized("fp8-tensor", 32, 0)
    assert join([part, part]).format == part.format


def test_blocks_must_meet_at_their_edges() -> None:
    with pytest.raises(SpecError, match="over 128 rows"):
        join([quantized("fp8-block", 100, 0), quantized("fp8-block", 128, 1)])


def test_static_inputs_must_agree() -> None:
    parts = [quantized("fp8-tensor", 16, i) for i in (0, 1)]
    held = [Quantized(p.format, p.weight, {"scale0": torch.full((1, 1), float(i + 1))}) for i, p in enumerate(parts)]
    with pytest.raises(SpecError, match="rounded in different ways"):
        join(held)
