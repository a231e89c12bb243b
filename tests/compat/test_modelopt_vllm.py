"""Exports for fakequant serving, and the three known problems of ModelOpt's example: each is served here."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbit
import fewbit.compat.modelopt as mtq
from fewbit import LLM, SamplingParams
from fewbit.compat import fakequant
from fewbit.compat.fakequant import Fakequant
from fewbit.errors import CheckpointError, RequestError
from fewbit.models import hf
from fewbit.models.build import load
from fewbit.workflows.calibration import calibration
from tests.compat import small
from tests.tiny import LLAMA

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
MIXED = [
    {"quantizer_name": "*", "enable": False},
    {"quantizer_name": "*self_attn*_proj.weight_quantizer", "cfg": {"num_bits": (4, 3)}},
    {"quantizer_name": "*self_attn*_proj.input_quantizer", "cfg": {"num_bits": (4, 3)}},
    {"quantizer_name": "*mlp*weight_quantizer", "cfg": mtq.NVFP4_DEFAULT_CFG["quant_cfg"][1]["cfg"]},
    {"quantizer_name": "*mlp*input_quantizer", "cfg": mtq.NVFP4_DEFAULT_CFG["quant_cfg"][1]["cfg"]},
    {"quantizer_name": "*layers.1*", "enable": False},
]  # fp8 attention, NVFP4 MLPs, a layer in bf16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.folder(tmp_path_factory.mktemp("vllm") / "base")


def served(path: Path, dtype: torch.dtype = torch.float32, **asked: Any) -> Any:
    found = fakequant.emulation(path, Fakequant(**asked), CPU, dtype)
    return load(path, dtype=dtype, kernels="emulated", format=found.arrivals, kv=found.sides)


def train(model: Any, steps: int = 3) -> None:
    """A few steps through the rounding; keys and values are rounded all the while."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for _ in range(steps):
        loss = model(small.ids(), labels=small.ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kv", ["NVFP4_KV_CFG", "FP8_KV_CFG", "NVFP4_AFFINE_KV_CFG"])
def test_trained_with_keys_and_values(kv: str, base: Path, tmp_path: Path) -> None:
    config = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
    config["quant_cfg"] += getattr(mtq, kv)["quant_cfg"]
    model = mtq.quantize(small.model(base), config, small.loop)
    train(model)
    mtq.export_hf_vllm_fq_checkpoint(model, tmp_path / "out")
    small.tokenizer().save_pretrained(tmp_path / "out")
    want = small.logits(model)
    got = small.logits(served(tmp_path / "out", amax_file=str(tmp_path / "out")))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, small.logits(load(tmp_path / "out")), rtol=1e-3)
    with LLM(tmp_path / "out", amax_file=str(tmp_path / "out"), dtype="float32") as llm:
        ids = small.ids()[0, :8].tolist()
        tokens = list(llm.generate([ids], GREEDY)[0].outputs[0].token_ids)
    for token in tokens:
        assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


def test_mixed_precision_is_loaded_served_and_exported(base: Path, tmp_path: Path) -> None:
    """In memory, as a real checkpoint of several formats, and emulated: the same."""
    model = small.model(base)
    model.config._attn_implementation = hf.OURS
    mtq.quantize(model, {"quant_cfg": MIXED, "algorithm": "max"}, small.loop)
    want = small.logits(model)
    mtq.export_hf_checkpoint(model, tmp_path / "real")
    small.sound(tmp_path / "real")
    assert {f for _, f in formats(tmp_path / "real")} == {"fp8-tensor-static", "nvfp4"}
    torch.testing.assert_close(small.logits(fewbit.load(tmp_path / "real", dtype=torch.float32)), want)
    mtq.export_hf_vllm_fq_checkpoint(model, tmp_path / "float")
    small.tokenizer().save_pretrained(tmp_path / "float")
    options = {"dtype": "float32", "emulate_activations": True}
    tokens = []
    for path, more in ((tmp_path / "real", {}), (tmp_path / "float", {"amax_file": str(tmp_path / "float")})):
        with LLM(path, **options, **more) as llm:
            found = llm.generate(["The fog came in"], GREEDY)[0]
            tokens.append(list(found.outputs[0].token_ids))
    assert len(tokens[1]) == 6
    emulated = served(tmp_path / "float", fakequant={"quant_cfg": MIXED, "algorithm": "max"})
    kinds = {m.parts[0].quantized.format.weight.element.name for m in emulated.modules() if getattr(m, "parts", ())}
    assert kinds == {"e4m3", "e2m1"}


def formats(path: Path) -> list[tuple[str, str]]:
    return [(m.name, m.format) for m in fewbit.inspect(path).modules]


