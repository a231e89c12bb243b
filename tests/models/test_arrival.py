"""Arrivals: weights that become what a value says of each, with planes, static inputs and transforms that are given."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from fewbit.errors import SpecError, UnsupportedError
from fewbit.models.arrival import Arrival, online
from fewbit.models.build import load
from fewbit.models.shard_proof import Meeting, Simulated, together
from fewbit.modules.attention import KV
from fewbit.quant.elements import E4M3, F32, INT8
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import Transform
from fewbit.quant.reference import decode, encode
from fewbit.quant.reference import linear as reference
from fewbit.quant.spec import Format, spec
from tests.models import saved

STATIC = Format(spec(E4M3, (F32, 0, 0)), spec(E4M3, (F32, 0, 0)))
ROWS = Format(spec(INT8, (F32, 1, 0)))
DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"
SCALE = torch.tensor([[0.125]])


def e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """Rounded by torch's own cast."""
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def test_a_device_that_adds_up_is_left_alone() -> None:
    """Other rules, and rewrites without products, give the same bits on any."""
    summed = {
        name for name, form in FORMATS.items() if form.transforms == () and not Arrival(Format(form.weight)).anywhere
    }
    assert summed >= {"nvfp4-46", "nf4-dq", "q4_k", "q1_0"}
    assert not summed & {"fp8-tensor", "fp8-block", "int4-g128", "int8-channel-a8", "nvfp4", "mxfp4", "nf4"}
    kinds = transforms(32, 16)
    for kind, free in {"permute": True, "input_scale": True, "rotate": False, "low_rank": False}.items():
        form = Format(ROWS.weight, transforms=(kind,))
        assert Arrival(form, transforms=(kinds[kind],)).anywhere is free
        assert Arrival(form, transforms=(kinds[kind],), rewrite=False).anywhere


def test_given_planes(tmp_path: Path) -> None:
    """Per tensor scales of weight and input, against transformers' model rounded by hand."""
    theirs = saved.model("llama")
    saved.save(theirs, tmp_path)
    wide = {"scale0": torch.tensor([[0.01]])}
    ours = load(tmp_path, format={DOWN: Arrival(STATIC, wide, {"scale0": SCALE})})
    module = theirs.get_submodule(DOWN)
    module.weight.data = e4m3(module.weight.data, wide["scale0"])
    module.register_forward_pre_hook(lambda _, args: (e4m3(args[0], SCALE),))
    torch.testing.assert_close(saved.logits(ours), saved.logits(theirs), rtol=1e-4, atol=1e-5)


def transforms(k: int, n: int) -> dict[str, Transform]:
    draw = torch.Generator().manual_seed(1)
    turn, _ = torch.linalg.qr(torch.randn(16, 16, generator=draw))
    return {
        "permute": Transform("permute", {"index": torch.randperm(k, generator=draw)}),
        "input_scale": Transform("input_scale", {"scale": torch.rand(k, generator=draw) + 0.5}),
        "rotate": Transform("rotate", {"matrix": turn}),
        "low_rank": Transform("low_rank", {"a": torch.randn(4, k, generator=draw), "b": torch.ones(n, 4) / 8}),
    }


