"""AutoFP8's objects: what they print, write and compute."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import fewbit
from fewbit.compat.autofp8 import AutoFP8ForCausalLM, BaseQuantizeConfig
from fewbit.errors import RequestError, UnsupportedError
from fewbit.models import hf
from tests.compat import small
from tests.models import saved

FIXTURE = Path(__file__).parents[1] / "data" / "fp8-autofp8-static-kvscale-llama"
KV = ("k_proj", "v_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.folder(tmp_path_factory.mktemp("compat") / "base")


def made(path: Path, scheme: str, *targets: str, **options: Any) -> AutoFP8ForCausalLM:
    config = BaseQuantizeConfig("fp8", scheme, kv_cache_quant_targets=targets or None, **options)
    model = AutoFP8ForCausalLM.from_pretrained(path, config)
    model.model.config._attn_implementation = hf.OURS
    model.quantize(small.ids() if scheme == "static" else [])
    return model


@pytest.mark.parametrize(("scheme", "targets"), [("dynamic", ()), ("static", ()), ("static", KV)])
def test_what_is_written(scheme: str, targets: tuple[str, ...], base: Path, tmp_path: Path) -> None:
    model = made(base, scheme, *targets)
    model.save_quantized(tmp_path / "out")
    assert fewbit.verify(tmp_path / "out") == []  # its tokenizer came along
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    endings = ["weight", "weight_scale", *(["input_scale"] if scheme == "static" else [])]
    found = {name.rpartition(".")[2]: t for name, t in tensors.items() if ".mlp.down_proj." in name}
    assert sorted(found) == sorted(endings)
    assert found["weight"].dtype == torch.float8_e4m3fn
    assert all(t.dtype == torch.float32 and t.numel() == 1 for name, t in found.items() if name != "weight")
    assert ("model.layers.0.self_attn.k_scale" in tensors) == ("model.layers.1.self_attn.v_scale" in tensors)
    assert ("model.layers.0.self_attn.k_scale" in tensors) == bool(targets)
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    cache = {"kv_cache_scheme": "static"} if targets else {}
    assert config == {"quant_method": "fp8", "activation_scheme": scheme, "ignored_layers": ["lm_head"], **cache}
    loaded = fewbit.load(tmp_path / "out", kernels="reference")  # others round weights elsewhere
    assert torch.equal(small.logits(loaded), small.logits(model))
    assert not torch.equal(small.logits(loaded), small.logits(small.model(base, dtype=torch.bfloat16)))


def test_what_is_printed(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for scheme, kind in (("dynamic", "FP8DynamicLinear"), ("static", "FP8StaticLinear")):
        model = made(base, scheme)
        capsys.readouterr()
        model.save_quantized(tmp_path / scheme)
        out = capsys.readouterr().out
        assert out.startswith("LlamaForCausalLM(\n  (model): LlamaModel(\n")
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert f"          ({leaf}): {kind}()\n" in out
        assert f"(mlp): LlamaMLP(\n          (gate_proj): {kind}()\n          (up_proj): {kind}()\n" in out
        assert "(0-1): 2 x LlamaDecoderLayer(" in out
        assert "  (lm_head): Linear(in_features=128, out_features=288, bias=False)\n)\n" in out
        assert out.endswith(f"Saving the model to {tmp_path / scheme}\n")


def test_weights_by_torch_casts(base: Path, tmp_path: Path) -> None:
    made(base, "dynamic").save_quantized(tmp_path)
    tensors, plain = load_file(tmp_path / "model.safetensors"), load_file(base / "model.safetensors")
    for name, weight in plain.items():
        if "_proj" not in name:
            assert torch.equal(tensors[name], weight)
            continue
        scale = weight.float().abs().max() / 448
        assert torch.equal(tensors[name + "_scale"], scale)
        codes = (weight.float() / scale).to(torch.float8_e4m3fn)
        assert torch.equal(tensors[name].view(torch.uint8), codes.view(torch.uint8))


def test_scales_by_hand(tmp_path: Path) -> None:
    """One layer, so that only q, k, v see inputs that nothing rounded before: rows one by one, the largest stays."""
    base = small.folder(tmp_path / "base", num_hidden_layers=1)
    model = made(base, "static", *KV)
    plain = small.model(base, dtype=torch.bfloat16)
    embedded = plain.model.layers[0].input_layernorm(plain.model.embed_tokens(small.ids())).detach()
    scale = embedded.float().abs().max() / 448
    attention: Any = model.model.model.layers[0].self_attn
    assert torch.equal(attention.q_proj.input_quantizer.planes["scale0"], scale.view(1, 1))
    tops = []
    for row in embedded:  # scales only grow, so the first rows are rounded by what was known then
        known = max([row.float().abs().max(), *(r.float().abs().max() for r in embedded[: len(tops)])]) / 448
        rounded = ((row.float() / known).to(torch.float8_e4m3fn).float() * known).bfloat16()
        w = plain.model.layers[0].self_attn.k_proj.weight.detach().float()
        by = w.abs().max() / 448
        weight = ((w / by).to(torch.float8_e4m3fn).float() * by).bfloat16()
        tops.append(torch.nn.functional.linear(rounded, weight).abs().max().float())
    assert torch.equal(attention.k_bmm_quantizer.planes["scale0"], (max(tops) / 448).view(1, 1))


def test_examples_in_every_form(base: Path) -> None:
    ids, scales = small.ids(), set()
    batch = small.tokenizer()(small.TEXTS, padding=True, truncation=True, max_length=32, return_tensors="pt")
    for examples in (ids, ids.tolist(), {"input_ids": ids}, batch, list(ids)):
        model = AutoFP8ForCausalLM.from_pretrained(base, BaseQuantizeConfig())
        model.quantize(examples)
        scales.add(float(model.model.model.layers[1].mlp.down_proj.input_quantizer.planes["scale0"]))
    assert len(scales) == 1
    model = AutoFP8ForCausalLM.from_pretrained(base, BaseQuantizeConfig())
    for wrong, text in (([], "needs examples"), (small.TEXTS, "are texts"), (ids.float(), "want token ids")):
        with pytest.raises(RequestError, match=text):
            model.quantize(wrong)
    with pytest.raises(RequestError, match="not quantized yet"):
        model.save_quantized("nowhere")
    model.quantize(ids)
    with pytest.raises(RequestError, match="quantized already"):
        model.quantize(ids)


def test_patterns(base: Path, tmp_path: Path) -> None:
    model = made(base, "dynamic", ignore_patterns=["re:.*lm_head", "re:.*down_proj", "model.layers.0.self_attn.q_proj"])
    model.save_quantized(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    left = {"lm_head", "model.layers.0.self_attn.q_proj", *(f"model.layers.{i}.mlp.down_proj" for i in (0, 1))}
    assert set(config["ignored_layers"]) == left
    assert fewbit.verify(tmp_path / "a") == []
    with pytest.raises(RequestError, match="dwn_proj' matches no module"):
        made(base, "dynamic", ignore_patterns=["re:.*dwn_proj"])
    with pytest.raises(RequestError, match="nothing is left"):
        made(base, "dynamic", ignore_patterns=["re:.*"])
    made(base, "dynamic", ignore_patterns=[]).save_quantized(tmp_path / "b")
    with safe_open(tmp_path / "b" / "model.safetensors", "pt") as file:
        assert file.get_tensor("lm_head.weight").dtype == torch.float8_e4m3fn
    assert fewbit.verify(tmp_path / "b") == []


@pytest.mark.parametrize("wrong", [
    {"quant_method": "int8"}, {"activation_scheme": "token"}, {"kv_cache_quant_targets": ("k_proj",)},
    {"kv_cache_quant_targets": KV, "activation_scheme": "dynamic"},
])  # fmt: skip
def test_configs_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        BaseQuantizeConfig(**wrong)


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_experts(scheme: str, tmp_path: Path) -> None:
    saved.save(saved.model("mixtral"), tmp_path / "base")
    model = AutoFP8ForCausalLM.from_pretrained(tmp_path / "base", BaseQuantizeConfig(activation_scheme=scheme))
    model.model.config._attn_implementation = hf.OURS
    model.quantize(torch.randint(10, 90, (4, 40), generator=torch.Generator().manual_seed(0)))
    model.save_quantized(tmp_path / "out")
    small.sound(tmp_path / "out")
    assert torch.equal(saved.logits(fewbit.load(tmp_path / "out")), saved.logits(model))


def test_attention_without_a_k_proj(tmp_path: Path) -> None:
    saved.save(saved.model("phi3"), tmp_path / "base")
    config = BaseQuantizeConfig(kv_cache_quant_targets=KV)
    model = AutoFP8ForCausalLM.from_pretrained(tmp_path / "base", config)
    with pytest.raises(UnsupportedError, match="has no k_proj and v_proj"):
        model.quantize(torch.randint(10, 90, (1, 8)))


def test_names_are_those_of_the_fixture(base: Path, tmp_path: Path) -> None:
    """One module of a checkpoint in AutoFP8's layout; its kv_scale is the older name of the pair."""
    made(base, "static", *KV).save_quantized(tmp_path)
    with (
        safe_open(FIXTURE / "model.safetensors", "pt") as theirs,
        safe_open(tmp_path / "model.safetensors", "pt") as ours,
    ):
        for name in theirs.keys():  # noqa: SIM118
            a, b = (file.get_tensor(name) for file in (theirs, ours))
            assert a.dtype == b.dtype and a.dim() == b.dim(), name
    config = json.loads((FIXTURE / "config.json").read_text())["quantization_config"]
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config.items() <= written.items()
