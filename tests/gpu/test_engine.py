"""The engine on a GPU: the same tokens as on a CPU, in float32; packed, alone, with a narrow cache."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit.engine.config import EngineConfig
from fewbit.engine.engine import Engine
from fewbit.engine.params import SamplingParams
from fewbit.engine.request import Request
from tests.engine.test_engine import GREEDY, drain, prompts, tokens
from tests.tiny import llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("engine") / "model", num_attention_heads=4, num_key_value_heads=2, head_dim=32)


def answers(folder: Path, device: str, **options: Any) -> list[list[int]]:
    engine = Engine(EngineConfig.of(model=str(folder), device=device, max_model_len=96, **options))
    asked = [Request(str(i), p, SamplingParams(max_tokens=6, **GREEDY)) for i, p in enumerate(prompts(24, shared=20))]
    found = drain(engine, asked)
    assert engine.stats().pages_used == 0
    engine.shutdown()
    return [tokens(found[r.id]) for r in asked]


@pytest.mark.parametrize(
    "options", [{}, {"max_num_batched_tokens": 16, "max_num_seqs": 6}, {"quantization": "int4-g128"}]
)
def test_same_tokens_as_a_cpu(folder: Path, options: dict[str, Any]) -> None:
    assert answers(folder, "cuda", dtype="float32", **options) == answers(folder, "cpu", dtype="float32", **options)


@pytest.mark.parametrize("cache", ["auto", "fp8", "int8"])
def test_bfloat16_answers(folder: Path, cache: str) -> None:
    found = answers(folder, "cuda", dtype="bfloat16", kv_cache_dtype=cache)
    assert all(len(each) == 6 for each in found)


def test_memory_comes_back(folder: Path) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    answers(folder, "cuda", dtype="bfloat16", gpu_memory_utilization=0.5)
    assert before - torch.cuda.mem_get_info()[0] < 64 << 20