def test_what_cannot_be_exported(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nothing of the model is quantized"):
        mtq.export_hf_vllm_fq_checkpoint(small.model(base), tmp_path / "a")
    with pytest.raises(CheckpointError, match="no name of a Megatron GPT"):
        mtq.export_mcore_gpt_to_hf_vllm_fq({"decoder.layers.0.mixer.weight": torch.ones(2)}, LLAMA, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def megatron(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """An HF Llama's tensors as Megatron holds them: heads by groups, norms inside the linears behind them."""
    size, groups = config["head_dim"], config["num_key_value_heads"]
    out: dict[str, Any] = {
        "embedding.word_embeddings.weight": torch.cat([state["model.embed_tokens.weight"], torch.zeros(32, 128)]),
        "output_layer.weight": torch.cat([state["lm_head.weight"], torch.zeros(32, 128)]),
        "decoder.final_layernorm.weight": state["model.norm.weight"],
    }  # rows are filled up
    for i in range(config["num_hidden_layers"]):
        theirs, ours = f"decoder.layers.{i}", f"model.layers.{i}"
        q, k, v = (state[f"{ours}.self_attn.{n}_proj.weight"].view(groups, -1, 128) for n in "qkv")
        assert k.shape[1] == size
        out |= {
            f"{theirs}.self_attention.linear_qkv.weight": torch.cat([q, k, v], 1).reshape(-1, 128),
            f"{theirs}.self_attention.linear_qkv.layer_norm_weight": state[f"{ours}.input_layernorm.weight"],
            f"{theirs}.self_attention.linear_qkv._extra_state": torch.zeros(0),
            f"{theirs}.self_attention.linear_proj.weight": state[f"{ours}.self_attn.o_proj.weight"],
            f"{theirs}.mlp.linear_fc1.weight": torch.cat(
                [state[f"{ours}.mlp.{n}_proj.weight"] for n in ("gate", "up")]
            ),
            f"{theirs}.mlp.linear_fc1.layer_norm_weight": state[f"{ours}.post_attention_layernorm.weight"],
            f"{theirs}.mlp.linear_fc2.weight": state[f"{ours}.mlp.down_proj.weight"],
        }
    return out


@pytest.mark.parametrize("name", ["FP8_DEFAULT_CFG", "INT8_DEFAULT_CFG", "INT4_AWQ_CFG"])
def test_from_megatron(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state dict with fused and interleaved heads serves what HF's own export of the same model serves."""
    monkeypatch.setattr(fakequant, "samples", lambda *_: calibration(None, small.ids()))
    path = small.folder(tmp_path / "base", num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    config = json.loads((path / "config.json").read_text())
    want = served(path, torch.bfloat16, fakequant=name, kv_fakequant="FP8_KV_CFG")
    out = tmp_path / "hf"
    asked = {"fakequant": name, "kv_fakequant": "FP8_KV_CFG"}
    state = fakequant.calibrate(path, out, **asked, text={"data": small.ids()})
    from safetensors.torch import load_file

    mcore = megatron(load_file(out / "model.safetensors"), config)
    for key, t in state.items():
        mcore |= as_megatron(key, t, state, config)
    mtq.export_mcore_gpt_to_hf_vllm_fq(mcore, config, tmp_path / "out")
    got = served(tmp_path / "out", torch.bfloat16, amax_file=str(tmp_path / "out"), **asked)
    assert torch.equal(small.logits(got), small.logits(want))


def as_megatron(key: str, t: Tensor, state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The state of HF's q, k, v (gate, up) as of one fused linear."""
    layer = key.split(".")[2]
    to, rest = f"decoder.layers.{layer}", key.split(".", 4)[3:]
    leaf, suffix = rest[1].split(".", 1) if rest[0] in ("self_attn", "mlp") else ("", "")
    if leaf.endswith("bmm_quantizer"):
        return {f"{to}.self_attention.core_attention.{leaf}.{suffix.replace('_amax', '_amax')}": t}
    rows = suffix.startswith("weight_quantizer") and t.numel() > 1
    if leaf in ("k_proj", "v_proj", "up_proj"):
        return {}
    if leaf == "q_proj":
        parts = [state[key.replace("q_proj", f"{n}_proj")] for n in "qkv"]
        groups = config["num_key_value_heads"]
        joined = torch.cat([p.reshape(groups, -1, 1) for p in parts], 1).reshape(-1, 1) if rows else t
        return {f"{to}.self_attention.linear_qkv.{suffix}": joined}
    if leaf == "gate_proj":
        joined = torch.cat([t, state[key.replace("gate_proj", "up_proj")]]) if rows else t
        return {f"{to}.mlp.linear_fc1.{suffix}": joined}
    return {f"{to}.{'self_attention.linear_proj' if leaf == 'o_proj' else 'mlp.linear_fc2'}.{suffix}": t}
