"""The KV cache rounded as a checkpoint declares it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.models import hf, kv
from fewbit.models.fill import Filler
from fewbit.modules.attention import KV
from fewbit.modules.linear import Options
from fewbit.quant.elements import E4M3, F32
from fewbit.quant.plan import Plan
from fewbit.quant.spec import spec
from tests.models import saved

FP8 = spec(E4M3, (F32, 0, 0))


def source(tensors: dict[str, torch.Tensor], held: dict[str, dict[str, str]]) -> Any:
    plan = Plan(kv=FP8)
    return SimpleNamespace(plan=plan, kv=held, checkpoint=SimpleNamespace(read=tensors.__getitem__))


def given(model: Any, made: Any, activations: str = "declared") -> Any:
    kv.apply(model, made, Filler(model, hf.rules(model), Options(activations=activations), torch.device("cpu")))
    return {name: getattr(m, KV) for name, m in model.named_modules() if hasattr(m, KV)}


@pytest.mark.parametrize("scale", [torch.tensor([0.02]), torch.tensor([0.02, 0.03]).view(2, 1, 1)])
def test_scales_reach_their_attention(scale: torch.Tensor) -> None:
    model = hf.build(saved.model("llama").config, torch.float32)
    names = {"model.layers.1.self_attn": {"k": "a", "v": "b"}, "model.layers.0.self_attn": {"kv": "a"}}
    found = given(model, source({"a": scale.bfloat16(), "b": scale * 2}, names))
    assert found.keys() == names.keys()
    held, k, v = found["model.layers.1.self_attn"]
    assert held == FP8 and k["scale0"].dtype == torch.float32
    assert k["scale0"].shape == ((1, 1) if scale.numel() == 1 else (2, 1, 1))
    torch.testing.assert_close(v["scale0"].flatten(), scale.flatten() * 2)
    assert not given(hf.build(model.config, torch.float32), source({"a": scale, "b": scale}, names), "off")


@pytest.mark.parametrize("bad", [0.0, float("nan"), -1.0, float("inf")])
def test_scales_that_mean_nothing(bad: float) -> None:
    model = hf.build(saved.model("llama").config, torch.float32)
    with pytest.raises(CheckpointError, match="must be finite and above 0"):
        given(model, source({"a": torch.tensor([bad])}, {"model.layers.0.self_attn": {"kv": "a"}}))
    with pytest.raises(CheckpointError, match="no v scale"):
        given(model, source({"a": torch.ones(1)}, {"model.layers.0.self_attn": {"k": "a"}}))
    with pytest.raises(CheckpointError, match="no attention of the model has that name"):
        given(model, source({"a": torch.ones(1)}, {"model.layers.9.self_attn": {"kv": "a"}}))


def test_attention_that_is_not_ours(tmp_path: Path) -> None:
    model = hf.build(saved.model("llama").config, torch.float32, "eager")
    with pytest.raises(UnsupportedError, match="transformers' own eager attention"):
        given(model, source({"a": torch.ones(1)}, {"model.layers.0.self_attn": {"kv": "a"}}))
