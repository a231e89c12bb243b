"""The engine on a GPU: a CPU's tokens in float32, with graphs and without, a step ahead and a step at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit.engine.config import EngineConfig
from fewbit.engine.engine import Engine
from fewbit.engine.params import SamplingParams
from fewbit.engine.request import Request
from fewbit.models import hf, twin
from fewbit.modules import experts
from tests.engine.test_engine import AHEAD, GREEDY, drain, prompts, tokens
from tests.engine.test_kv_cache import logprobs
from tests.models import saved
from tests.tiny import llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
TYPES = ("llama", "qwen3", "gemma3_text", "mixtral", "qwen3_moe", "gpt_oss", "phi3", "qwen3_next", "deepseek_v3",
         "minicpm3")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("engine") / "model", num_attention_heads=4, num_key_value_heads=2, head_dim=32)


def started(folder: Path, device: str, **options: Any) -> Engine:
    return Engine(
        EngineConfig.of(model=str(folder), device=device, max_model_len=96, **{"max_num_seqs": 12, **options})
    )


def answers(engine: Engine, vocab: int = 250, **params: Any) -> list[list[int]]:
    texts = [[t % vocab for t in prompt] for prompt in prompts(24, shared=20)]
    asked = [Request(str(i), p, SamplingParams(max_tokens=6, ignore_eos=True, **params)) for i, p in enumerate(texts)]
    found = drain(engine, asked)
    assert engine.stats().pages_used == 0
    engine.shutdown()
    return [tokens(found[r.id]) for r in asked]


OPTIONS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "eager": {"enforce_eager": True},
    "chunks": {"max_num_batched_tokens": 16, "max_num_seqs": 6},
    "tiny cache": {"kv_cache_memory_bytes": 2 * 2 * 2 * 32 * 4 * 16 * 14, "max_num_seqs": 12},
    "int4": {"quantization": "int4-g128"},
}


@pytest.mark.parametrize("way", OPTIONS)
def test_same_tokens_as_a_cpu(folder: Path, way: str) -> None:
    engine = started(folder, "cuda", dtype="float32", **OPTIONS[way])
    assert engine.ahead and (engine.runner.graphs is None) == (way == "eager")
    want = answers(started(folder, "cpu", dtype="float32", **OPTIONS[way]), temperature=0.0)
    assert answers(engine, temperature=0.0) == want


@pytest.mark.parametrize("kind", AHEAD)
def test_a_step_ahead_is_a_step_at_a_time(folder: Path, kind: str) -> None:
    params = {name: value for name, value in AHEAD[kind].items() if name != "n"}
    found = []
    for ahead in (True, False):
        engine = started(folder, "cuda", dtype="float32")
        engine.ahead = ahead
        found.append(answers(engine, **params))
    assert found[0] == found[1]


@pytest.mark.parametrize("model_type", TYPES)
def test_types(model_type: str, tmp_path: Path) -> None:
    """Graphs where they are recorded; gpt_oss has sinks, gemma3 windows, qwen3_next runs alone."""
    path = saved.save(saved.model(model_type), tmp_path / "model")
    engine = started(path, "cuda", dtype="float32")
    paged = engine.loaded.paged
    assert (engine.runner.ahead and engine.runner.graphs is not None) == paged
    assert answers(engine, 90, **GREEDY_ONLY) == answers(started(path, "cpu", dtype="float32"), 90, **GREEDY_ONLY)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("quantization", ["int4-g32", "nvfp4-a16", "fp8-channel"])
def test_experts_that_are_quantized(quantization: str, model_type: str, tmp_path: Path) -> None:
    """Their gates are kernels, and the tokens those of transformers' own layers."""
    path = saved.save(saved.model(model_type), tmp_path / "model")
    options = {"dtype": "float32", "quantization": quantization, "activations": "off"}
    plain, fused = (started(path, "cuda", fusion=way, **options) for way in ("off", "strict"))
    assert any(hasattr(module, experts.GATE) for module in fused.loaded.model.modules())
    assert answers(fused, 90, **GREEDY_ONLY) == answers(plain, 90, **GREEDY_ONLY)


GREEDY_ONLY = {"temperature": GREEDY["temperature"]}


