"""Quantization metadata that lies, of every kind over every dialect: verify says so, and load refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbit
from fewbit.errors import FewbitError
from tests.tiny import edit, edit_config, llama

Tensors = dict[str, Tensor]
Lie = Callable[[Path], Any]
ATTENTION = "model.layers.0.self_attn"
Q = f"{ATTENTION}.q_proj"
MADE = {
    "gptq": ("gptq", "int4-g64"), "gptq-asym": ("gptq", "int4-g64-asym"), "gptq-v2": ("gptq-v2", "int4-g64-asym"),
    "gptq-p": ("gptq-p", "int5-g64"), "awq": ("awq", "int4-g64-asym"), "fp8": ("fp8", "fp8-block"),
    "ct-int4": ("compressed-tensors", "int4-g64"), "ct-asym": ("compressed-tensors", "int4-g64-asym"),
    "ct-nvfp4": ("compressed-tensors", "nvfp4-a16"), "ct-fp8": ("compressed-tensors", "fp8-channel"),
    "ct-mxfp4": ("compressed-tensors", "mxfp4-a16"), "nvfp4": ("modelopt", "nvfp4-a16"),
    "mo-fp8": ("modelopt", "fp8-channel"), "mxfp8": ("modelopt", "mxfp8"), "nf4": ("bitsandbytes", "nf4"),
    "auto-round": ("auto-round", "int4-g64"),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A sound checkpoint of each row, made once."""
    base = llama(tmp_path_factory.mktemp("lies") / "base", num_hidden_layers=1)

    def make(key: str) -> Path:
        out = base.parent / key
        if not out.exists():
            fewbit.convert(base, out, MADE[key][0], requantize=MADE[key][1])
        return out

    return make


def quantization(*path: Any, **values: Any) -> Lie:
    """Set keys of quantization_config, at a path inside it."""

    def change(config: dict[str, Any]) -> None:
        at: Any = config["quantization_config"]
        for key in path:
            at = at[key]
        at.update(values)

    return lambda folder: edit_config(folder, change)


def weights(**values: Any) -> Lie:
    return quantization("config_groups", "group_0", "weights", **values)


def also(name: str) -> Lie:
    """Name one module more among those left dense."""

    def change(config: dict[str, Any]) -> None:
        found = config["quantization_config"]
        key = next(k for k in ("ignore", "modules_to_not_convert", "llm_int8_skip_modules", "dynamic") if k in found)
        if isinstance(found[key], dict):
            found[key][f"-:.*{name}"] = {}
        else:
            found[key] = [*found[key], name]

    return lambda folder: edit_config(folder, change)


def stored(ending: str, change: Callable[[Tensor], Tensor]) -> Lie:
    """Change one tensor of the first q_proj."""
    return lambda folder: edit(folder, lambda t: t.update({Q + ending: change(t[Q + ending]).contiguous()}))


def drop(*endings: str) -> Lie:
    return lambda folder: edit(folder, lambda t: [t.pop(Q + ending) for ending in endings])


def dense(folder: Path) -> Path:
    """Store a float weight where the config says codes."""

    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(f"{Q}.")]:
            del tensors[name]
        tensors[f"{Q}.weight"] = torch.randn(128, 128).bfloat16()

    return edit(folder, change)


def value(x: float) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.full_like(t.float(), x).to(t.dtype)


def wide(t: Tensor) -> Tensor:
    return torch.cat([t, t], -1)


def at(index: int, x: int) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t.view(-1)[index] = x
        return t

    return change


