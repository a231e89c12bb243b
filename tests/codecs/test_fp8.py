"""quant_method fp8: three families by one name, each read as it was meant, and what is none of them refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit import codecs
from fewbit.codecs.codec import Located
from fewbit.errors import CheckpointError, SpecError, UnsupportedError
from fewbit.quant.elements import E4M3, E5M2, E8M0, F32
from fewbit.quant.formats import FORMATS, TENSOR_FP8, TOKEN_FP8
from fewbit.quant.qtensor import Quantized
from fewbit.quant.reference import decode, encode, linear
from fewbit.quant.spec import Format, QuantSpec, Scale, spec
from tests.codecs.common import check, filled
from tests.codecs.roundtrip import NAME, accepted, random_weight

CODEC, ROWS = codecs.CODECS["fp8"], codecs.CODECS["fbgemm-fp8"]
WHOLE = spec(E4M3, (F32, 0, 0))
POWERS = spec(E4M3, (E8M0, 1, 128), rule="mx-ceil", dynamic=1)
MORE = {
    "autofp8 dynamic": Format(WHOLE, spec(E4M3, (F32, 0, 0), dynamic=1)),
    "deepseek ue8m0": Format(spec(E4M3, (E8M0, 128, 128), rule="mx-ceil"), POWERS),
    "deepseek ue8m0 in F32": Format(spec(E4M3, (F32, 128, 128)), POWERS),
    "gptqmodel block": Format(spec(E4M3, (F32, 64, 32))),
}


def rows() -> list[tuple[str, Format]]:
    assert CODEC.fit
    return [*accepted(CODEC), *((name, CODEC.fit(form)) for name, form in MORE.items())]


def test_write_then_read_is_identity(tmp_path: Path) -> None:
    names = {name for name, _ in rows()}
    assert {"fp8-tensor-static", "fp8-block", "fp8-channel-a16", "fp8-tensor-a16", "fp8-block-a16"} <= names
    for name, form in rows():
        for n, k in ((128, 256), (37, 160)):
            try:
                files = check(CODEC, filled(form, n, k), tmp_path)
            except AssertionError as error:
                raise AssertionError(f"{name} of {n} x {k}: {error}") from error
            assert files["quantization_config"]["quant_method"] == "fp8"


def test_the_same_bytes_by_two_names_mean_opposites() -> None:
    """weight_scale_inv multiplies in DeepSeek's files and divides in gptqmodel's."""
    weight, scale = random_weight(256, 256).to(torch.float8_e4m3fn), torch.full((2, 2), 4.0)
    tensors = {".weight": weight, ".weight_scale_inv": scale}
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    deepseek = form_of({**blocks, "activation_scheme": "dynamic"})
    gptqmodel = form_of({**blocks, "weight_scale_method": "block", "weight_scale_semantics": "inverse"})
    assert torch.equal(decode(CODEC.read(deepseek, tensors).weight), weight.float() * 4)
    assert torch.equal(decode(CODEC.read(gptqmodel, tensors).weight), weight.float() / 4)
    assert gptqmodel.act is None and deepseek.act is not None and deepseek.act.scales[0].block == (1, 128)


def form_of(config: dict[str, Any], name: str = NAME) -> Format:
    form = CODEC.plan({"quant_method": "fp8", **config}).for_module(name)[0]
    assert form is not None
    return form


FORMS: list[tuple[dict[str, Any], QuantSpec, QuantSpec | None]] = [
    ({"activation_scheme": "static"}, WHOLE, TENSOR_FP8),
    ({"activation_scheme": "dynamic"}, WHOLE, spec(E4M3, (F32, 0, 0), dynamic=1)),
    ({"activation_scheme": "dynamic", "fmt": "e5m2"}, spec(E5M2, (F32, 0, 0)), spec(E4M3, (F32, 0, 0), dynamic=1)),
    ({"weight_block_size": [128, 128]}, spec(E4M3, (F32, 128, 128)), spec(E4M3, (F32, 1, 128), dynamic=1)),
    ({"weight_block_size": [128, 128], "scale_fmt": "ue8m0"}, spec(E4M3, (F32, 128, 128)), POWERS),
    ({"weight_block_size": [64, 32]}, spec(E4M3, (F32, 64, 32)), spec(E4M3, (F32, 1, 32), dynamic=1)),
    ({"weight_block_size": [64, 32], "activation_scheme": "static"}, spec(E4M3, (F32, 64, 32)), TENSOR_FP8),
    ({"weight_scale_method": "row"}, QuantSpec(E4M3, (Scale(F32, (1, 0), "div"),)), None),
    ({"weight_scale_semantics": "inverse"}, QuantSpec(E4M3, (Scale(F32, (1, 0), "div"),)), None),
    ({"weight_scale_method": "tensor", "format": "float8_e5m2"}, QuantSpec(E5M2, (Scale(F32, (0, 0), "div"),)), None),
]


@pytest.mark.parametrize(("config", "weight", "act"), FORMS)
def test_configs(config: dict[str, Any], weight: QuantSpec, act: QuantSpec | None) -> None:
    assert form_of(config) == Format(weight, act)


def test_whole_inputs_share_one_scale() -> None:
    """`dynamic` as its paper has it: a token in a batch of larger ones is rounded coarsely."""
    assert CODEC.fit and CODEC.write
    form = CODEC.fit(MORE["autofp8 dynamic"])
    q = filled(form)
    x = random_weight(2, 256, seed=3) * torch.tensor([[1.0], [1e-6]])
    scale = x.abs().amax() / 448
    rounded = (x / scale).to(torch.float8_e4m3fn).float() * scale
    assert torch.allclose(linear(x, q), rounded @ decode(q.weight).T, atol=1e-5)


def test_scales_may_be_bytes_or_floats() -> None:
    """DeepSeek's ue8m0 files keep powers of two as F8_E8M0 or as F32; transformers has other names for AutoFP8's."""
    form = form_of({"weight_block_size": [128, 128], "activation_scheme": "dynamic", "scale_fmt": "ue8m0"})
    weight = random_weight(128, 256).to(torch.float8_e4m3fn)
    floats = torch.tensor([[0.25, 8.0]])
    as_bytes = floats.to(torch.float8_e8m0fnu)
    a, b = (CODEC.read(form, {".weight": weight, ".weight_scale_inv": s}) for s in (floats, as_bytes))
    assert torch.equal(decode(a.weight), decode(b.weight)) and b.format.weight.scales[0].element == E8M0
    static = form_of({"activation_scheme": "static"})
    scalar = torch.tensor(0.5)
    mine = {".weight": weight, ".weight_scale": scalar, ".input_scale": scalar}
    theirs = {".weight": weight, ".weight_scale_inv": scalar, ".activation_scale": scalar.bfloat16()}
    assert torch.equal(decode(CODEC.read(static, mine).weight), decode(CODEC.read(static, theirs).weight))
    assert CODEC.read(static, theirs).act["scale0"].item() == 0.5


IGNORED = ["lm_head", "gate", "model.layers.0.self_attn", "model.layers.*.mlp.shared", "re:.*\\.visual\\..*"]
NAMES = {
    "lm_head": False, "model.layers.3.mlp.gate": False, "model.layers.3.mlp.gate_proj": True,
    "model.layers.0.self_attn.q_proj": False, "model.layers.1.self_attn.q_proj": True,
    "model.layers.10.mlp.shared.up_proj": False, "model.visual.proj": False, "model.layers.3.mlp.experts.1.w1": True,
}  # fmt: skip


@pytest.mark.parametrize("key", ["ignored_layers", "modules_to_not_convert"])
def test_ignored_names(key: str) -> None:
    plan = CODEC.plan({"quant_method": "fp8", "activation_scheme": "dynamic", key: IGNORED})
    for name, quantized in NAMES.items():
        form, rule = plan.for_module(name)
        assert (form is not None) == quantized, name
        assert rule is not None and (quantized or key in rule.where)


def test_gptqmodel_rules() -> None:
    dynamic = {"-:.*lm_head": {}, "+:.*down_proj": {"weight_scale_method": "block", "weight_block_size": [64, 64]}}
    plan = CODEC.plan({"weight_scale_method": "row", "dynamic": dynamic})
    assert plan.for_module("lm_head")[0] is None
    down, up = (plan.for_module(f"model.layers.0.mlp.{name}")[0] for name in ("down_proj", "up_proj"))
    assert down and up and down.weight.scales[0].block == (64, 64) and up.weight.scales[0].block == (1, 0)


def test_cache_and_claims() -> None:
    assert CODEC.config and CODEC.fit
    base = {"quant_method": "fp8", "activation_scheme": "static"}
    assert CODEC.plan(base).kv is None and CODEC.plan({**base, "kv_cache_scheme": "static"}).kv == WHOLE
    form = CODEC.fit(FORMATS["fp8-tensor-static"])
    assert CODEC.config({NAME: form}, [], WHOLE)["quantization_config"]["kv_cache_scheme"] == "static"
    for method, codec in (("fp8", CODEC), ("fbgemm_fp8", ROWS)):
        assert codecs.claimant(Located({"quant_method": method}, "config.json: quantization_config"))[0] is codec


def test_fbgemm_rows() -> None:
    config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    plan = ROWS.plan(config)
    form = plan.for_module(NAME)[0]
    assert form and form.act == TOKEN_FP8 and plan.for_module("lm_head")[0] is None
    weight = random_weight().to(torch.float8_e4m3fn)
    scale = torch.rand(64, 1) + 0.5
    back = ROWS.read(form, {".weight": weight, ".weight_scale": scale})
    assert torch.equal(decode(back.weight), weight.float() * scale)
    assert ROWS.fit is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no scheme": ({}, "must be static or dynamic, found None"),
    "another scheme": ({"activation_scheme": "sometimes"}, "must be static or dynamic"),
    "mxfp4 experts": ({"activation_scheme": "dynamic", "store_dtype": "mxfp4"}, "store_dtype"),
    "fp4 experts": ({"weight_block_size": [128, 128], "expert_dtype": "fp4"}, "expert_dtype"),
    "half a block": ({"weight_block_size": [128]}, "two positive numbers"),
    "another element": ({"activation_scheme": "dynamic", "fmt": "e3m4"}, "known: e4m3"),
    "another method": ({"weight_scale_method": "diagonal"}, "known: tensor, row, block"),
    "a name that is none": ({"activation_scheme": "dynamic", "ignored_layers": [4]}, "must be a string"),
    "a pattern that is none": ({"activation_scheme": "dynamic", "ignored_layers": ["re:("]}, "regular expression"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_configs_that_are_refused(name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises((CheckpointError, UnsupportedError, SpecError), match=message):
        CODEC.plan({"quant_method": "fp8", **changes})


STATIC, BLOCK = {"activation_scheme": "static"}, {"weight_block_size": [128, 128]}
LIES: list[tuple[dict[str, Any], dict[str, Tensor], str]] = [
    (STATIC, {}, "weight_scale_inv is missing"),
    (STATIC, {".weight_scale": torch.ones(())}, "input_scale is missing: activation_scheme = static"),
    (STATIC, {".weight_scale": torch.ones(64, 1)}, r"want \[1, 1\] scales"),
    (STATIC, {".weight_scale": torch.ones((), dtype=torch.int32)}, "want F32, F16 or BF16"),
    (STATIC, {".weight_scale": torch.ones(()), ".weight": torch.ones(4, 4)}, "float8_e4m3fn matrix"),
    (STATIC, {".weight_scale": torch.ones(()), ".input_scale": torch.ones(256)}, r"\.input_scale: want \[1, 1\]"),
    (BLOCK, {".weight_scale_inv": torch.ones(2, 1)}, r"one for each 128 x 128 of \[64, 256\]"),
    (BLOCK, {".weight_scale_inv": torch.ones(())}, r"want \[1, 2\] scales"),
    ({"weight_scale_method": "row"}, {".weight_scale": torch.ones(64)}, "weight_scale_inv is missing"),
    ({"weight_scale_method": "row"}, {".weight_scale_inv": torch.ones(32)}, r"want \[64, 1\]"),
]


@pytest.mark.parametrize("case", range(len(LIES)))
def test_tensors_that_lie(case: int) -> None:
    config, tensors, message = LIES[case]
    with pytest.raises(CheckpointError, match=message):
        CODEC.read(form_of(config), {".weight": random_weight().to(torch.float8_e4m3fn), **tensors})


@pytest.mark.parametrize("row", ["fp8-tensor", "fp8-channel", "fp8-1x128", "int8-channel", "mxfp8", "fp8-e5m2-tensor"])
def test_fit_says_why_not(row: str) -> None:
    """One scale per token is not what `dynamic` means here."""
    assert CODEC.fit
    with pytest.raises(UnsupportedError) as refusal:
        CODEC.fit(FORMATS[row])
    assert refusal.value.reasons


def test_one_format_for_the_whole_model() -> None:
    assert CODEC.fit and CODEC.config and CODEC.write
    forms = {f"{i}": CODEC.fit(FORMATS[name]) for i, name in enumerate(("fp8-tensor-static", "fp8-block"))}
    with pytest.raises(UnsupportedError, match="one for the whole model"):
        CODEC.config(forms, [], None)
    with pytest.raises(UnsupportedError, match="a cache of"):
        CODEC.config({"0": forms["0"]}, [], spec(E4M3, (F32, 1, 0)))
    form = forms["0"]
    with pytest.raises(UnsupportedError, match="calibrate"):
        CODEC.write(Quantized(form, encode(random_weight(), form.weight)))
