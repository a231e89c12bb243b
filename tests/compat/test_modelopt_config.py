"""Configs of both forms, wildcards, and everything that is refused by name."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit.compat.modelopt as mtq
from fewbit.compat.insert import places, quantizers
from fewbit.compat.modelopt_config import rounding, rules
from fewbit.errors import RequestError, UnsupportedError
from fewbit.quant.elements import E2M1, E3M2, E4M3, E8M0, F32, INT4, INT8
from fewbit.quant.spec import QuantSpec, Scale, describe, spec
from tests.compat import small

NAMES = [
    "INT8_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG", "INT8_WEIGHT_ONLY_CFG", "FP8_DEFAULT_CFG",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG", "NVFP4_DEFAULT_CFG", "NVFP4_AWQ_LITE_CFG", "NVFP4_AWQ_CLIP_CFG",
    "NVFP4_AWQ_FULL_CFG", "NVFP4_SVDQUANT_DEFAULT_CFG", "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG",
    "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG", "NVFP4_FOUR_OVER_SIX_CFG", "W4A16_NVFP4_CFG", "W4A8_NVFP4_FP8_CFG",
    "NVFP4_MLP_WEIGHT_ONLY_CFG", "NVFP4_MLP_ONLY_CFG", "NVFP4_OMLP_ONLY_CFG", "NVFP4_EXPERTS_ONLY_CFG",
    "MXFP8_DEFAULT_CFG", "MXFP6_DEFAULT_CFG", "MXFP4_DEFAULT_CFG", "MXINT8_DEFAULT_CFG", "W4A8_MXFP4_FP8_CFG",
    "MXFP4_MLP_WEIGHT_ONLY_CFG", "MAMBA_MOE_FP8_AGGRESSIVE_CFG", "MAMBA_MOE_FP8_CONSERVATIVE_CFG",
    "MAMBA_MOE_NVFP4_AGGRESSIVE_CFG", "MAMBA_MOE_NVFP4_CONSERVATIVE_CFG", "FP8_KV_CFG", "FP8_AFFINE_KV_CFG",
    "NVFP4_KV_CFG", "NVFP4_AFFINE_KV_CFG", "NVFP4_KV_ROTATE_CFG", "NVFP4_FP8_MHA_CONFIG",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.folder(tmp_path_factory.mktemp("compat") / "base", num_hidden_layers=1)


def as_dict(config: Any) -> Any:
    """A preset in the form that configs had before lists."""
    out: dict[str, Any] = {}
    for entry in config["quant_cfg"]:
        name, parent = entry["quantizer_name"], entry.get("parent_class")
        cfg = entry.get("cfg", {"enable": entry.get("enable", True)})
        if parent is not None:
            out.setdefault(parent, {})[name] = cfg
        else:
            out["default" if name == "*" else name] = cfg
    return {"quant_cfg": out, "algorithm": config["algorithm"]}


def test_every_preset_has_its_name() -> None:
    assert set(NAMES) == set(mtq.PRESETS)
    for name in NAMES:
        assert getattr(mtq, name) is getattr(mtq, name) and name in dir(mtq)
        assert set(getattr(mtq, name)) == {"quant_cfg", "algorithm"}
    with pytest.raises(AttributeError, match="near: FP8_DEFAULT_CFG"):
        mtq.FP8_DEFAUT_CFG  # noqa: B018


@pytest.mark.parametrize("name", ["FP8_DEFAULT_CFG", "NVFP4_AWQ_LITE_CFG", "INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG"])
def test_both_forms_are_one(name: str, base: Path) -> None:
    config = getattr(mtq, name)
    first, second = (mtq.quantize(small.model(base), c, small.loop) for c in (config, as_dict(config)))
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys() and len(states[0]) > len(small.model(base).state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    assert torch.equal(small.logits(first), small.logits(second))


FORMATS = [
    ("weight", {"num_bits": 8, "axis": 0}, spec(INT8, (F32, 1, 0))),
    ("weight", {"num_bits": (4, 3), "axis": None}, spec(E4M3, (F32, 0, 0))),
    ("weight", {"num_bits": "e4m3"}, spec(E4M3, (F32, 0, 0))),
    ("weight", {"num_bits": [2, 1], "block_sizes": {-1: 32, "scale_bits": [8, 0], "type": "dynamic"}},
     spec(E2M1, (E8M0, 1, 32), rule="mx-ceil")),
    ("weight", {"num_bits": 4, "block_sizes": {"-1": 128, "type": "static"}}, spec(INT4, (F32, 1, 128))),
    ("weight", {"num_bits": (4, 3), "block_sizes": {-1: 128, -2: 64}}, spec(E4M3, (F32, 64, 128))),
    ("input", {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}}, spec(E4M3, (F32, 1, 0), dynamic=1)),
    ("input", {"num_bits": (4, 3), "type": "dynamic"}, spec(E4M3, (F32, 0, 0), dynamic=1)),
    ("input", {"num_bits": (3, 2), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
     spec(E3M2, (E8M0, 1, 32), rule="mx-ceil", dynamic=1)),
    ("cache", {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
     QuantSpec(E2M1, (Scale(E4M3, (1, 16), dynamic=True), Scale(F32, (0, 0))))),
]  # fmt: skip


@pytest.mark.parametrize(("role", "attributes", "want"), FORMATS, ids=lambda v: str(v)[:40])
def test_attributes_are_specs(role: Any, attributes: dict[str, Any], want: QuantSpec) -> None:
    (rule,) = rules({"quant_cfg": [{"quantizer_name": "*", "cfg": attributes}]})
    assert rounding(rule, role).spec == want, describe(want)


def entry(**attributes: Any) -> dict[str, Any]:
    return {"quant_cfg": [{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": (4, 3), **attributes}}]}


KV = {"*[kv]_bmm_quantizer": {"num_bits": (4, 3)}}
WRONG = [
    ({"quant_cfg": {"*wieght_quantizer": {"num_bits": 8}}}, RequestError, "matches no quantizer"),
    ({"quant_cfg": {"*weight_quantizer": {"num_bits": 8}, "*q_prj*": {"enable": False}}}, RequestError, "'\\*q_prj"),
    ({"quant_cfg": {"nn.Linaer": {"*weight_quantizer": {"num_bits": 8}}}}, RequestError, "matches no quantizer"),
    ({"quant_cfg": {"*lm_head*": {"enable": False}}}, RequestError, "no rule switches on"),
    ({"quant_cfg": {"*weight_quantizer": {"enable": True}}}, RequestError, "no rule before it says how"),
    ({"quant_cfg": {"*weight_quantizer": {"num_bit": 8}}}, RequestError, "unknown attribute num_bit"),
    ({"quant_cfg": {"*weight_quantizer": 8}}, RequestError, "want a dict of attributes"),
    ({"quant_cfg": [{"name": "*"}]}, RequestError, "want a dict with quantizer_name"),
    ({"quant_cfg": [{"quantizer_name": "*", "config": {}}]}, RequestError, "unknown key config"),
    ({"quant_cfg": "FP8"}, RequestError, "a dict or a list"),
    ({"quantization": {}}, RequestError, "want a dict with quant_cfg"),
    ("FP8_DEFAULT_CFG", RequestError, "want a dict with quant_cfg"),
    (entry() | {"algoritm": "max"}, RequestError, "unknown key algoritm"),
    (entry() | {"algorithm": "maxx"}, UnsupportedError, "algorithm 'maxx' is not known"),
    (entry() | {"algorithm": {"method": "awq_lite", "alpha": 1}}, RequestError, "unknown option alpha"),
    (entry(num_bits=(5, 3)), UnsupportedError, "num_bits"),
    (entry(num_bits=16), UnsupportedError, "num_bits"),
    (entry(axis=1), UnsupportedError, "axis"),
    (entry(axis=0, block_sizes={-1: 16}), RequestError, "exclude each other"),
    (entry(block_sizes={-3: 16}), RequestError, "block_sizes"),
    (entry(block_sizes={-1: 16, "size": 4}), RequestError, "block_sizes"),
    (entry(block_sizes={-1: 16, "scale_bits": (5, 2)}), UnsupportedError, "two levels"),
    (entry(unsigned=True), UnsupportedError, "unsigned"),
    (entry(calibrator="histogram"), UnsupportedError, "histogram"),
    (entry(type="fixed"), RequestError, "static or dynamic"),
    ({"quant_cfg": {"*output_quantizer": {"num_bits": 8}}}, UnsupportedError, "output_quantizer"),
    ({"quant_cfg": {"*input_quantizer": {"num_bits": 8}}}, RequestError, "give forward_loop"),
    ({"quant_cfg": KV}, RequestError, "give forward_loop"),
]


@pytest.mark.parametrize(("config", "kind", "text"), WRONG, ids=lambda v: str(v)[:50])
def test_what_is_refused(config: Any, kind: type[Exception], text: str, base: Path) -> None:
    config = {"algorithm": "max", **config} if isinstance(config, dict) else config
    with pytest.raises(kind, match=text):
        mtq.quantize(small.model(base), config)


def test_later_rules_win_and_a_switch_keeps_what_was_said(base: Path) -> None:
    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    config["quant_cfg"] += [
        {"quantizer_name": "*mlp*", "enable": False},
        {"quantizer_name": "*up_proj.input_quantizer", "enable": True},
        {"quantizer_name": "*up_proj.weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
        {"quantizer_name": "*o_proj*", "parent_class": "nn.Linear", "enable": False},
    ]
    found = quantizers(mtq.quantize(small.model(base), config, small.loop))
    on = {name: describe(q.spec) for name, q in found.items() if q.enabled and q.spec}
    path = "model.layers.0.mlp."
    assert on[path + "up_proj.weight_quantizer"] == "int8 x f32[row]"
    assert on[path + "up_proj.input_quantizer"] == "e4m3 x f32[tensor]"
    assert not any("gate_proj" in name or "o_proj" in name or "lm_head" in name for name in on)
    assert len(on) == 8
    config["quant_cfg"].append({"quantizer_name": "*up_proj*", "enable": True})
    with pytest.raises(RequestError, match=r"up_proj\.output_quantizer, and no rule before it"):
        mtq.quantize(small.model(base), config, small.loop)


def test_names_of_every_quantizer(base: Path) -> None:
    names = [p.names[0] for p in places(small.model(base))]
    for leaf in ("q_proj.weight_quantizer", "o_proj.input_quantizer", "k_bmm_quantizer", "q_proj.output_quantizer"):
        assert f"model.layers.0.self_attn.{leaf}" in names


def test_a_model_is_quantized_once(base: Path) -> None:
    made = mtq.quantize(small.model(base), mtq.MXFP8_DEFAULT_CFG)
    with pytest.raises(RequestError, match="quantized already"):
        mtq.quantize(made, mtq.MXFP8_DEFAULT_CFG)
