"""The reference on a GPU: the same codes as on the CPU, bit for bit, and the same logits within float32 rounding."""

from pathlib import Path

import pytest
import torch

import fewbit
from fewbit.quant.formats import FORMATS
from fewbit.quant.reference import decode, encode, fake_quant
from tests.checkpoints.compare import relative
from tests.tiny import llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
ENCODABLE = [name for name, row in FORMATS.items() if row.weight.element.kind != "run"]


SEARCHED = {"q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"}  # scales are found by sums, whose order is free
SUMMED = {"nf4-dq", "q1_0"}  # a mean


@pytest.mark.parametrize("name", ENCODABLE)
def test_same_codes_as_on_the_cpu(name: str) -> None:
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    here, there = encode(w, FORMATS[name].weight), encode(w.cuda(), FORMATS[name].weight)
    assert torch.equal(decode(here), decode(here.to("cuda")).cpu())
    if name in SEARCHED | SUMMED:
        lost = [relative(decode(q).cpu(), w) for q in (here, there)]
        assert abs(lost[1] / lost[0] - 1) < 0.01
    else:
        for plane, codes in here.planes.items():
            assert torch.equal(codes, there.planes[plane].cpu()), plane


@pytest.mark.parametrize("name", [name for name in ENCODABLE if FORMATS[name].act])
def test_same_rounding_of_activations(name: str) -> None:
    x = torch.randn(7, 512, generator=torch.Generator().manual_seed(0))
    act = FORMATS[name].act
    assert act is not None
    given = {f"scale{i}": torch.full((1, 1), 0.01) for i, s in enumerate(act.scales) if not s.dynamic}
    there = fake_quant(x.cuda(), act, {n: p.cuda() for n, p in given.items()})
    assert torch.equal(fake_quant(x, act, given), there.cpu())


@pytest.mark.parametrize("form", [None, "int4-g128", "nvfp4", "fp8-block", "q4_k"])
def test_logits(tmp_path: Path, form: str | None) -> None:
    path = llama(tmp_path / "m", hidden_size=256, intermediate_size=512, num_attention_heads=4)
    ids = torch.arange(24).view(2, 12)
    out = []
    for device in ("cpu", "cuda"):
        model = fewbit.load(path, dtype=torch.float32, format=form, device=device)
        with torch.inference_mode():
            out.append(model(ids.to(device)).logits.cpu())
    assert relative(out[1], out[0]) < (1e-5 if form in (None, "int4-g128", "q4_k") else 2e-2)
