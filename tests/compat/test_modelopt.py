"""Quantizing plain transformers models in place: what they compute, what they write, what they learn."""

import copy
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

import fewbit
import fewbit.compat.modelopt as mtq
from fewbit.compat.insert import QuantLinear, quantizers
from fewbit.errors import CheckpointError, RequestError, UnsupportedError
from fewbit.models import hf
from fewbit.quant.reference import fake_quant
from tests.compat import small
from tests.models import saved

# what a Llama cannot use, or a checkpoint cannot say, and why
REFUSED = {
    "NVFP4_EXPERTS_ONLY_CFG": "no rule switches on a quantizer",
    "NVFP4_MLP_WEIGHT_ONLY_CFG": "no algorithm has these weights",  # blocks of 32 without inputs
    "MXFP4_MLP_WEIGHT_ONLY_CFG": "no algorithm has these weights",
    "MXFP6_DEFAULT_CFG": "no algorithm has these weights",  # ModelOpt has no export of them either
    "MXINT8_DEFAULT_CFG": "no algorithm has these weights",
    "FP8_AFFINE_KV_CFG": "a cache with a bias",
    "NVFP4_AFFINE_KV_CFG": "a cache with a bias",
    "NVFP4_KV_ROTATE_CFG": "one in another basis",
    "NVFP4_FP8_MHA_CONFIG": "queries or probabilities are rounded too",
}
ALGORITHMS = {
    "FP8_DEFAULT_CFG": "FP8", "NVFP4_DEFAULT_CFG": "NVFP4", "INT4_AWQ_CFG": "W4A16_AWQ", "MXFP8_DEFAULT_CFG": "MXFP8",
    "W4A8_AWQ_BETA_CFG": "W4A8_AWQ", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": "FP8_PB_WO", "W4A16_NVFP4_CFG": "W4A16_NVFP4",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": "FP8_PER_CHANNEL_PER_TOKEN", "INT8_SMOOTHQUANT_CFG": "W8A8_SQ_PER_CHANNEL",
    "NVFP4_SVDQUANT_DEFAULT_CFG": "NVFP4_SVD", "NVFP4_AWQ_CLIP_CFG": "NVFP4", "W4A8_MXFP4_FP8_CFG": "W4A8_MXFP4_FP8",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.folder(tmp_path_factory.mktemp("compat") / "base")


def quantized(path: Path, name: str, *more: str, **options: Any) -> Any:
    config = copy.deepcopy(getattr(mtq, name))
    for each in more:
        config["quant_cfg"] += getattr(mtq, each)["quant_cfg"]
    return mtq.quantize(small.model(path, **options), config, small.loop)


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a.float() - b.float()).abs().max() <= 1e-6 * b.float().abs().max())


def ours(model: Any) -> Any:
    """The model on the attention of loaded models: in another order of sums, codes on an edge fall elsewhere."""
    model.config._attn_implementation = hf.OURS
    return model


@pytest.mark.parametrize("name", mtq.PRESETS)
def test_every_preset(name: str, base: Path, tmp_path: Path) -> None:
    """Exported and loaded, the model computes what it computed; or a reason says why it cannot be."""
    if name in REFUSED:
        with pytest.raises((UnsupportedError, RequestError), match=REFUSED[name]):
            mtq.export_hf_checkpoint(quantized(base, name), tmp_path)
        assert not list(tmp_path.iterdir())
        return
    made = quantized(base, name)
    want = small.logits(made if "KV" in name else ours(made))
    assert not close(want, small.logits(small.model(base)))
    mtq.export_hf_checkpoint(made, tmp_path)
    small.sound(tmp_path)
    assert close(small.logits(fewbit.load(tmp_path, dtype=torch.float32)), want)
    config = json.loads((tmp_path / "config.json").read_text())
    nested = json.loads((tmp_path / "hf_quant_config.json").read_text())["quantization"]
    assert config["quantization_config"]["quant_algo"] == nested["quant_algo"]
    assert name not in ALGORITHMS or nested["quant_algo"] == ALGORITHMS[name]
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
    assert nested["quant_algo"] is None or "lm_head" in nested["exclude_modules"]


@pytest.mark.parametrize("name", ["FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"])
def test_in_bf16_with_the_attention_that_transformers_picks(name: str, base: Path, tmp_path: Path) -> None:
    made = quantized(base, name, dtype=torch.bfloat16)
    mtq.export_hf_checkpoint(made, tmp_path)
    got, want = small.logits(fewbit.load(tmp_path, kernels="reference")).float(), small.logits(made).float()
    assert torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), 0) > 0.999
    assert small.sound(tmp_path)["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gemma3_text", "phi3", "opt", "deepseek_v3"])
