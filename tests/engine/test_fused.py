"""An engine on a fused model gives the tokens that it gives on the model as it is."""

from pathlib import Path
from typing import Any

import pytest

from fewbit.engine import start
from fewbit.engine.config import EngineConfig
from fewbit.engine.engine import Engine
from fewbit.engine.params import SamplingParams
from fewbit.engine.request import Request
from tests.engine.test_engine import GREEDY, drain, prompts, tokens
from tests.tiny import llama


def answers(folder: Path, **options: Any) -> list[list[int]]:
    engine = Engine(EngineConfig.of(model=str(folder), device="cpu", dtype="bfloat16", max_model_len=96, **options))
    asked = [Request(str(i), p, SamplingParams(max_tokens=5, **GREEDY)) for i, p in enumerate(prompts(6, shared=20))]
    found = drain(engine, asked)
    engine.shutdown()
    return [tokens(found[r.id]) for r in asked]


@pytest.mark.parametrize("options", [{}, {"quantization": "int4-g128"}])
def test_same_tokens(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = llama(tmp_path, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    plain = answers(folder, **options)
    real, loaded = start.build.load, []

    def load(*args: Any, **named: Any) -> Any:
        loaded.append(real(*args, **{**named, "fuse": True}))
        return loaded[0]

    monkeypatch.setattr(start.build, "load", load)
    assert answers(folder, **options) == plain
    assert loaded[0].fewbit_fused.count("merged") == 4
