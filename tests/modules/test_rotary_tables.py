"""Rotary tables that are looked up are those that are computed, to the bit, and where they are not nothing changes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbit.models import hf
from fewbit.modules import rotary_tables
from tests.models import saved

PLACES = torch.tensor([[3, 0, 40, 63, 3]])


def modules(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if "forward" in vars(m)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "phi3", "gpt_oss", "glm4", "deepseek_v3"])
def test_the_same_bits(model_type: str, dtype: torch.dtype) -> None:
    model = saved.model(model_type).eval()
    config = hf.read_config({"model_type": model_type, **saved.FULL.get(model_type, {})})
    kinds: list[tuple[Any, ...]] = [(kind,) for kind in set(getattr(config, "layer_types", None) or ())]
    rotary_tables.keep(model, 64)
    (module,) = modules(model)
    asked = kinds if len(rotary_tables.inspect.signature(type(module).forward).parameters) > 3 else [()]
    x = torch.zeros(1, 5, 8, dtype=dtype)
    for more in asked:
        want = type(module).forward(module, x, PLACES, *more)
        for _ in range(2):
            got = module(x, PLACES, *more)
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))
    assert all(held is not None for held in module.forward.args[2].values())  # type: ignore[union-attr]


class Odd(nn.Module):
    """What it gives depends on how far the places go."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        far = position_ids[..., None] * (1.0 + 0 * x[0, 0, 0]) / len(position_ids[0])
        return far.cos(), far.sin()


def test_what_depends_on_more_than_places_is_computed() -> None:
    model = nn.Sequential(Odd())
    rotary_tables.keep(model, 64)
    x = torch.zeros(1, 5, 8)
    got = model[0](x, PLACES)
    assert all(torch.equal(a, b) for a, b in zip(got, Odd()(x, PLACES), strict=True))
    assert list(model[0].forward.args[2].values()) == [None]


def test_others_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4))
    rotary_tables.keep(model, 64)
    rotary_tables.keep(nn.Sequential(Odd()), rotary_tables.MOST + 1)
    assert not modules(model)