LATENT = {
    "vocab_size": 256, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "q_lora_rank": 256,
    "first_k_dense_replace": 2, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
}  # fmt: skip


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("quantization", [None, "fp8-block", "int4-g128"])
def test_latents_of_real_sizes(quantization: str | None, heads: int, tmp_path: Path) -> None:
    """576 numbers a token and layer; no farther from float32 than expanded keys and values, but for chance."""
    shape = {**LATENT, "num_attention_heads": heads, "num_key_value_heads": heads}
    torch.manual_seed(0)
    made = hf.random_model(hf.read_config({"model_type": "deepseek_v3", **shape}))
    twin.randomize(made)
    path, found = saved.save(made, tmp_path / "model"), []
    prompt = [int(t) for t in torch.randint(3, 250, (80,), generator=torch.Generator().manual_seed(0))]
    for device, dtype, way in (("cpu", "float32", "off"), ("cuda", "bfloat16", "off"), ("cuda", "bfloat16", "auto")):
        engine = started(path, device, dtype=dtype, fusion=way, quantization=quantization, max_num_batched_tokens=33)
        if device == "cuda":
            assert engine.runner.graphs is not None
            assert engine.limits.token == 2 * 2 * (heads * 320 if way == "off" else 576)
        found.append(logprobs(engine, prompt))
        engine.shutdown()
    expanded, through = (float((other - found[0]).square().mean().sqrt()) for other in found[1:])
    print(f"\n{quantization}, {heads} heads: expanded {expanded:.4f}, through the latent {through:.4f}")
    assert through < 1.5 * expanded + 1e-3


CACHES: dict[str, dict[str, Any]] = {
    "auto": {},
    "fp8": {"kv_cache_dtype": "fp8", "kv_scale": 0.05},
    "int8": {"kv_cache_dtype": "int8"},
    "nvfp4": {"kv_cache_dtype": "nvfp4", "kv_rotate": True},  # emulated, within graphs
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("quantization", [None, "fp8", "int4-g128", "nvfp4-a16", "q4_k"])
def test_bfloat16_answers(cache: str, quantization: str | None, tmp_path: Path) -> None:
    """First tokens are mostly those of float32 and the same cache on a CPU; a random model has near ties."""
    path = llama(tmp_path / "m", hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2)
    want = answers(started(path, "cpu", dtype="float32", quantization=quantization, **CACHES[cache]),
                   temperature=0.0)  # fmt: skip
    engine = started(path, "cuda", dtype="bfloat16", quantization=quantization, **CACHES[cache])
    assert engine.runner.graphs is not None
    assert engine.facts()["kv_held"] == {"auto": "values", "nvfp4": "emulated"}.get(cache, "codes")
    found = answers(engine, temperature=0.0)
    alike = sum(a[0] == b[0] for a, b in zip(found, want, strict=True))
    print(f"\n{quantization} with a cache in {cache}: {alike} of {len(want)} first tokens alike")
    assert alike >= (len(want) * 2) // 3


@pytest.mark.parametrize("cache", ["fp8_e4m3", "fp8_e5m2", "fp8_per_token_head", "int8", "nvfp4", "mxfp4", "int4"])
def test_caches_hold_what_a_cpu_holds(folder: Path, cache: str) -> None:
    """In float32: log-probabilities of prompts, whose keys and values are rounded alike but for ties."""
    options = {"dtype": "float32", "kv_cache_dtype": cache} | ({"kv_scale": 0.02} if cache == "fp8_e4m3" else {})
    found = []
    for device in ("cuda", "cpu"):
        engine = started(folder, device, **options)
        asked = [Request(str(i), p, SamplingParams(max_tokens=4, ignore_eos=True, prompt_logprobs=0, temperature=0.0))
                 for i, p in enumerate(prompts(12, shared=20))]  # fmt: skip
        told = drain(engine, asked)
        held = {r.id: next(d.prompt_logprobs for d in told[r.id] if d.prompt_logprobs) for r in asked}
        found.append(torch.tensor([row[t].logprob for r in asked
                                   for row, t in zip(held[r.id][1:], r.prompt[1:], strict=True)]))  # fmt: skip
        engine.shutdown()
    assert float((found[0] - found[1]).abs().mean()) < 0.002


def test_memory_comes_back(folder: Path) -> None:
    """This process's own, whatever runs beside it."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    answers(started(folder, "cuda", dtype="bfloat16", gpu_memory_utilization=0.5), temperature=0.0)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < 128 << 20
