"""load: what transformers computes, from a folder that transformers saved; quantized on the way when asked."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fewbit.errors import CheckpointError, SpecError, UnsupportedError
from fewbit.models import build, hf
from fewbit.models.build import ROUTERS, load
from fewbit.models.fill import is_stack
from fewbit.modules.linear import Linear
from fewbit.quant.formats import FORMATS
from fewbit.quant.plan import Plan, Rule
from fewbit.quant.reference import decode, encode
from tests.models import saved
from tests.tiny import edit, edit_config

TYPES = ["llama", "gemma3_text", "gpt_oss", "mixtral", "qwen3_moe", "deepseek_v3", "gpt2", "phi3", "opt", "granitemoe"]


@pytest.mark.parametrize("model_type", TYPES)
def test_equals_transformers(model_type: str, tmp_path: Path) -> None:
    theirs = saved.model(model_type)
    ours = load(saved.save(theirs, tmp_path))
    torch.testing.assert_close(saved.logits(ours), saved.logits(theirs), rtol=1e-4, atol=1e-5)
    ids = torch.tensor([[11, 12, 13]])
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **settings), theirs.generate(ids, **settings))
    assert not ours.training and not any(p.is_meta or p.requires_grad for p in ours.parameters())


def rounded(model: nn.Module, name: str) -> None:
    """transformers' model with every linear and expert sent through the format."""
    spec = FORMATS[name].weight
    head = hf.output_head(model)  # type: ignore[arg-type]
    for path, module in model.named_modules():
        if type(module) is nn.Linear and module is not head and path.rpartition(".")[2] not in ROUTERS:
            module.weight.data = decode(encode(module.weight.data, spec))
        elif is_stack(module):
            for projection in ("gate_up_proj", "down_proj"):
                weight = getattr(module, projection).data
                oriented = weight.mT if module.is_transposed else weight
                back = decode(encode(oriented.contiguous(), spec))
                getattr(module, projection).data = back.mT.contiguous() if module.is_transposed else back


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_oss", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("name", ["int4-g32", "mxfp4", "fp8-channel"])
def test_quantized_on_arrival(model_type: str, name: str, tmp_path: Path) -> None:
    theirs = saved.model(model_type)
    saved.save(theirs, tmp_path)
    plain = saved.logits(theirs)
    ours = load(tmp_path, format=name, activations="off")
    rounded(theirs, name)
    want = saved.logits(theirs)
    assert not torch.allclose(want, plain, rtol=1e-3)
    torch.testing.assert_close(saved.logits(ours), want, rtol=1e-3, atol=1e-4)
    if FORMATS[name].act:
        assert not torch.allclose(saved.logits(load(tmp_path, format=name)), want, rtol=1e-3)


def test_what_is_quantized(tmp_path: Path) -> None:
    saved.save(saved.model("llama"), tmp_path)
    plan = Plan((Rule(r".*down_proj", "regex", None), Rule("", "any", FORMATS["int8-channel"])))
    for form, left in (
        ("int4-g32", {"lm_head"}),
        (plan, {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}),
    ):
        ours = load(tmp_path, format=form)
        dense = {name for name, module in ours.named_modules() if isinstance(module, Linear) and not module.parts}
        assert dense == left


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16", None])
def test_dtype(dtype: Any, tmp_path: Path) -> None:
    saved.save(saved.model("llama").to(torch.bfloat16), tmp_path)
    ours = load(tmp_path, dtype=dtype, format="int4-g32")
    want = torch.float16 if dtype == "float16" else torch.bfloat16
    assert {p.dtype for p in ours.parameters()} == {want}
    assert saved.logits(ours).dtype == want


def test_tied_weights_are_one(tmp_path: Path) -> None:
    theirs = saved.model("llama", tie_word_embeddings=True)
    ours = load(saved.save(theirs, tmp_path), format="int8-channel")
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    ours = load(tmp_path)
    torch.testing.assert_close(saved.logits(ours), saved.logits(theirs), rtol=1e-4, atol=1e-5)


def test_tied_in_the_config_and_different_on_disk(tmp_path: Path) -> None:
    theirs = saved.model("llama")
    saved.save(theirs, tmp_path)
    edit_config(tmp_path, lambda config: config.update(tie_word_embeddings=True))
    ours = load(tmp_path)
    torch.testing.assert_close(saved.logits(ours), saved.logits(theirs), rtol=1e-4, atol=1e-5)


