"""Both real models in float32, 64 ragged requests at random times: token for token transformers' generate."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fewbit
from fewbit.engine.config import EngineConfig
from fewbit.engine.engine import Engine
from fewbit.engine.params import SamplingParams
from fewbit.engine.request import Request
from tests.engine.test_engine import GREEDY, drain, expected, prompts, tokens
from tests.real import gemma3, smollm2

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("fetch", [smollm2, gemma3])
def test_greedy_is_generate(fetch: Callable[[], Path]) -> None:
    """Chunks, preemption and prefix hits are all forced, and counted."""
    place = fetch()
    asked = prompts(64, longest=48, shared=40)
    model = fewbit.load(place, dtype=torch.float32, kernels="decoded")
    want = [expected(model, prompt, 4 + i % 13) for i, prompt in enumerate(asked)]
    del model
    engine = Engine(EngineConfig.of(model=str(place), dtype="float32", kernels="decoded", max_num_batched_tokens=64,
                                    max_num_seqs=12, max_model_len=256, kv_cache_memory_bytes=12 << 20))  # fmt: skip
    requests = [Request(str(i), p, SamplingParams(max_tokens=4 + i % 13, **GREEDY)) for i, p in enumerate(asked)]
    found = drain(engine, requests)
    assert [tokens(found[str(i)]) for i in range(64)] == want
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.prefix_hits > 0 and stats.pages_used == 0
