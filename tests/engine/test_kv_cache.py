"""Formats of the KV cache in an engine: what load rounds to is what a cache gives back, whoever runs beside it."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbit
from fewbit.engine.config import EngineConfig
from fewbit.engine.engine import Engine
from fewbit.engine.params import SamplingParams
from fewbit.engine.request import Request
from fewbit.errors import CheckpointError, RequestError
from fewbit.models import kv, kv_file
from fewbit.models.kv_file import KvScales, shapes_of
from fewbit.quant.kv import KV_FORMATS, MEASURED
from tests.engine.test_engine import GREEDY, drain, prompts, tokens
from tests.tiny import edit, edit_config, llama

LAYER = "model.layers.{}.self_attn"
GIVEN = {"kv_scale": 1.0}
# how a cache is asked for -> what is asked of it
ASKED: dict[str, dict[str, Any]] = {
    name: {"kv_cache_dtype": name} | ({} if spec.dynamic or "e5m2" in name else GIVEN)
    for name, spec in KV_FORMATS.items()
}
ASKED |= {f"{name}, turned": {"kv_cache_dtype": name, "kv_rotate": True} for name in ("int8", "int4", "nvfp4")}
ASKED |= {name: {"kv_cache_dtype": name} for name in ("float32",)}
# bits of a number, and of each row of 32 of them besides
BITS = {"fp8": 8, "fp8_per_token_head": 8 + 1, "int8": 8 + 1, "mxfp8": 8.25, "int4": 4.5, "mxfp4": 4.25,
        "nvfp4": 4 + 0.5 + 1, "fp8_inc": 8, "fp8_e5m2": 8, "float32": 32}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "model"
    return llama(path, num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256)


def started(folder: Path, **options: Any) -> Engine:
    return Engine(EngineConfig.of(model=str(folder), dtype="float32", **options))


def answers(engine: Engine, count: int = 20) -> list[list[int]]:
    asked = [Request(str(i), p, SamplingParams(max_tokens=3 + i % 8, **GREEDY))
             for i, p in enumerate(prompts(count, shared=37, seed=3))]  # fmt: skip
    found = drain(engine, asked)
    assert engine.stats().pages_used == 0
    return [tokens(found[r.id]) for r in asked]


def asked_of(options: dict[str, Any]) -> kv.Asked:
    named = {"kv_cache_dtype": "format", "kv_scales": "scales", "kv_scale": "scale", "kv_rotate": "turn"}
    return kv.Asked(**{named[name]: value for name, value in options.items()})


def logprobs(engine: Engine, prompt: list[int]) -> Tensor:
    """[T - 1]: of each token of a prompt behind those before it, in chunks of 16 and one token alone."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, **GREEDY)
    (delta,) = drain(engine, [Request("r", prompt, params)])["r"]
    assert delta.prompt_logprobs is not None
    return torch.tensor([held[t].logprob for held, t in zip(delta.prompt_logprobs[1:], prompt[1:], strict=True)])


def rounded(folder: Path, options: dict[str, Any], prompt: list[int]) -> Tensor:
    """The same by load, whose attention rounds keys and values by the spec and keeps no pages."""
    model = fewbit.load(folder, dtype="float32", cached=asked_of(options))
    with torch.no_grad():
        found = model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
    return found[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]


