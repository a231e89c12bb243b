"""Kernels of a layer, counted: as a GPU's profiler counted them in transformers' own code, and after fusing."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from fewbit.models.fuse_count import Count, counted
from tests.tiny import llama
from tests.verbs import run

# (plain, fused); a profile on an H200 gave 37, 53 and 81 for llama, qwen3 and gemma3
SEEN = {"llama": (37, 8), "qwen3": (53, 10), "gemma3_text": (81, 10), "phi3": (36, 8), "mistral": (37, 8),
        "gemma2": (61, 8), "qwen2": (37, 8), "granite": (39, 10), "cohere2": (37, 8), "glm4": (56, 8),
        "olmo2": (55, 10)}  # fmt: skip
EXPERTS = {"mixtral": 12, "qwen3_moe": 14, "gpt_oss": 16, "glm4_moe": 15, "deepseek_v3": 19}  # fused, at most


@pytest.mark.parametrize("name", SEEN)
def test_dense(name: str) -> None:
    found = counted(AutoConfig.for_model(name))
    assert (found.plain, found.fused) == SEEN[name]


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name: str) -> None:
    assert counted(AutoConfig.for_model(name)).fused <= EXPERTS[name]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_do_not_count_one_by_one(name: str) -> None:
    few, many = (counted(AutoConfig.for_model(name, **dict.fromkeys(("num_local_experts", "num_experts"), n)))
                 for n in (4, 16))  # fmt: skip
    assert few == many and few.fused < few.plain


def test_views_are_free() -> None:
    x, count = torch.randn(4, 6), Count()
    count.on = True
    with count:
        x.T.reshape(6, 2, 2)[:, 0].unsqueeze(0).expand(3, -1, -1)
        assert count.found == 0
        (x @ x.T).add_(1).contiguous()
    assert count.found == 2


def test_inspect(tmp_path: Path) -> None:
    llama(tmp_path)
    found = json.loads(run("inspect", tmp_path, "--fusion", "--json").stdout)["fusion"]
    assert found["kernels_per_layer"] == {"plain": 37, "fused": 8}
    assert found["groups"] == ["q_proj + k_proj + v_proj", "gate_proj + up_proj"] and not found["refused"]
    assert {"norms", "wiring", "rotary", "gated", "sums"} <= found.keys()
    said = run("inspect", tmp_path, "--fusion").stdout
    assert "llama: 8 kernels a layer outside attention, 37 in its own code" in said
