"""verify: a sound checkpoint has no errors; every lie is found, named, and makes load refuse."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbit
from fewbit.errors import CheckpointError
from tests.tiny import edit, edit_config, llama

Tensors = dict[str, Tensor]
Q = "model.layers.0.self_attn.q_proj"
DIALECTS = {
    "gptq": "int4-g128", "awq": "int4-g128-asym", "fp8": "fp8-block", "compressed-tensors": "nvfp4-a16",
    "modelopt": "nvfp4-a16", "bitsandbytes": "nf4",
}  # fmt: skip


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A quantized tiny Llama in a dialect and format, made once each."""
    base = llama(tmp_path_factory.mktemp("verify") / "base")
    done: dict[tuple[str, str], Path] = {}

    def make(dialect: str, form: str) -> Path:
        if (dialect, form) not in done:
            out = base.parent / f"{dialect}-{form}"
            fewbit.convert(base, out, dialect, requantize=form)
            done[dialect, form] = out
        return done[dialect, form]

    return make


def copy(path: Path, to: Path) -> Path:
    to.mkdir()
    for file in path.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def set_to(name: str, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = torch.full_like(tensors[name].float(), value).to(tensors[name].dtype)

    return change


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def add(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.ones(3)})


def crop(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name][: len(tensors[name]) // 2].clone()

    return change


def double(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name] * 2

    return change


def dense(name: str) -> Callable[[Tensors], None]:
    """Replace a quantized module by a dense weight."""

    def change(tensors: Tensors) -> None:
        for key in [k for k in tensors if k.startswith(name + ".")]:
            del tensors[key]
        tensors[f"{name}.weight"] = torch.randn(128, 128).bfloat16()

    return change


LIES: list[tuple[str, str, str, Callable[[Tensors], None], str]] = [
    ("scale NaN", "gptq", "int4-g128", set_to(f"{Q}.scales", torch.nan), "scale-not-finite"),
    ("scale Inf", "compressed-tensors", "int4-g128", set_to(f"{Q}.weight_scale", torch.inf), "scale-not-finite"),
    ("scale zero", "compressed-tensors", "int4-g128", set_to(f"{Q}.weight_scale", 0.0), "scale-not-positive"),
    ("scale negative", "fp8", "fp8-block", set_to(f"{Q}.weight_scale_inv", -1.0), "scale-not-positive"),
    ("scale missing", "compressed-tensors", "nvfp4-a16", drop(f"{Q}.weight_scale"), "unreadable"),
    ("outer scale missing", "modelopt", "nvfp4-a16", drop(f"{Q}.weight_scale_2"), "unreadable"),
    ("zeros missing", "awq", "int4-g128-asym", drop(f"{Q}.qzeros"), "unreadable"),
    ("scale too short", "gptq", "int4-g128", crop(f"{Q}.scales"), "unreadable"),
    ("codes too short", "compressed-tensors", "int4-g128", crop(f"{Q}.weight_packed"), "unreadable"),
    ("siblings apart", "compressed-tensors", "nvfp4-a16", double(f"{Q}.weight_global_scale"), "sibling-scales"),
    ("NaN codes", "fp8", "fp8-block", set_to(f"{Q}.weight", torch.nan), "code-not-finite"),
    ("unknown tensor", "gptq", "int4-g128", add("model.layers.0.self_attn.mystery"), "unknown-tensor"),
    ("norm missing", "gptq", "int4-g128", drop("model.norm.weight"), "missing-tensor"),
    ("module missing", "fp8", "fp8-block", drop(f"{Q}.weight"), "unreadable"),
    ("dense, not said", "compressed-tensors", "int4-g128", dense(Q), "stored-dense"),
    ("no scale at all", "fp8", "fp8-block", drop(f"{Q}.weight_scale_inv"), "unreadable"),
]


@pytest.mark.parametrize(("dialect", "form"), DIALECTS.items())
def test_sound(made: Any, dialect: str, form: str) -> None:
    assert [f for f in fewbit.verify(made(dialect, form)) if f.severity == "error"] == []


@pytest.mark.parametrize(("label", "dialect", "form", "lie", "name"), LIES, ids=[row[0] for row in LIES])
def test_lies(made: Any, tmp_path: Path, label: str, dialect: str, form: str, lie: Any, name: str) -> None:
    path = edit(copy(made(dialect, form), tmp_path / "x"), lie)
    errors = {f.name for f in fewbit.verify(path) if f.severity == "error"}
    assert name in errors, (label, errors)
    with pytest.raises(CheckpointError):
        fewbit.load(path)


def test_a_dense_head_under_the_rule_of_a_class_is_a_habit(made: Any, tmp_path: Path) -> None:
    """Some tools neither quantize the head nor say so; naming it is another matter."""
    path = edit_config(
        copy(made("compressed-tensors", "int4-g128"), tmp_path / "x"),
        lambda c: c["quantization_config"].update(ignore=[]),
    )
    assert {f.severity for f in fewbit.verify(path) if f.name == "stored-dense"} == {"warning"}
    fewbit.load(path)

    def name_it(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["targets"].append("lm_head")

    assert {f.severity for f in fewbit.verify(edit_config(path, name_it)) if f.name == "stored-dense"} == {"error"}


def test_the_bias_of_an_affine_cache_is_told_of(made: Any, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for layer in range(2):
            for leaf in "kv":
                name = f"model.layers.{layer}.self_attn.{leaf}_proj.{leaf}"
                tensors[f"{name}_scale"], tensors[f"{name}_bias"] = torch.tensor(0.01), torch.zeros(1, 2, 1, 32)

    path = edit(copy(made("modelopt", "nvfp4-a16"), tmp_path / "x"), change)
    scheme = {"num_bits": 8, "type": "float", "dynamic": False}
    edit_config(path, lambda c: c["quantization_config"].update(kv_cache_scheme=scheme))
    found = fewbit.verify(path)
    assert {f.severity for f in found if f.name == "kv-bias"} == {"warning"}
    assert not [f for f in found if f.severity == "error"]


def test_shapes_against_config(made: Any, tmp_path: Path) -> None:
    path = edit_config(copy(made("gptq", "int4-g128"), tmp_path / "x"), lambda c: c.update(intermediate_size=512))
    assert any(f.name == "shape" for f in fewbit.verify(path))


def test_rule_that_hits_nothing(made: Any, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["ignore"].append("model.layers.77.mlp.up_proj")

    path = edit_config(copy(made("compressed-tensors", "int4-g128"), tmp_path / "x"), change)
    found = [f for f in fewbit.verify(path) if f.name == "idle-rule"]
    assert len(found) == 1 and "layers.77" in found[0].text and found[0].severity == "warning"


def test_excluded_and_stored_quantized(made: Any, tmp_path: Path) -> None:
    path = copy(made("compressed-tensors", "int4-g128"), tmp_path / "x")
    edit_config(path, lambda c: c["quantization_config"]["ignore"].append(Q))
    assert any(f.name == "stored-quantized" for f in fewbit.verify(path))


def test_all_findings_at_once(made: Any, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        set_to(f"{Q}.scales", torch.nan)(tensors)
        drop("model.norm.weight")(tensors)
        add("extra.thing")(tensors)

    path = edit(copy(made("gptq", "int4-g128"), tmp_path / "x"), change)
    assert {"scale-not-finite", "missing-tensor", "unknown-tensor"} <= {f.name for f in fewbit.verify(path)}


def test_tokenizer_missing_is_a_warning(made: Any) -> None:
    found = [f for f in fewbit.verify(made("gptq", "int4-g128")) if f.name == "no-tokenizer"]
    assert [f.severity for f in found] == ["warning"]


def test_one_finding_can_be_skipped_by_name(made: Any, tmp_path: Path) -> None:
    path = edit(copy(made("gptq", "int4-g128"), tmp_path / "x"), add("extra.thing"))
    with pytest.raises(CheckpointError, match="unknown-tensor"):
        fewbit.load(path)
    assert fewbit.load(path, unsafe_skip_verify=["unknown-tensor"]) is not None


def test_digests(made: Any, tmp_path: Path) -> None:
    path = copy(made("gptq", "int4-g128"), tmp_path / "x")
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert any(f.name == "digest" for f in fewbit.verify(path))


def test_remote_code_is_named_and_not_imported(tmp_path: Path) -> None:
    path = llama(tmp_path / "x")
    edit_config(path, lambda c: c.update(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}))
    (path / "modeling_evil.py").write_text("raise SystemExit('imported')")
    assert any(f.name == "remote-code" for f in fewbit.verify(path))
    assert fewbit.load(path) is not None
