"""The reference on a GPU: the same codes as on the CPU, bit for bit, and the same logits within float32 rounding."""

from pathlib import Path

import pytest
import torch
from torch import nn

import fewbit
from fewbit.modules.experts import Experts
from fewbit.modules.linear import Linear
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import QTensor
from fewbit.quant.reference import decode, encode, fake_quant
from fewbit.quant.spec import Format
from tests.checkpoints.compare import relative
from tests.models import saved
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


def held(model: nn.Module) -> list[QTensor]:
    """All quantized weights, as they came."""
    found = [module.parts for module in model.modules() if isinstance(module, Linear)]
    stacks = [module.parts for module in model.modules() if isinstance(module, Experts)]
    found += [parts for stack in stacks for parts in stack.values()]
    return [part.quantized.weight for parts in found for part in parts]


ARRIVE = ("fp8-tensor", "int4-g128", "mxfp4", "nvfp4-46", "nf4-dq", "q4_k")


@pytest.mark.parametrize(
    ("kind", "name"), [*(("llama", name) for name in ARRIVE), ("mixtral", "fp8-tensor"), ("gpt_oss", "mxfp4")]
)
def test_same_planes_as_they_arrive(tmp_path: Path, kind: str, name: str) -> None:
    """Of linears and of experts; by the GPU where nothing is added up, in an order of the device's own."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    path = llama(tmp_path / "m", **wide) if kind == "llama" else saved.save(saved.model(kind), tmp_path / "m")
    form = Format(FORMATS[name].weight)
    here, there = (held(fewbit.load(path, format=form, device=d, kernels="reference")) for d in ("cpu", "cuda"))
    assert len(here) == len(there) > 8
    for q, other in zip(here, there, strict=True):
        assert other.device.type == "cuda"
        assert all(torch.equal(plane, other.planes[of].cpu()) for of, plane in q.planes.items())


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