@pytest.mark.parametrize("kinds", [("permute",), ("input_scale",), ("rotate",), ("input_scale", "low_rank")])
def test_weights_are_rewritten_for_transforms(kinds: tuple[str, ...]) -> None:
    """What the layer does stays, to the rounding of 8 bits."""
    w, x = torch.randn(32, 64), torch.randn(5, 64)  # outputs are of about 8
    held = tuple(transforms(64, 32)[kind] for kind in kinds)
    found = online(w, Arrival(Format(ROWS.weight, transforms=kinds), transforms=held))
    torch.testing.assert_close(reference(x, found), linear(x, w), rtol=0, atol=0.6)
    as_it_came = online(w, Arrival(Format(ROWS.weight, transforms=kinds), transforms=held, rewrite=False))
    torch.testing.assert_close(decode(as_it_came.weight), decode(encode(w, ROWS.weight)))


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_stacks(model_type: str, tmp_path: Path) -> None:
    """Experts that come one by one, or whole and transposed: each with its own rows of the planes, and inputs."""
    theirs = saved.model(model_type)
    saved.save(theirs, tmp_path)
    path = "model.layers.0.mlp.experts"
    host = theirs.get_submodule(path)
    arrivals: dict[str, Arrival] = {}
    form = Format(ROWS.weight, STATIC.act)
    for name in ("gate_up_proj", "down_proj"):
        held = getattr(host, name).data
        w = (held.mT if host.is_transposed else held).contiguous()
        scale = w.abs().amax(-1, keepdim=True) / 127 * torch.linspace(0.5, 1.5, w.shape[-2])[:, None]
        arrivals[f"{path}.{name}"] = Arrival(form, {"scale0": scale}, {"scale0": torch.full((len(w), 1, 1), 4.0)})
        back = (w / scale).round().clamp(-128, 127) * scale
        getattr(host, name).data = back.mT.contiguous() if host.is_transposed else back
    ours = load(tmp_path, format=arrivals, activations="off")
    torch.testing.assert_close(saved.logits(ours), saved.logits(theirs), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(saved.logits(load(tmp_path, format=arrivals)), saved.logits(theirs), rtol=1e-3)


def test_ranks_hold_parts_of_them(tmp_path: Path) -> None:
    made = saved.model("qwen3_moe")
    saved.save(made, tmp_path)
    keys = made.model.layers[0].self_attn.k_proj.out_features
    stack = made.model.layers[0].mlp.experts.down_proj.shape[:2]
    arrivals = {
        "model.layers.0.self_attn.k_proj": Arrival(ROWS, {"scale0": torch.full((keys, 1), 0.01)}),
        "model.layers.1.self_attn.o_proj": Arrival(STATIC, {"scale0": SCALE / 64}, {"scale0": SCALE}),
        "model.layers.0.mlp.experts.down_proj": Arrival(ROWS, {"scale0": torch.full((*stack, 1), 0.01)}),
    }
    kv = {"model.layers.1.self_attn": (STATIC.weight, {"scale0": SCALE}, {"scale0": SCALE / 2})}
    want = saved.logits(load(tmp_path, format=arrivals, kv=kv))
    meeting = Meeting(2)
    ranks = [load(tmp_path, format=arrivals, kv=kv, ranks=Simulated(r, 2, meeting)) for r in range(2)]
    for found in together(ranks, meeting, saved.logits):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_keys_and_values(tmp_path: Path) -> None:
    theirs = saved.model("llama")
    saved.save(theirs, tmp_path)
    planes = {"scale0": torch.tensor([[2.0**-7]])}
    ours = load(tmp_path, kv={"model.layers.1.self_attn": (STATIC.weight, planes, planes)})
    assert [hasattr(layer.self_attn, KV) for layer in ours.model.layers[:2]] == [False, True]
    assert not torch.equal(saved.logits(ours), saved.logits(theirs))
    off = load(tmp_path, kv={"model.layers.1.self_attn": (STATIC.weight, planes, planes)}, activations="off")
    torch.testing.assert_close(saved.logits(off), saved.logits(theirs), rtol=1e-4, atol=1e-5)


WRONG: list[tuple[Any, type[Exception], str]] = [
    (lambda: Arrival(STATIC), SpecError, "scale0 is not given"),
    (lambda: Arrival(STATIC, act={"scale0": -SCALE}), SpecError, "finite and above 0"),
    (lambda: Arrival(ROWS, {"scale0": SCALE * float("nan")}), SpecError, "must be finite"),
    (lambda: Arrival(ROWS, transforms=tuple(transforms(8, 8).values())), SpecError, "the format has none"),
    (lambda: Arrival(FORMATS["q4_0"], {"scale0": SCALE}), SpecError, "chooses all of them itself"),
    (lambda: online(torch.ones(4, 4), Arrival(ROWS, {"scale0": torch.ones(3, 1)})), SpecError, r"\[3, 1\]"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_values_that_make_no_sense(case: int) -> None:
    call, error, text = WRONG[case]
    with pytest.raises(error, match=text):
        call()


def test_names_that_the_model_lacks(tmp_path: Path) -> None:
    saved.save(saved.model("llama", tie_word_embeddings=True), tmp_path)
    with pytest.raises(SpecError, match=r"has no model\.layers\.9\.q; it has model\.layers\.0"):
        load(tmp_path, format={"model.layers.9.q": Arrival(ROWS)})
    with pytest.raises(UnsupportedError, match=r"tied.*lm_head"):
        load(tmp_path, format={"lm_head": Arrival(ROWS)})
    with pytest.raises(SpecError, match=r"no attention module model\.layers\.9"):
        load(tmp_path, kv={"model.layers.9": (STATIC.weight, {}, {})})
