"""Tensor parallel over nccl: two GPUs give one GPU's tokens, and a rank that dies ends the engine."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit.engine.config import EngineConfig
from fewbit.engine.engine import Engine
from fewbit.engine.params import SamplingParams
from fewbit.engine.request import Request
from fewbit.errors import FewbitError
from tests.compat import small
from tests.engine.test_fused import SWITCHED
from tests.engine.test_parallel import GREEDY, gone, pids, same, texts
from tests.models import saved
from tests.own_code import with_code
from tests.tiny import llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama in 4 bits": ("llama", {"quantization": "int4-g32"}),
    "experts": ("qwen3_moe", {}),
    "latents": ("deepseek_v3", {}),
    "turned before attention": ("phi", {}),
    "eager": ("llama", {"enforce_eager": True}),
    "preemption": ("llama", {"max_num_batched_tokens": 9, "max_num_seqs": 5}),
}


def engine(path: Path, size: int, **options: Any) -> Engine:
    options = {"dtype": "float32", "max_num_seqs": 8, "max_model_len": 96, **options}
    return Engine(EngineConfig.of(model=str(path), device="cuda", tensor_parallel_size=size, **options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("parallel") / "llama", num_attention_heads=4, num_key_value_heads=2,
                 head_dim=32)  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_are_one(name: str, folder: Path, tmp_path: Path) -> None:
    kind, options = MODELS[name]
    path = folder if kind == "llama" else saved.save(saved.model(kind), tmp_path / "model")
    alone = engine(path, 1, **options)
    want = texts(alone, 12, 90)
    alone.shutdown()
    both = engine(path, 2, **options)
    (pid,) = pids(both)
    try:
        assert (both.runner.graphs is None) == (name == "eager")
        assert both.ahead
        same(want, texts(both, 12, 90))
        both.ahead = False
        same(want, texts(both, 12, 90))
        both.ahead = True
        both.add(Request("last", [3, 4, 5], SamplingParams(max_tokens=9, **GREEDY)))
        both.step()
    finally:
        both.shutdown()  # with a step in flight
    assert gone(pid)


def logprobs(path: Path, size: int, **options: Any) -> Tensor:
    """Of the tokens of prompts that come one after the other."""
    of, draw, found = engine(path, size, dtype="bfloat16", **options), random.Random(0), []
    for count in (2, 6, 40, 80):
        prompt = [draw.randrange(3, 250) for _ in range(count)]
        of.add(Request(str(count), prompt, SamplingParams(max_tokens=1, prompt_logprobs=0, **GREEDY)))
        while of.has_work():
            for delta in of.step():
                held = zip((delta.prompt_logprobs or [])[1:], prompt[1:], strict=False)
                found += [each[token].logprob for each, token in held]
    of.shutdown()
    return torch.tensor(found)


def test_two_ranks_round_to_fp8_as_one(tmp_path: Path) -> None:
    """Codes of a row have one scale, of which each rank sees a part. Ranks round their parts of a sum before they meet,
    and a bfloat16 step (2**-9) moves a code by one of its own (2**-4) now and then: by arithmetic 0.6 of what rounding
    to such codes costs. On a CPU, where all of it is software, 0.43."""
    path = llama(tmp_path / "llama", num_attention_heads=8, num_key_value_heads=2, head_dim=64, hidden_size=256,
                 intermediate_size=512)  # fmt: skip
    one, two = (logprobs(path, size, quantization="fp8") for size in (1, 2))
    cost = (one - logprobs(path, 1)).abs().mean()
    assert len(two) == 124 and cost > 0.01
    assert (two - one).abs().mean() < 0.6 * cost, ((two - one).abs().mean(), cost)


def test_ranks_are_held_against_the_model(tmp_path: Path) -> None:
    """An activation that the twin has not seen: both ranks leave it to the model's code."""
    path = with_code(small.folder(tmp_path / "own", num_hidden_layers=4), SWITCHED)
    found = []
    for more in ({"size": 1, "fusion": "off"}, {"size": 1}, {"size": 2}):
        of = engine(path, **more, trust_remote_code=True)
        if "fusion" not in more:
            assert {d.kind for d in of.loaded.model.fewbit_fused.decisions if d.refused} == {"glu"}
        found.append(texts(of, 12, 90))
        of.shutdown()
    same(found[0], found[1])
    same(found[0], found[2])


@pytest.mark.parametrize("name", ["llama", "experts", "latents"])
def test_ranks_refuse_nothing(name: str, folder: Path, tmp_path: Path) -> None:
    kind, _ = MODELS[name]
    path = folder if kind == "llama" else saved.save(saved.model(kind), tmp_path / "model")
    for dtype in ("float32", "bfloat16"):
        of = engine(path, 2, dtype=dtype, fusion="strict", enforce_eager=True)
        of.shutdown()


def test_a_dead_rank_ends_the_engine(folder: Path) -> None:
    of = engine(folder, 2, max_model_len=128)
    (pid,) = pids(of)
    of.add(Request("a", [3, 4, 5], SamplingParams(max_tokens=120, **GREEDY)))
    of.step()
    os.kill(pid, signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(FewbitError, match=rf"rank 1 of 2 \(process {pid}\) was killed by signal 9"):
        while True:
            of.step()
    assert time.monotonic() - begun < 10
    of.shutdown()
    assert gone(pid)