LIES: list[tuple[str, tuple[str, ...], Lie]] = [
    ("bits 8", ("gptq", "gptq-asym", "gptq-v2", "auto-round"), quantization(bits=8)),
    ("bits 2", ("gptq", "gptq-asym", "gptq-v2", "auto-round", "awq"), quantization(bits=2)),
    ("bits 4", ("gptq-p",), quantization(bits=4)),
    ("bits 6", ("gptq-p",), quantization(bits=6)),
    ("bits 0", ("gptq", "awq", "auto-round"), quantization(bits=0)),
    ("bits a string", ("gptq", "awq", "auto-round"), quantization(bits="four")),
    ("bits null", ("gptq", "auto-round"), quantization(bits=None)),
    ("group 32", ("gptq", "gptq-v2", "gptq-p", "awq", "auto-round"), quantization(group_size=32)),
    ("group 128", ("gptq", "gptq-v2", "gptq-p", "awq", "auto-round"), quantization(group_size=128)),
    ("group -1", ("gptq", "gptq-v2", "gptq-p", "awq", "auto-round"), quantization(group_size=-1)),
    ("group 48", ("gptq", "gptq-v2", "gptq-p", "awq", "auto-round"), quantization(group_size=48)),
    ("group 96, as many groups", ("gptq", "gptq-v2", "gptq-p", "awq", "auto-round"), quantization(group_size=96)),
    ("group 0", ("gptq", "awq", "auto-round"), quantization(group_size=0)),
    ("group huge", ("gptq", "awq", "auto-round"), quantization(group_size=2**62)),
    ("group a float", ("gptq", "awq", "auto-round"), quantization(group_size=64.0)),
    ("sym, zeros differ", ("gptq-asym", "gptq-v2"), quantization(sym=True)),
    ("sym, v1 read as v2", ("gptq",), quantization(checkpoint_format="gptq_v2")),
    ("zero_point false", ("awq",), quantization(zero_point=False)),
    ("layout unknown", ("gptq",), quantization(checkpoint_format="evil")),
    ("version of gemv", ("awq",), quantization(version="gemv")),
    ("packing unknown", ("auto-round",), quantization(packing_format="evil")),
    ("packing of awq", ("auto-round",), quantization(packing_format="auto_round:auto_awq")),
    ("method awq", ("gptq", "gptq-asym"), quantization(quant_method="awq")),
    ("method gptq", ("awq",), quantization(quant_method="gptq")),
    ("method fp8", ("gptq", "awq", "ct-int4", "nvfp4", "nf4"), quantization(quant_method="fp8")),
    ("method modelopt", ("gptq", "ct-nvfp4", "fp8"), quantization(quant_method="modelopt")),
    ("method bitsandbytes", ("gptq", "awq", "nvfp4", "ct-fp8"), quantization(quant_method="bitsandbytes")),
    ("method compressed-tensors", ("gptq", "fp8", "nvfp4"), quantization(quant_method="compressed-tensors")),
    ("method unknown", tuple(MADE), quantization(quant_method="evil")),
    ("no config, codes on disk", tuple(MADE), lambda f: [
        edit_config(f, lambda c: c.pop("quantization_config")), *(p.unlink() for p in f.glob("*quant*_config.json"))]),
    ("method missing", ("fp8", "ct-int4", "ct-nvfp4", "nf4"), lambda f: edit_config(
        f, lambda c: c["quantization_config"].pop("quant_method"))),
    ("excluded, stored as codes", ("gptq", "awq", "fp8", "ct-int4", "ct-nvfp4", "nvfp4", "mxfp8", "nf4"), also(Q)),
    ("covered, stored dense", ("ct-int4", "ct-fp8", "ct-nvfp4", "ct-mxfp4", "nvfp4", "mo-fp8", "mxfp8"), dense),
    ("num_bits 8", ("ct-int4", "ct-asym", "ct-nvfp4", "ct-mxfp4"), weights(num_bits=8)),
    ("num_bits 4", ("ct-fp8",), weights(num_bits=4)),
    ("num_bits 99", ("ct-int4", "ct-fp8"), weights(num_bits=99)),
    ("num_bits null", ("ct-int4", "ct-fp8"), weights(num_bits=None)),
    ("group_size 32", ("ct-int4", "ct-asym", "ct-nvfp4"), weights(group_size=32)),
    ("group_size 16", ("ct-mxfp4",), weights(group_size=16)),
    ("group_size 48", ("ct-int4", "ct-asym"), weights(group_size=48)),
    ("group_size 96, as many groups", ("ct-int4", "ct-asym"), weights(group_size=96)),
    ("group_size -64", ("ct-int4",), weights(group_size=-64)),
    ("strategy channel", ("ct-int4", "ct-asym"), weights(strategy="channel", group_size=None)),
    ("strategy tensor", ("ct-int4", "ct-fp8"), weights(strategy="tensor", group_size=None)),
    ("strategy unknown", ("ct-int4", "ct-fp8"), weights(strategy="evil")),
    ("strategy block", ("ct-fp8",), weights(strategy="block", block_structure=[16, 16])),
    ("type float", ("ct-int4", "ct-asym"), weights(type="float")),
    ("type int", ("ct-fp8", "ct-nvfp4", "ct-mxfp4"), weights(type="int")),
    ("symmetric, zeros stored", ("ct-asym",), weights(symmetric=True)),
    ("asymmetric, no zeros", ("ct-int4",), weights(symmetric=False)),
    ("actorder without g_idx", ("ct-int4",), weights(actorder="group")),
    ("static inputs without scales", ("ct-fp8",), quantization(
        "config_groups", "group_0", "input_activations", dynamic=False, strategy="tensor")),
    ("groups are a list", ("ct-int4",), quantization(config_groups=[])),
    ("groups are none", ("ct-int4",), quantization(config_groups={})),
    ("targets are no list", ("ct-int4",), quantization("config_groups", "group_0", targets=3)),
    ("weights are null", ("ct-int4",), quantization("config_groups", "group_0", weights=None)),
    ("ignore is no list", ("ct-int4", "nvfp4"), quantization(ignore=3)),
    ("a broken regex", ("ct-int4",), quantization(ignore=["re:(("])),
    ("quant_algo FP8", ("nvfp4",), quantization(quant_algo="FP8", config_groups=None)),
    ("quant_algo NVFP4", ("mo-fp8",), quantization(quant_algo="NVFP4", config_groups=None)),
    ("quant_algo unknown", ("nvfp4", "mo-fp8"), quantization(quant_algo="EVIL", config_groups=None)),
    ("quant_algo no string", ("nvfp4",), quantization(quant_algo=[1], config_groups=None)),
    ("block 64", ("fp8",), quantization(weight_block_size=[64, 64])),
    ("block of one", ("fp8",), quantization(weight_block_size=[128])),
    ("block 0", ("fp8",), quantization(weight_block_size=[0, 128])),
    ("no block, scales in blocks", ("fp8",), quantization(weight_block_size=None)),
    ("static without scales", ("fp8",), quantization(activation_scheme="static")),
    ("fmt unknown", ("fp8",), quantization(fmt="e9m9")),
    ("fp4 for nf4", ("nf4",), quantization(bnb_4bit_quant_type="fp4")),
    ("8 bit for nf4", ("nf4",), quantization(load_in_4bit=False, load_in_8bit=True)),
    ("codes too wide", ("gptq", "gptq-p", "awq", "auto-round"), stored(".qweight", wide)),
    ("codes too wide", ("ct-int4", "ct-nvfp4", "ct-mxfp4"), stored(".weight_packed", wide)),
    ("codes too wide", ("nvfp4", "mxfp8", "mo-fp8", "ct-fp8", "fp8"), stored(".weight", wide)),
    ("codes of floats", ("gptq", "awq"), stored(".qweight", lambda t: t.float())),
    ("codes of int64", ("gptq", "awq"), stored(".qweight", lambda t: t.long())),
    ("codes of int8", ("fp8", "mxfp8", "mo-fp8"), stored(".weight", lambda t: t.view(torch.int8))),
    ("scales of int32", ("gptq", "awq", "auto-round"), stored(".scales", lambda t: t.int())),
    ("scales of float64", ("gptq", "awq", "auto-round"), stored(".scales", lambda t: t.double())),
    ("scales of float64", ("ct-int4", "ct-fp8", "mo-fp8", "ct-nvfp4"), stored(".weight_scale", lambda t: t.double())),
    ("scales of float32", ("ct-nvfp4", "nvfp4", "mxfp8", "ct-mxfp4"), stored(".weight_scale", lambda t: t.float())),
    ("scales of int8", ("mxfp8", "ct-mxfp4"), stored(".weight_scale", lambda t: t.view(torch.int8))),
    ("scales turned", ("ct-nvfp4", "nvfp4", "mxfp8", "ct-int4"), stored(".weight_scale", lambda t: t.T)),
    ("scales NaN", ("mxfp8", "ct-mxfp4"), stored(".weight_scale", value(255))),
    ("scales NaN", ("nvfp4", "ct-nvfp4", "mo-fp8", "ct-fp8"), stored(".weight_scale", value(float("nan")))),
    ("scales negative", ("nvfp4", "ct-nvfp4", "mo-fp8", "ct-fp8"), stored(".weight_scale", value(-1))),
    ("scales NaN", ("nf4",), stored(".weight.absmax", value(float("nan")))),
    ("scales zero", ("nf4",), stored(".weight.absmax", value(0))),
    ("a code map of its own", ("nf4",), stored(".weight.quant_map", lambda t: t.flip(0))),
    ("a code map with NaN", ("nf4",), stored(".weight.quant_map", value(float("nan")))),
    ("outer scale 0", ("ct-nvfp4",), stored(".weight_global_scale", value(0))),
    ("outer scale NaN", ("ct-nvfp4",), stored(".weight_global_scale", value(float("nan")))),
    ("outer scale 0", ("nvfp4",), stored(".weight_scale_2", value(0))),
    ("outer scale negative", ("nvfp4",), stored(".weight_scale_2", value(-1))),
    ("outer scale apart", ("ct-nvfp4",), stored(".weight_global_scale", lambda t: t * 3)),
    ("outer scale apart", ("nvfp4",), stored(".weight_scale_2", lambda t: t * 3)),
    ("weight_shape swapped", ("ct-int4",), stored(".weight_shape", lambda t: t * torch.tensor([2, 1]))),
    ("weight_shape narrow", ("ct-int4",), stored(".weight_shape", lambda t: t - torch.tensor([0, 1]))),
    ("weight_shape wide", ("ct-int4",), stored(".weight_shape", lambda t: t + 2**40)),
    ("weight_shape negative", ("ct-int4",), stored(".weight_shape", lambda t: -t)),
    ("weight_shape of floats", ("ct-int4",), stored(".weight_shape", lambda t: t.float() + 0.5)),
    ("weight_shape of one", ("ct-int4",), stored(".weight_shape", lambda t: t[:1])),
    ("weight_shape missing", ("ct-int4",), drop(".weight_shape")),
    ("g_idx past the groups", ("gptq", "gptq-asym", "gptq-v2", "gptq-p"), stored(".g_idx", at(3, 9))),
    ("g_idx negative", ("gptq", "gptq-v2"), stored(".g_idx", at(3, -1))),
    ("g_idx uneven", ("gptq", "gptq-v2"), stored(".g_idx", at(3, 1))),
    ("g_idx short", ("gptq", "gptq-v2"), stored(".g_idx", lambda t: t[:64])),
    ("g_idx of floats", ("gptq", "gptq-v2"), stored(".g_idx", lambda t: t.float())),
    ("desc_act without g_idx", ("gptq", "gptq-v2", "gptq-p"), lambda f: [
        quantization(desc_act=True)(f), drop(".g_idx")(f)]),
    ("desc_act no bool", ("gptq",), quantization(desc_act="maybe")),
    ("zeros short", ("gptq-asym", "awq"), stored(".qzeros", lambda t: t[:1])),
    ("zeros missing", ("gptq-asym", "awq", "gptq-v2"), drop(".qzeros")),
    ("zeros missing", ("ct-asym",), drop(".weight_zero_point")),
    ("zeros of int8", ("ct-asym",), stored(".weight_zero_point", lambda t: t.to(torch.int8))),
    ("dynamic no object", ("gptq",), quantization(dynamic=[1])),
    ("dynamic of a broken regex", ("gptq",), quantization(dynamic={"+:((": {"bits": 8}})),
    ("two dialects", ("gptq",), lambda f: edit_config(f, lambda c: c.update(compression_config={"format": "dense"}))),
    ("another file disagrees", ("gptq",), lambda f: (f / "quantize_config.json").write_text(
        '{"quant_method": "awq", "bits": 4, "group_size": 64}')),
    ("another file disagrees", ("nvfp4",), lambda f: (f / "hf_quant_config.json").write_text(
        '{"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}')),
]  # fmt: skip
CASES = [(label, key, lie) for label, keys, lie in LIES for key in keys]