@pytest.mark.parametrize("name", ASKED)
def test_a_cache_gives_back_what_load_rounds_to(folder: Path, name: str) -> None:
    """Also by single queries, which on a CPU go to a kernel of their own; and the bytes are those of the format."""
    engine = started(folder, **ASKED[name], max_num_batched_tokens=17, max_num_seqs=2)
    prompt = random.Random(0).choices(range(3, 250), k=66)
    torch.testing.assert_close(logprobs(engine, prompt), rounded(folder, ASKED[name], prompt), rtol=1e-4, atol=1e-4)
    plain = name.removesuffix(", turned")
    if plain in BITS:
        assert engine.limits.token == 2 * 2 * 2 * 32 * BITS[plain] / 8
    facts = engine.facts()
    spec = KV_FORMATS.get(plain)
    held = "values" if spec is None else "codes" if plain.startswith(("fp8", "int8")) else "packed"
    assert facts["kv_held"] == held and facts["kv"].endswith("turned") == (plain != name)
    assert facts["kv_scales"] == (
        "none" if spec is None else "at each call" if spec.dynamic else "1.0, as e5m2 needs no other"
        if "e5m2" in name else "1.0, given")  # fmt: skip


@pytest.mark.parametrize("name", ["fp8", "nvfp4, turned"])
def test_emulated_is_the_same(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that has no kernel for the codes: values are rounded, and held as they are."""
    prompt = random.Random(4).choices(range(3, 250), k=50)
    want = logprobs(started(folder, **ASKED[name]), prompt)
    for home in ("kernels.cache_packed", "engine.facts"):
        monkeypatch.setattr(f"fewbit.{home}.held_as", lambda *_: "emulated")
    engine = started(folder, **ASKED[name])
    assert engine.facts()["kv_held"] == "emulated" and engine.limits.token == 2 * 2 * 2 * 32 * 4
    torch.testing.assert_close(logprobs(engine, prompt), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["fp8", "fp8_per_token_head", "int8", "nvfp4", "nvfp4, turned"])
def test_the_same_texts_in_any_company(folder: Path, name: str) -> None:
    """Chunks, pages that run out, prefixes found and not looked for."""
    want = answers(started(folder, **ASKED[name], enable_prefix_caching=False))
    engine = started(folder, **ASKED[name], max_num_batched_tokens=7, max_num_seqs=5)
    assert answers(engine) == want
    assert engine.stats().prefix_hits > 0
    small = started(folder, **ASKED[name], max_model_len=120, kv_cache_memory_bytes=engine.limits.token * 160)
    assert answers(small) == want
    assert small.stats().preemptions > 0 and small.limits.pages == 10


def test_scales_are_asked_for(folder: Path) -> None:
    for name in ("fp8", "fp8_e4m3", "fp8_inc"):
        with pytest.raises(RequestError, match=r"--kv-scale 1.0.*fewbit calibrate .* --kv fp8.*--kv-scales"):
            started(folder, kv_cache_dtype=name)


# --- scales of the checkpoint

SPELLINGS = [("k_scale", "v_scale"), ("kv_scale",), ("k_proj.k_scale", "v_proj.v_scale"),
             ("k_proj.output_scale", "v_proj.output_scale"), ("k_cache.scale", "v_cache.scale"),
             ("qkv_proj.k_scale", "qkv_proj.v_scale")]  # fmt: skip


def with_scales(out: Path, scales: dict[str, Tensor]) -> Path:
    path = llama(out, num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256)
    return edit(path, lambda held: held.update(scales))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_scale(spelling: tuple[str, ...], tmp_path: Path) -> None:
    scale = torch.tensor(0.01)
    names = [f"{LAYER.format(i)}.{leaf}" for i in range(2) for leaf in spelling]
    engine = started(with_scales(tmp_path, {name: scale.clone() for name in names}), kv_cache_dtype="fp8")
    assert engine.facts()["kv_scales"] == "checkpoint"
    caches = run_once(engine)
    for cache in caches:
        assert cache.key_measured.tolist() == cache.value_measured.tolist() == [float(scale)] * 2


def run_once(engine: Engine) -> list[Any]:
    """The caches of its layers."""
    drain(engine, [Request("r", [5, 6, 7], SamplingParams(max_tokens=1, **GREEDY))])
    return list(engine.runner.caches.values())


@pytest.mark.parametrize(("name", "reach"), [("fp8_e4m3", 448), ("fp8_e5m2", 57344), ("fp8_inc", 240)])
def test_scales_of_e4m3_reach_as_far_in_other_codes(name: str, reach: float, tmp_path: Path) -> None:
    scales = {f"{LAYER.format(i)}.{of}_scale": torch.tensor([[0.01], [0.02]]).bfloat16().view(2, 1, 1)
              for i in range(2) for of in "kv"}  # fmt: skip
    engine = started(with_scales(tmp_path, scales), kv_cache_dtype=name)
    assert engine.facts()["kv"].endswith("f32[row]")
    for cache in run_once(engine):
        want = torch.tensor([0.01, 0.02]).bfloat16().float() * 448
        torch.testing.assert_close(cache.key_measured * reach, want)


def declared(tmp_path: Path, kv_scale: float = 0.01) -> Path:
    args = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    base = llama(tmp_path / "base", num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    fewbit.convert(base, tmp_path / "x", "compressed-tensors", requantize="fp8-channel-a16")
    names = [f"{LAYER.format(i)}.{of}_scale" for i in range(2) for of in "kv"]
    edit(tmp_path / "x", lambda held: held.update({name: torch.tensor([kv_scale]) for name in names}))
    return edit_config(tmp_path / "x", lambda c: c["quantization_config"].update(kv_cache_scheme=args))


def test_what_a_checkpoint_declares(tmp_path: Path) -> None:
    """auto holds its codes; a type of floats keeps values as they are; a number stands for its scales."""
    path, prompt = declared(tmp_path), random.Random(1).choices(range(3, 250), k=50)
    engine = started(path)
    assert engine.limits.token == 2 * 2 * 2 * 32 and engine.facts()["kv_scales"] == "checkpoint"
    got, want = logprobs(engine, prompt), rounded(path, {}, prompt)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    plain = logprobs(started(path, kv_cache_dtype="float32"), prompt)
    assert float((plain - got).abs().max()) > 1e-3
    torch.testing.assert_close(plain, rounded(path, {"kv_cache_dtype": "float32"}, prompt), rtol=1e-4, atol=1e-4)
    one = started(path, **GIVEN)
    assert one.facts()["kv_scales"] == "1.0, given" and one.limits.token == 2 * 2 * 2 * 32


@pytest.mark.parametrize("bad", [0.0, float("nan"), None])
def test_bad_scales_are_errors_unless_a_number_stands_for_them(bad: float | None, tmp_path: Path) -> None:
    path = declared(tmp_path)
    name = f"{LAYER.format(1)}.v_scale"
    edit(path, lambda held: held.pop(name) if bad is None else held.update({name: torch.tensor([bad])}))
    for options in ({}, {"kv_cache_dtype": "fp8"}):
        with pytest.raises(CheckpointError, match="kv-scale"):
            started(path, **options)
        assert started(path, **options, **GIVEN).facts()["kv_scales"] == "1.0, given"
    measured = side(path, tmp_path / "s.safetensors", read=tmp_path / "base")
    assert started(path, kv_scales=measured).facts()["kv_scales"] == f"file {measured}"


def test_a_layer_without_scales(tmp_path: Path) -> None:
    """Nothing declares them, so that nobody has looked before."""
    path = with_scales(tmp_path, {f"{LAYER.format(0)}.kv_scale": torch.tensor(0.01)})
    with pytest.raises(CheckpointError, match=r"no KV scales \(checkpoint\) for model.layers.1.self_attn"):
        started(path, kv_cache_dtype="fp8")


# --- scales of a file


def side(folder: Path, out: Path, format: str = "fp8", heads: int = 1, **changes: Any) -> Path:
    shapes = shapes_of(fewbit.load(changes.pop("read", folder)).config) | changes.pop("shapes", {})
    draw = torch.Generator().manual_seed(0)
    scales = {LAYER.format(i): {of: 0.01 + 0.01 * torch.rand(heads, generator=draw) for of in "kv"} for i in range(2)}
    changes.pop("change", lambda _: None)(scales)
    kv_file.write(out, KvScales(format, heads > 1, shapes, scales))
    return out


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("name", MEASURED)
def test_a_file_of_scales(folder: Path, tmp_path: Path, name: str, heads: int) -> None:
    options = {"kv_cache_dtype": name, "kv_scales": str(side(folder, tmp_path / "s.safetensors", name, heads))}
    engine, prompt = started(folder, **options), random.Random(2).choices(range(3, 250), k=40)
    assert engine.facts()["kv_scales"] == f"file {tmp_path}/s.safetensors" and engine.facts()["kv_held"] == "codes"
    assert engine.limits.token == 2 * 2 * 2 * 32
    got = logprobs(engine, prompt)
    torch.testing.assert_close(got, rounded(folder, options, prompt), rtol=1e-4, atol=1e-4)
    alone = started(folder, kv_scales=options["kv_scales"])  # the file says the format
    torch.testing.assert_close(logprobs(alone, prompt), got)


LIES: list[tuple[dict[str, Any], str]] = [
    ({"shapes": {"head_dim": 64}}, "of another model: head_dim: measured on 64, here 32"),
    ({"change": lambda s: s.pop(LAYER.format(1))}, "no KV scales .* for model.layers.1.self_attn"),
    ({"change": lambda s: s.update({LAYER.format(7): s[LAYER.format(1)]})}, "no attention of the model has that name"),
    ({"change": lambda s: s[LAYER.format(1)].pop("v")}, "model.layers.1.self_attn: no .v_scale"),
    ({"change": lambda s: s[LAYER.format(1)]["v"].fill_(0)}, "must be finite and above 0"),
    ({"change": lambda s: s[LAYER.format(1)]["v"].fill_(torch.nan)}, "must be finite and above 0"),
    ({"change": lambda s: s[LAYER.format(0)].update(k=torch.ones(3))}, r"want F32 \[1\], found F32 \[3\]"),
    ({"change": lambda s: s[LAYER.format(0)].update(k=torch.ones(2)), "heads": 2, "format": "nvfp4"}, "known: fp8"),
]


@pytest.mark.parametrize(("lie", "words"), LIES)
def test_files_that_do_not_fit(folder: Path, tmp_path: Path, lie: dict[str, Any], words: str) -> None:
    path = side(folder, tmp_path / "s.safetensors", **lie)
    with pytest.raises(CheckpointError, match=words):
        started(folder, kv_scales=str(path))


def test_other_files_are_no_scales(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is no file of KV scales"):
        started(folder, kv_scales=str(folder / "model.safetensors"))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"kv_scales": "x", "kv_scale": 1.0}, "not both"),
    ({"kv_scale": 0.0, "kv_cache_dtype": "fp8"}, "want a number above 0"),
    ({"kv_scale": float("nan"), "kv_cache_dtype": "fp8"}, "want a number above 0"),
    ({"kv_scale": 1.0}, "declares no format"),
    ({"kv_rotate": True}, "declares no format"),
    ({"kv_scale": 1.0, "kv_cache_dtype": "bfloat16"}, "rounds nothing"),
    ({"kv_scale": 1.0, "kv_cache_dtype": "nvfp4"}, "chooses its scales"),
    ({"kv_rotate": True, "kv_cache_dtype": "fp8", "kv_scale": 1.0}, "turned before they are rounded"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_makes_no_sense(folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(fewbit.errors.FewbitError, match=words):
        started(folder, **options)


def test_a_file_is_of_no_use_to_scales_of_each_block(folder: Path, tmp_path: Path) -> None:
    path = str(side(folder, tmp_path / "s.safetensors"))
    for name in ("nvfp4", "fp8_per_token_head"):
        with pytest.raises(RequestError, match="chooses its scales"):
            started(folder, kv_cache_dtype=name, kv_scales=path)