@pytest.mark.parametrize("name", ["FP8_DEFAULT_CFG", "NVFP4_AWQ_LITE_CFG"])
def test_other_models(model_type: str, name: str, tmp_path: Path) -> None:
    """Stacked experts, tied heads, fused linears, biases, latent attention; and their KV scales."""
    theirs = ours(saved.model(model_type))
    config = copy.deepcopy(getattr(mtq, name))
    config["quant_cfg"] += mtq.FP8_KV_CFG["quant_cfg"]
    made = mtq.quantize(theirs, config, lambda model: saved.logits(model, 40))
    want = saved.logits(made)
    mtq.export_hf_checkpoint(made, tmp_path)
    small.sound(tmp_path)
    assert close(saved.logits(fewbit.load(tmp_path)), want)


def test_what_is_in_the_way_of_an_export(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nothing of the model is quantized"):
        mtq.export_hf_checkpoint(small.model(base), tmp_path / "a")
    made = quantized(base, "FP8_DEFAULT_CFG")
    mtq.export_hf_checkpoint(made, tmp_path / "b")
    with pytest.raises(CheckpointError, match="already holds a model"):
        mtq.export_hf_checkpoint(made, tmp_path / "b")
    mtq.export_hf_checkpoint(made, tmp_path / "b", overwrite=True, dtype=torch.bfloat16)
    assert small.sound(tmp_path / "b")["model.norm.weight"].dtype == torch.bfloat16
    mtq.disable_quantizer(made, "*q_proj.weight_quantizer")
    with pytest.raises(UnsupportedError, match="its input is rounded and its weight is not"):
        mtq.export_hf_checkpoint(made, tmp_path / "c")
    partly = quantized(base, "FP8_DEFAULT_CFG", "FP8_KV_CFG")
    mtq.disable_quantizer(partly, "*layers.1*v_bmm_quantizer")
    with pytest.raises(UnsupportedError, match="the cache is quantized in part"):
        mtq.export_hf_checkpoint(partly, tmp_path / "c")
    stacked = mtq.quantize(saved.model("gpt_oss"), mtq.MXFP8_DEFAULT_CFG)
    with pytest.raises(UnsupportedError, match="stores each expert apart"):
        mtq.export_hf_checkpoint(stacked, tmp_path / "c")
    with pytest.raises(UnsupportedError, match="none of its projections has one"):
        mtq.export_hf_checkpoint(mtq.quantize(saved.model("gpt2"), mtq.FP8_KV_CFG, saved.logits), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_tied_head(tmp_path: Path) -> None:
    theirs = saved.model("gemma3_text")
    config = copy.deepcopy(mtq.MXFP8_DEFAULT_CFG)
    config["quant_cfg"] += [{"quantizer_name": f"lm_head.{n}_quantizer", "enable": True} for n in ("weight", "input")]
    with pytest.raises(UnsupportedError, match="is saved under another name"):
        mtq.export_hf_checkpoint(mtq.quantize(theirs, config), tmp_path)


def inputs(model: Any) -> dict[str, Tensor]:
    """Path of a linear -> the largest magnitude that came in, seen by hooks on the plain model."""
    tops: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def note(module: Any, args: Any) -> None:
            top = args[0].abs().max()
            tops[name] = torch.maximum(tops.get(name, top), top)

        return note

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        small.loop(model)
    return tops


def test_fp8_by_torch_casts(base: Path, tmp_path: Path) -> None:
    mtq.export_hf_checkpoint(quantized(base, "FP8_DEFAULT_CFG"), tmp_path)
    plain = small.model(base)
    tensors, tops = small.sound(tmp_path), inputs(plain)
    for name, weight in plain.state_dict().items():
        path = name.removesuffix(".weight")
        if "_proj" not in name:
            assert torch.equal(tensors[name], weight)
            continue
        scale = weight.abs().max() / 448
        assert torch.equal(tensors[f"{path}.weight_scale"], scale)
        codes = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(tensors[name].view(torch.uint8), codes.view(torch.uint8))
        torch.testing.assert_close(tensors[f"{path}.input_scale"], tops[path] / 448, rtol=1e-6, atol=0)


def test_nvfp4_by_its_definition(base: Path, tmp_path: Path) -> None:
    """In numpy: s2 = amax / (6 * 448), one for fused linears; block scales in E4M3; even values in low nibbles."""
    mtq.export_hf_checkpoint(quantized(base, "NVFP4_DEFAULT_CFG"), tmp_path)
    state = {name: w.numpy() for name, w in small.model(base).state_dict().items()}
    tensors, tops = small.sound(tmp_path), inputs(small.model(base))
    for name, w in state.items():
        if "_proj" not in name:
            continue
        path, leaf = name.removesuffix(".weight"), name.split(".")[-2]
        fused = next((g for g in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")) if leaf in g), (leaf,))
        amax = np.float32(max(abs(state[name.replace(leaf, other)]).max() for other in fused))
        s2 = amax / np.float32(6 * 448)
        assert np.float32(tensors[f"{path}.weight_scale_2"]) == s2
        blocks = w.reshape(w.shape[0], -1, 16)
        ideal = np.clip(abs(blocks).max(-1) / (6 * s2), 2.0**-9, 448)
        sb = ideal.astype(ml_dtypes.float8_e4m3fn)
        assert (tensors[f"{path}.weight_scale"].view(torch.uint8).numpy() == sb.view(np.uint8)).all()
        scaled = blocks / (sb.astype(np.float32) * s2)[..., None]
        codes = np.clip(scaled, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8).reshape(w.shape)
        assert (tensors[name].numpy() == (codes[:, 0::2] | codes[:, 1::2] << 4)).all()
        top = max(tops[path.replace(leaf, other)] for other in fused)
        torch.testing.assert_close(tensors[f"{path}.input_scale"], top / (6 * 448), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("cache", "by"), [("FP8_KV_CFG", 448), ("NVFP4_KV_CFG", 448)])
def test_kv_scales(cache: str, by: int, base: Path, tmp_path: Path) -> None:
    """amax / 448 of the keys and values that transformers' own cache holds; used in memory and when loaded."""
    made = quantized(base, "FP8_PER_CHANNEL_PER_TOKEN_CFG", cache)
    mtq.export_hf_checkpoint(made, tmp_path)
    tensors, plain = small.sound(tmp_path), small.model(base, attn_implementation="eager")
    tops = torch.zeros(2, 2)
    with torch.no_grad():
        for row in small.ids():
            layers = plain(row[None], use_cache=True).past_key_values.layers
            tops = tops.maximum(torch.tensor([[t.abs().max() for t in (la.keys, la.values)] for la in layers]))
    for layer, (k, v) in enumerate(tops):
        path = f"model.layers.{layer}.self_attn."
        torch.testing.assert_close(tensors[f"{path}k_proj.k_scale"], k / by, rtol=1e-5, atol=0)
        torch.testing.assert_close(tensors[f"{path}v_proj.v_scale"], v / by, rtol=1e-5, atol=0)
    want = small.logits(made)
    loaded = fewbit.load(tmp_path, dtype=torch.float32)
    assert torch.equal(small.logits(loaded), want)
    mtq.disable_quantizer(made, "*_bmm_quantizer")
    assert not close(small.logits(made), want)
    ids, settings = small.ids()[:1], {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mtq.enable_quantizer(made, "*[kv]_bmm_quantizer")
    assert torch.equal(made.generate(ids, **settings), loaded.generate(ids, **settings))


def test_forward_is_fake_quant_of_the_specs(base: Path) -> None:
    """One linear, by hand."""
    made = quantized(base, "NVFP4_AWQ_LITE_CFG")
    layer = made.model.layers[0].mlp.gate_proj
    assert isinstance(layer, QuantLinear) and isinstance(layer.weight, torch.nn.Parameter)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    smooth = layer.input_quantizer._pre_quant_scale
    assert torch.equal(made.model.layers[0].mlp.up_proj.input_quantizer._pre_quant_scale, smooth)
    q = layer.weight_quantizer
    want = fake_quant(x * smooth, layer.input_quantizer.spec, layer.input_quantizer.planes)
    want = torch.nn.functional.linear(want, fake_quant(layer.weight.detach(), q.spec, q.planes))
    assert torch.equal(layer(x).detach(), want)
    original = small.model(base).model.layers[0].mlp.gate_proj.weight
    torch.testing.assert_close(layer.weight * smooth, original, rtol=1e-5, atol=1e-7)


def test_algorithms_are_worth_it(base: Path) -> None:
    """On their own calibration data, in the mean over a model whose inputs have outliers."""
    theirs = small.model(base)
    with torch.no_grad():
        for layer in theirs.model.layers:
            layer.input_layernorm.weight[::17] *= 30
            layer.post_attention_layernorm.weight[::17] *= 30
    plain = small.logits(theirs)
    errors = {}
    gptq = {"method": "gptq", "perc_damp": 0.01, "block_size": 128}
    for algorithm in ("max", "awq_lite", "awq_full", "smoothquant", "svdquant", "awq_clip", gptq):
        config = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG) | {"algorithm": algorithm}
        made = mtq.quantize(copy.deepcopy(theirs), config, small.loop)
        errors[str(algorithm)] = float((small.logits(made) - plain).square().mean())
    assert errors["awq_lite"] < errors["max"] and errors["awq_full"] < errors["max"], errors
    assert errors[str(gptq)] < errors["max"] and errors["awq_clip"] < errors["max"], errors
    assert errors["svdquant"] < 0.5 * errors["max"], errors


def weight_error(path: Path, name: str) -> float:
    total = 0.0
    plain = small.model(path)
    for name_, q in quantizers(quantized(path, name)).items():
        if name_.endswith("weight_quantizer") and q.enabled:
            w = plain.get_submodule(name_.rpartition(".")[0]).weight.detach()
            total += float((q.value(w) - w).square().sum())
    return total


def test_searches_of_scales_lose_less(base: Path) -> None:
    by_amax = weight_error(base, "NVFP4_DEFAULT_CFG")
    sweep = weight_error(base, "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG")
    two = weight_error(base, "NVFP4_FOUR_OVER_SIX_CFG")
    assert sweep < two < by_amax and sweep < 0.9 * by_amax


def learn(model: Any, steps: int) -> list[float]:
    """Plain SGD with momentum on the texts."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(steps):
        ids = small.ids()
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def test_gptq_is_exported_as_it_runs(base: Path, tmp_path: Path) -> None:
    """Its choice of codes lives in the weights themselves; rounding them again changes nothing."""
    config = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG) | {"algorithm": {"method": "gptq"}}
    made = ours(mtq.quantize(small.model(base), config, small.loop))
    layer = made.model.layers[0].mlp.gate_proj
    assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight)
    mtq.export_hf_checkpoint(made, tmp_path)
    small.sound(tmp_path)
    assert close(small.logits(fewbit.load(tmp_path, dtype=torch.float32)), small.logits(made))


@pytest.mark.parametrize("names", [("NVFP4_DEFAULT_CFG", "FP8_KV_CFG"), ("FP8_DEFAULT_CFG",), ("INT4_AWQ_CFG",)])
def test_training_through_the_rounding(names: tuple[str, ...], base: Path, tmp_path: Path) -> None:
    made = quantized(base, *names)
    before = copy.deepcopy(made.state_dict())
    plain = set(small.model(base).state_dict())
    assert plain <= set(before) and {n for n, _ in made.named_parameters()} == plain
    losses = learn(made, 20)
    assert losses[-1] < 0.8 * losses[0] and all(torch.tensor(losses).isfinite())
    mtq.export_hf_checkpoint(made, tmp_path)
    tensors = small.sound(tmp_path)
    loaded = fewbit.load(tmp_path, dtype=torch.float32)
    assert len(names) == 1 or "model.layers.1.self_attn.v_proj.v_scale" in tensors
    trained = small.logits(made)
    assert close(small.logits(loaded), small.logits(made if len(names) > 1 else ours(made)))
    made.load_state_dict(before)
    assert not close(small.logits(made), trained)
    torch.testing.assert_close(learn(made, 1)[0], losses[0], rtol=0.02, atol=0)


def test_trained_experts(tmp_path: Path) -> None:
    theirs = ours(saved.model("mixtral"))
    made = mtq.quantize(theirs, mtq.FP8_DEFAULT_CFG, lambda model: saved.logits(model, 40))
    made.train()
    ids = torch.randint(10, 90, (4, 24), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = made(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    experts = made.model.layers[0].mlp.experts
    assert float(experts.gate_up_proj.grad.abs().max()) > 0 and float(experts.down_proj.grad.abs().max()) > 0
    made.eval()
    mtq.export_hf_checkpoint(made, tmp_path)
    assert close(saved.logits(fewbit.load(tmp_path)), saved.logits(made))


def test_an_expert_of_a_stack_is_not_named_alone() -> None:
    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    config["quant_cfg"].append({"quantizer_name": "*.experts.3.*", "enable": False})
    with pytest.raises(UnsupportedError, match="a part of what is one here"):
        mtq.quantize(saved.model("mixtral"), config, saved.logits)
    config["quant_cfg"][-1]["quantizer_name"] = "*.experts.*.w2.*"
    made = mtq.quantize(saved.model("mixtral"), config, saved.logits)
    assert not made.model.layers[0].mlp.experts.quantizers["down_proj"].weight_quantizer.enabled
    assert made.model.layers[0].mlp.experts.quantizers["gate_up_proj"].weight_quantizer.enabled


def test_data_that_reaches_nothing(base: Path) -> None:
    with pytest.raises(RequestError, match="brought no data to 14 quantizers"):
        mtq.quantize(small.model(base), mtq.FP8_DEFAULT_CFG, lambda model: None)
    with pytest.raises(RequestError, match="brought it no data"):
        mtq.quantize(small.model(base), mtq.INT4_AWQ_CFG, lambda model: None)
    with pytest.raises(RequestError, match="algorithm awq_lite needs data"):
        mtq.quantize(small.model(base), mtq.INT4_AWQ_CFG)
    assert mtq.quantize(small.model(base), mtq.W4A16_NVFP4_CFG) is not None


def test_constant_scales(base: Path) -> None:
    config = {"quant_cfg": {"*[kv]_bmm_quantizer": {"num_bits": (4, 3), "use_constant_amax": True}}, "algorithm": "max"}
    made = mtq.quantize(small.model(base), config)
    assert float(made.model.layers[0].self_attn.k_bmm_quantizer.planes["scale0"]) == 1


def test_summary_and_switches(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = quantized(base, "FP8_DEFAULT_CFG", "FP8_KV_CFG")
    capsys.readouterr()
    mtq.print_quant_summary(made)
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "32 quantizers found in model" and len(out) == 33
    assert any("layers.1.mlp.down_proj.input_quantizer" in line and "e4m3 x f32[tensor]" in line for line in out)
    assert any("layers.0.self_attn.v_bmm_quantizer" in line for line in out)
    mtq.disable_quantizer(made, "*")
    plain = small.logits(small.model(base, attn_implementation="eager"))
    assert close(small.logits(made), plain)
    mtq.enable_quantizer(made, lambda name: "mlp" in name)
    assert not close(small.logits(made), plain)
    with pytest.raises(RequestError, match="matches none"):
        mtq.disable_quantizer(made, "*mpl*")


def test_a_copy_is_on_its_own(base: Path) -> None:
    made = quantized(base, "FP8_DEFAULT_CFG")
    other = copy.deepcopy(made)
    assert torch.equal(small.logits(made), small.logits(other))
    mtq.disable_quantizer(other, "*")
    assert not torch.equal(small.logits(made), small.logits(other))


def test_folded_weights(base: Path, tmp_path: Path) -> None:
    made = quantized(base, "NVFP4_DEFAULT_CFG")
    want = small.logits(made)
    mtq.fold_weight(made)
    assert torch.equal(small.logits(made), want)
    assert not made.model.layers[0].mlp.up_proj.weight_quantizer.enabled
    with pytest.raises(UnsupportedError, match="its input is rounded and its weight is not"):
        mtq.export_hf_checkpoint(made, tmp_path)


def test_scales_keep_their_type(base: Path) -> None:
    made = quantized(base, "FP8_DEFAULT_CFG")
    before = {n: dict(q.planes) for n, q in quantizers(made).items()}
    made.to(torch.bfloat16)
    for name, q in quantizers(made).items():
        assert all(torch.equal(plane, q.planes[n]) for n, plane in before[name].items())
    assert small.logits(made).dtype == torch.bfloat16


def test_blocks_that_do_not_divide(tmp_path: Path) -> None:
    theirs = saved.model("llama")  # 64 wide, blocks of 128
    made = mtq.quantize(theirs, mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    saved.logits(made)
    with pytest.raises(UnsupportedError, match="blocks of 128 do not divide its 64 inputs"):
        mtq.export_hf_checkpoint(made, tmp_path)


def test_a_refusal_leaves_the_model_as_it_was(base: Path) -> None:
    theirs = small.model(base)
    for config in (mtq.FP8_DEFAULT_CFG, mtq.FP8_KV_CFG, mtq.NVFP4_KV_ROTATE_CFG, mtq.INT4_AWQ_CFG):
        with pytest.raises((RequestError, UnsupportedError)):
            mtq.quantize(theirs, config)
    assert not quantizers(theirs) and type(theirs.model.layers[0].mlp.up_proj) is torch.nn.Linear