def copied(path: Path, to: Path) -> Path:
    to.mkdir()
    for file in path.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    (to / "fewbit_manifest.json").unlink()
    return to


# what the codecs do not see yet: (label, dialect)
@pytest.mark.parametrize(("label", "key", "lie"), CASES, ids=[f"{key}: {label}" for label, key, _ in CASES])
def test_lies(made: Any, tmp_path: Path, label: str, key: str, lie: Lie) -> None:
    path = copied(made(key), tmp_path / "x")
    lie(path)
    errors = [f for f in fewbit.verify(path) if f.severity == "error"]
    assert errors
    with pytest.raises(FewbitError):
        fewbit.load(path)


def test_siblings_of_different_formats(made: Any, tmp_path: Path) -> None:
    """Each runs here as it is, so it is a warning; engines that fuse them refuse the file."""
    from safetensors.torch import load_file

    path = copied(made("gptq"), tmp_path / "x")
    fewbit.convert(made("gptq").parent / "base", tmp_path / "wide", "gptq", requantize="int8-g64")
    other = load_file(tmp_path / "wide" / "model.safetensors")
    edit(path, lambda t: t.update({name: tensor for name, tensor in other.items() if name.startswith(f"{Q}.")}))
    assert [f for f in fewbit.verify(path) if f.severity == "error"]
    quantization(dynamic={"-:.*lm_head": {}, f"+:{Q}": {"bits": 8}})(path)
    (path / "quantize_config.json").unlink()
    found = {f.name: f.severity for f in fewbit.verify(path)}
    assert found.get("sibling-formats") == "warning" and "error" not in found.values()


@pytest.mark.parametrize("key", MADE)
def test_sound(made: Any, key: str) -> None:
    assert [f for f in fewbit.verify(made(key)) if f.severity == "error"] == []