def test_all_faults_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved.save(saved.model("mixtral"), tmp_path)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        del tensors["model.layers.0.block_sparse_moe.experts.1.w1.weight"]
        tensors["model.layers.0.extra.weight"] = torch.zeros(2)

    edit(tmp_path, spoil)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load(tmp_path)
    monkeypatch.setattr(build, "verify_source", lambda source, model: [])  # load's own accounting is the second line
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    text = str(caught.value)
    assert "model.norm.weight: missing, the model holds [64]" in text
    assert "model.layers.0.mlp.experts.gate_up_proj" in text and "values on disk" in text
    assert "model.layers.0.extra.weight: the model has no place for it" in text


def test_findings_skipped_by_name(tmp_path: Path) -> None:
    saved.save(saved.model("llama"), tmp_path)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["extra.weight"] = torch.zeros(2)

    edit(tmp_path, spoil)
    for skip in ((), ("missing-tensor",), ("unknown-tensor",)):
        with pytest.raises(CheckpointError):
            load(tmp_path, unsafe_skip_verify=skip)
    assert not load(tmp_path, unsafe_skip_verify=("missing-tensor", "unknown-tensor")).model.norm.weight.any()


def test_wrong_shape(tmp_path: Path) -> None:
    saved.save(saved.model("llama"), tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(63)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: shape \[63\] on disk, the model holds \[64\]"):
        load(tmp_path, unsafe_skip_verify=("shape",))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"activations": "on"}, SpecError, "declared, hardware, fast, off"),
        ({"dtype": "int8"}, SpecError, "float32, bfloat16 or float16"),
        ({"format": "int4"}, SpecError, "known: int8-tensor"),
        ({"format": "fp8-tensor-static"}, UnsupportedError, "need calibration"),
        ({"format": "int4-g32", "kernels": "marlin"}, SpecError, "no linear kernel has that name"),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], text: str, tmp_path: Path) -> None:
    saved.save(saved.model("llama"), tmp_path)
    with pytest.raises(error, match=text):
        load(tmp_path, **arguments)


MODELING = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(r"{marker}").touch()
class OwnConfig(LlamaConfig):
    model_type = "fewbit_own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_in_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F14: nothing is imported without trust; with it, the class is the folder's."""
    theirs = saved.model("llama")
    folder, marker = saved.save(theirs, tmp_path / "m"), tmp_path / "imported"
    (folder / "own.py").write_text(MODELING.format(marker=marker))
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit_config(folder, lambda config: config.update(auto_map=names))
    torch.testing.assert_close(saved.logits(load(folder)), saved.logits(theirs), rtol=1e-4, atol=1e-5)
    edit_config(folder, lambda config: config.update(model_type="fewbit_own"))
    with pytest.raises(UnsupportedError, match=r"(?s)'fewbit_own' is not known.*trust_remote_code=True"):
        load(folder)
    assert not marker.exists()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    ours = load(folder, trust_remote_code=True)
    assert type(ours).__name__ == "OwnForCausalLM" and marker.exists()
    torch.testing.assert_close(saved.logits(ours), saved.logits(theirs), rtol=1e-4, atol=1e-5)


def test_a_config_that_makes_no_sense(tmp_path: Path) -> None:
    saved.save(saved.model("llama"), tmp_path)
    for change in ({"hidden_size": "wide"}, {"model_type": "t5"}, {"model_type": "lama"}):
        before = (tmp_path / "config.json").read_text()
        edit_config(tmp_path, lambda config, change=change: config.update(change, architectures=None))
        with pytest.raises((CheckpointError, UnsupportedError), match=r"config\.json"):
            load(tmp_path)
        (tmp_path / "config.json").write_text(before)


def test_infinity_in_a_config(tmp_path: Path) -> None:
    """As transformers writes it now, and as it did: a state space model's limit of a step."""
    theirs = saved.model("mamba2", time_step_limit=[0.0, math.inf])
    saved.save(theirs, tmp_path)
    for limit in ({"__float__": "Infinity"}, math.inf):
        edit_config(tmp_path, lambda config, limit=limit: config.update(time_step_limit=[0.0, limit]))
        assert torch.equal(saved.logits(load(tmp_path)), saved.logits(theirs))


def test_generation_config_is_read(tmp_path: Path) -> None:
    saved.save(saved.model("llama"), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "do_sample": True}))
    assert load(tmp_path).generation_config.temperature == 0.25
