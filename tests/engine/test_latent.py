"""Attention through a latent, in an engine: transformers' logits, whatever runs beside a text, and a small cache."""

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbit.engine.engine import Engine
from fewbit.kernels.cache import Cache
from fewbit.kernels.registry import EMULATED
from fewbit.modules import paged
from fewbit.modules.paged import Span, Step
from tests.engine.test_fused import answers, started
from tests.engine.test_kv_cache import logprobs
from tests.models import saved

GROUPS = {"num_experts_per_tok": 6, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy"}
MODELS: dict[str, dict[str, Any]] = {"deepseek_v3": {}, "deepseek_v2": GROUPS, "minicpm3": {}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("latent")
    return {name: saved.save(saved.model(name, **more), home / name) for name, more in MODELS.items()}


def sizes(engine: Engine) -> tuple[int, int, int]:
    """Layers, numbers of a latent key, numbers of all heads' keys and values."""
    c = engine.loaded.model.config
    heads = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    return c.num_hidden_layers, c.kv_lora_rank + c.qk_rope_head_dim, heads


def text(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(10, 90), k=count)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, folders: dict[str, Path]) -> None:
    """A prompt in chunks of 16 and one token alone; single tokens behind it."""
    engine = started(folders[name], dtype="float32", fusion="strict", max_num_batched_tokens=17, max_num_seqs=2)
    layers, latent, heads = sizes(engine)
    assert engine.limits.token == layers * latent * 4 < layers * heads * 4
    prompt = text(66)
    theirs = saved.model(name, **MODELS[name]).eval()
    with torch.no_grad():
        want = theirs(torch.tensor([prompt])).logits[0].log_softmax(-1)
    close(logprobs(engine, prompt), want[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0])
    caches = list(engine.runner.caches.values())  # type: ignore[attr-defined]
    assert len(caches) == layers and all(isinstance(c, Cache) and c.shared for c in caches)
    engine.shutdown()


@pytest.mark.parametrize("name", MODELS)
def test_the_same_texts_in_any_company(name: str, folders: dict[str, Path]) -> None:
    """Chunks, prefixes found and not looked for, pages that run out, steps recorded; expanded keys and values."""
    options = {"dtype": "float32", "fusion": "strict"}
    engine = started(folders[name], **options, enable_prefix_caching=False)
    want = answers(engine)
    token = engine.limits.token
    engine.shutdown()
    small = {"kv_cache_memory_bytes": token * 112, "max_num_seqs": 6}
    for more in ({"max_num_batched_tokens": 7, "max_num_seqs": 3}, small, {"fusion": "off"}):
        engine = started(folders[name], **{**options, **more})
        assert answers(engine) == want
        assert more is small or engine.stats().prefix_hits > 0
        engine.shutdown()


@pytest.mark.parametrize("options", [{"kv_cache_dtype": "fp8_e5m2"}, {"kv_cache_dtype": "int8", "kv_rotate": True},
                                     {"kv_cache_dtype": "nvfp4"}, {"kv_attn_math": "fp8"}],
                         ids=lambda o: " ".join(map(str, o.values())))  # fmt: skip
def test_what_is_rounded_is_expanded(options: dict[str, Any], folders: dict[str, Path]) -> None:
    """A format of the cache is of keys and values of heads, fused or not."""
    more = options if "kv_attn_math" not in options else {**options, "kv_cache_dtype": "fp8"}
    plain, fused = (started(folders["deepseek_v3"], dtype="float32", fusion=way, **more) for way in ("off", "strict"))
    assert fused.loaded.model.fewbit_fused.count("latent") and plain.limits.token == fused.limits.token
    close(logprobs(fused, text(40)), logprobs(plain, text(40)))
    assert not any(getattr(c, "shared", False) for c in fused.runner.caches.values())  # type: ignore[attr-defined]
    for engine in (plain, fused):
        engine.shutdown()


def test_a_cache_of_another_float(folders: dict[str, Path]) -> None:
    engine = started(folders["deepseek_v3"], dtype="float32", kv_cache_dtype="bfloat16")
    layers, latent, _ = sizes(engine)
    assert engine.limits.token == layers * latent * 2
    engine.shutdown()


@pytest.mark.parametrize("options", [{"quantization": "int4-g32"}, {"quantization": "fp8-channel"},
                                     {"quantization": "nvfp4-a16"}],
                         ids=lambda o: o["quantization"])  # fmt: skip
def test_a_quantized_expansion(options: dict[str, Any], folders: dict[str, Path]) -> None:
    """It is held as floats alone."""
    options = {**options, "dtype": "float32"}
    plain, fused = (started(folders["deepseek_v3"], fusion=way, **options) for way in ("off", "auto"))
    layers, latent, _ = sizes(fused)
    assert fused.limits.token == layers * latent * 4
    for module in (m.kv_b_proj for m in fused.loaded.model.modules() if hasattr(m, "kv_b_proj")):
        (part,) = module.parts
        assert part.kernel.name == EMULATED and part.quantized.weight.device.type == "meta"
        assert part.packed.weight.shape == (module.out_features, module.in_features)
    close(logprobs(fused, text(40)), logprobs(plain, text(40)))
    for engine in (plain, fused):
        engine.shutdown()


@pytest.mark.parametrize("format", ["int8-channel-a8", "fp8-channel", "mxfp8", "nvfp4"])
def test_an_input_that_is_rounded(format: str, folders: dict[str, Path]) -> None:
    """As its format says, and that is what the cache holds: the sums are those of expanded keys and values."""
    engine = started(folders["deepseek_v3"], dtype="float32", quantization=format, activations="declared")
    model = engine.loaded.model
    attention, hidden = model.model.layers[0].self_attn, torch.randn(1, 9, model.config.hidden_size)
    attention.o_proj = nn.Identity()
    assert attention.kv_b_proj.parts[0].quantized.format.act is not None
    given = {"hidden_states": hidden, "position_embeddings": model.model.rotary_emb(hidden, torch.arange(9)[None])}
    found, seen = [], []
    for _ in range(2):
        step = Step(torch.arange(9), lambda: [Span(0, 9, 9, torch.arange(9))], {}, 9)
        with paged.stepping(step), torch.no_grad():
            found.append(attention(**given, attention_mask=None)[0])
        attention.kv_b_proj.register_forward_hook(lambda *args: seen.append(args))
        assert step.caches[0].shared == (len(found) == 1)  # type: ignore[union-attr]
    assert len(seen) == 1
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    engine.shutdown()


def test_bfloat16_is_as_near(folders: dict[str, Path]) -> None:
    """Through the latent no farther from float32 than expanded, but for chance."""
    prompt, found = text(66, 1), []
    for dtype, way in (("float32", "off"), ("bfloat16", "off"), ("bfloat16", "strict")):
        engine = started(folders["minicpm3"], dtype=dtype, fusion=way)
        found.append(logprobs(engine, prompt))
        engine.shutdown()
    expanded, through = (float((other - found[0]).square().mean().sqrt()) for other in found[1:])
    assert through < 1.5 * expanded


def test_a_kernel_by_name_keeps_codes(folders: dict[str, Path]) -> None:
    """What a linear runs on is then no choice of ours, and codes are not multiplied by queries."""
    engine = started(folders["deepseek_v3"], dtype="float32", quantization="int4-g32", kernels="reference")
    layers, _, heads = sizes(engine)
    assert engine.limits.token == layers * heads * 4
    engine.shutdown()


def test_where_somebody_looks_on_it_is_expanded(folders: dict[str, Path]) -> None:
    """A layer's cache goes on as it began."""
    engine = started(folders["minicpm3"], dtype="float32")
    seen: list[tuple[Any, ...]] = []
    (module, *_) = (m for m in engine.loaded.model.modules() if hasattr(m, "kv_b_proj"))
    hook = module.kv_b_proj.register_forward_hook(lambda *args: seen.append(args))
    want = logprobs(started(folders["minicpm3"], dtype="float32"), text(30))
    runner: Any = engine.loaded.own_runner(engine.limits)
    engine.runner = runner
    close(logprobs(engine, text(30)), want)
    assert seen and [c.shared for c in runner.caches.values()] == [False] + [True] * (len(runner.caches) - 1)
    hook.remove()
    seen.clear()
    close(logprobs(engine, text(30, 2)), logprobs(started(folders["minicpm3"], dtype="float32"), text(30, 2)))
    assert not runner.caches[0].shared


def test_other_values_than_those_of_its_keys_are_refused() -> None:
    from fewbit.errors import UnsupportedError

    key = torch.randn(1, 3, 1, 12).transpose(1, 2)
    module = nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    step = Step(torch.arange(3), list, {0: Cache.like(4, key, key[..., :8])}, 4)
    with paged.stepping(step), pytest.raises(UnsupportedError, match="first numbers of its keys"):
        paged.forward(module, key, key, torch.randn(1, 1, 3, 8), None)


def test_a_wrong_product_is_found(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the model's sizes alone, by a few tokens through the loaded model: transformers' code comes back, expanded."""
    from fewbit.engine import fusion
    from fewbit.modules import latent

    real, path = latent.absorb, folders["minicpm3"]
    want = answers(started(path, dtype="float32", fusion="off"))
    plan = fusion.fuse.plan(started(path, dtype="float32").loaded.model.config)
    assert [r for r in plan.rewrites if r.kind == "latent"]

    def wrong(*args: Any) -> Any:
        queries, key = real(*args)
        return queries * 1.5, key

    monkeypatch.setattr(latent, "absorb", wrong)
    with caplog.at_level(logging.INFO, "fewbit.engine"):
        engine = started(path, dtype="float32")
    fused = engine.loaded.model.fewbit_fused
    assert {d.kind for d in fused.decisions if d.refused} == {"latent"} and answers(engine) == want
    assert any("not fused: " in m and "latent" in m for m in caplog.messages)
