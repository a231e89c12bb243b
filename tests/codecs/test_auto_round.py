"""AutoRound: one config over the tensors of four dialects, and its rules on names."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit import codecs
from fewbit.codecs.codec import Located
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.elements import E2M1, E4M3, E5M2, E8M0, F32
from fewbit.quant.formats import FORMATS
from fewbit.quant.reference import decode
from fewbit.quant.spec import Format
from tests.codecs.roundtrip import accepted, check_round_trip, encoded, random_weight

BASE: dict[str, Any] = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "data_type": "int"}
NAME = "model.layers.1.mlp.down_proj"
MAIN = codecs.CODECS["auto-round"]


def located(**changes: Any) -> Located:
    return Located(BASE | changes, "config.json: quantization_config")


PACKINGS = [
    ({}, "auto-round"),
    ({"packing_format": "auto_round:auto_gptq"}, "auto-round"),
    ({"packing_format": "auto_round"}, "auto-round-v2"),
    ({"packing_format": "auto_round:gptqmodel"}, "auto-round-v2"),
    ({"backend": "autoround:exllamav2"}, "auto-round-v2"),
    ({"packing_format": "auto_round:auto_awq"}, "auto-round-awq"),
    ({"packing_format": "auto_round:fp8_static"}, "auto-round-float"),
    ({"packing_format": "auto_round:llm_compressor"}, "auto-round-float"),
    ({"quant_method": "intel/auto-round"}, "auto-round"),
]


@pytest.mark.parametrize(("changes", "dialect"), PACKINGS)
def test_packing_says_whose_tensors(changes: dict[str, Any], dialect: str) -> None:
    assert codecs.claimant(located(**changes))[0].name == dialect


def test_write_then_read_is_identity() -> None:
    rows = list(accepted(MAIN))
    assert {"int4-g128", "int8-g32", "int3-g128", "int2-channel"} <= {name for name, _ in rows}
    for _, form in rows:
        check_round_trip(MAIN, encoded(form))


PACKED = [
    ("gptq", "auto_round:auto_gptq", "int4-g128"),
    ("gptq-v2", "auto_round", "int4-g128-asym"),
    ("awq", "auto_round:auto_awq", "int4-g128-asym"),
]


@pytest.mark.parametrize(("writer", "packing", "row"), PACKED)
def test_reads_what_other_dialects_write(writer: str, packing: str, row: str) -> None:
    codec = codecs.CODECS[writer]
    assert codec.fit and codec.write
    q = encoded(codec.fit(FORMATS[row]))
    tensors = {ending: t for ending, t in codec.write(q).items() if ending != ".g_idx"}
    reader, _ = codecs.claimant(located(packing_format=packing, sym="asym" not in row))
    form, _ = reader.plan(BASE | {"packing_format": packing, "sym": "asym" not in row}).for_module(NAME)
    assert form is not None
    back = reader.read(form, tensors)
    assert back.format == q.format and torch.equal(decode(back.weight), decode(q.weight))


def bits_of(form: Format | None) -> tuple[int, int] | None:
    return None if form is None else (int(form.weight.element.bits), form.weight.scales[0].block[1])


EXTRA = {
    "model.layers.0.self_attn.v_proj": {"bits": 16},
    NAME: {"bits": 8, "group_size": 64},
    r".*layers\.1\..*": {"bits": 2},
    r"mlp\.up.*": {"group_size": -1},
    "lm_head": {"bits": 8},
}
NAMES = [
    ({"extra_config": EXTRA}, "model.layers.0.self_attn.v_proj", None),
    ({"extra_config": EXTRA}, NAME, (8, 64)),
    ({"extra_config": EXTRA}, "model.layers.1.mlp.gate_proj", (2, 128)),
    ({"extra_config": EXTRA}, "model.layers.0.mlp.up_proj", (4, 0)),
    ({"extra_config": EXTRA}, "model.layers.0.mlp.gate_proj", (4, 128)),
    ({"extra_config": EXTRA, "block_name_to_quantize": "model.layers"}, "lm_head", (8, 128)),
    ({"block_name_to_quantize": "model.layers"}, "lm_head", None),
    ({"block_name_to_quantize": "model.layers"}, NAME, (4, 128)),
    ({"block_name_to_quantize": "visual.blocks,model.layers"}, NAME, (4, 128)),
    ({"block_name_to_quantize": [["model.layers.1"], ["model.layers.2"]]}, NAME, (4, 128)),
    ({"block_name_to_quantize": [["model.layers.2"]]}, NAME, None),
    ({"modules_to_not_convert": ["down_proj"]}, NAME, None),
]


@pytest.mark.parametrize(("changes", "name", "want"), NAMES)
def test_plan(changes: dict[str, Any], name: str, want: tuple[int, int] | None) -> None:
    assert bits_of(MAIN.plan(BASE | changes).for_module(name)[0]) == want


def test_config_reads_back() -> None:
    assert MAIN.fit and MAIN.config
    rows = {"model.layers.0.mlp.up_proj": "int4-g128", "model.layers.1.mlp.up_proj": "int4-g128", NAME: "int8-g64"}
    formats = {name: MAIN.fit(FORMATS[row]) for name, row in rows.items()}
    config = MAIN.config(formats, ["model.layers.0.mlp.down_proj"], None)["quantization_config"]
    plan = MAIN.plan(config)
    assert {name: plan.for_module(name)[0] for name in formats} == formats
    assert plan.for_module("model.layers.0.mlp.down_proj")[0] is None and plan.for_module("lm_head")[0] is None


CONFIG_LIES = [
    ({"bits": "4"}, CheckpointError, "bits"),
    ({"bits": 9}, CheckpointError, "bits"),
    ({"group_size": -2}, CheckpointError, "group_size"),
    ({"extra_config": {"a": 4}}, CheckpointError, "extra_config"),
    ({"act_bits": 8}, UnsupportedError, "integer activations"),
    ({"data_type": "mx_int"}, UnsupportedError, "mx_int"),
    ({"data_type": "nvfp4_v2", "group_size": 16}, UnsupportedError, "nvfp4_v2"),
    ({"rotation_config": {"type": "hadamard"}}, UnsupportedError, "rotations"),
    ({"data_type": "fp", "bits": 8, "group_size": [128]}, CheckpointError, "group_size"),
]


@pytest.mark.parametrize(("changes", "error", "message"), CONFIG_LIES)
def test_lies_in_config(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MAIN.plan(BASE | changes)


FP8 = {"packing_format": "auto_round:fp8", "data_type": "fp", "bits": 8, "act_bits": 8}
NV = {"packing_format": "auto_round:llm_compressor", "data_type": "nv_fp", "group_size": 16}
MX = {"packing_format": "auto_round:llm_compressor", "data_type": "mx_fp", "group_size": 32}


def bytes_of(n: int, k: int) -> Tensor:
    return torch.randint(0, 120, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def e2m1(packed: Tensor) -> Tensor:
    """Low nibble first, by the table of FP4."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    return table[torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()]


def wide(scale: Tensor, rows: int, cols: int) -> Tensor:
    return scale.float().repeat_interleave(rows, 0).repeat_interleave(cols, 1)


def float_cases() -> dict[str, tuple[dict[str, Any], dict[str, Tensor], Tensor, Any]]:
    """Name -> (config, tensors, what they decode to, (element, scales, act element))."""
    fp8 = random_weight(128, 256).to(torch.float8_e4m3fn)
    e5 = random_weight(64, 64).to(torch.float8_e5m2)
    rows = (torch.rand(128, 1) + 0.5).bfloat16()
    blocks = (torch.rand(1, 2) + 0.5).bfloat16()
    one, packed = torch.tensor([0.5]).bfloat16(), bytes_of(8, 32)
    powers = torch.tensor([[120, 130]] * 8, dtype=torch.uint8)
    halves = (torch.rand(8, 4) + 0.5).to(torch.float8_e4m3fn)
    outer = torch.tensor([3.0])
    per_power = wide(torch.exp2(powers.float() - 127), 1, 32)
    return {
        "fp8 rows, static": (
            FP8 | {"group_size": -1, "act_dynamic": False},
            {".weight": fp8, ".weight_scale": rows, ".input_scale": one},
            fp8.float() * rows.float(), (E4M3, 1, E4M3),
        ),
        "fp8 blocks": (
            FP8 | {"group_size": [128, 128], "act_group_size": 128, "act_dynamic": True},
            {".weight": fp8, ".weight_scale_inv": blocks},
            fp8.float() * wide(blocks, 128, 128), (E4M3, 1, E4M3),
        ),
        "fp8 whole": (
            FP8 | {"group_size": 0, "act_bits": 16},
            {".weight": fp8, ".weight_scale": one}, fp8.float() * 0.5, (E4M3, 1, None),
        ),
        "fp8 e5m2": (
            FP8 | {"group_size": 0, "act_bits": 16, "fmt": "e5m2"},
            {".weight": e5, ".weight_scale": one}, e5.float() * 0.5, (E5M2, 1, None),
        ),
        "mxfp4": (
            MX | {"act_bits": 4}, {".weight_packed": packed, ".weight_scale": powers},
            e2m1(packed) * per_power, (E2M1, 1, E2M1),
        ),
        "mxfp8": (
            MX | {"bits": 8, "act_bits": 16}, {".weight": fp8[:8, :64], ".weight_scale": powers},
            fp8[:8, :64].float() * per_power, (E4M3, 1, None),
        ),
        "nvfp4": (
            NV | {"act_bits": 4},
            {".weight_packed": packed, ".weight_scale": halves, ".weight_global_scale": outer,
             ".input_global_scale": torch.tensor([7.0])},
            e2m1(packed) * wide(halves, 1, 16) / 3.0, (E2M1, 2, E2M1),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("case", float_cases())
def test_floats(case: str) -> None:
    config, tensors, want, (element, levels, act) = float_cases()[case]
    codec, _ = codecs.claimant(located(**config))
    form, _ = codec.plan(BASE | config).for_module(NAME)
    assert form is not None
    q = codec.read(form, tensors)
    assert torch.allclose(decode(q.weight), want, rtol=1e-6, atol=0)
    assert q.weight.spec.element == element and len(q.weight.spec.scales) == levels
    assert (q.format.act.element if q.format.act else None) == act
    for ending in tensors:  # nothing of it may be missing
        with pytest.raises(CheckpointError):
            codec.read(form, {e: t for e, t in tensors.items() if e != ending})


def test_static_activations_are_carried() -> None:
    config, tensors, _, _ = float_cases()["nvfp4"]
    codec, _ = codecs.claimant(located(**config))
    form, _ = codec.plan(BASE | config).for_module(NAME)
    assert form is not None
    q = codec.read(form, tensors)
    assert q.format.act is not None and [s.element for s in q.format.act.scales] == [E4M3, F32]
    assert q.format.act.scales[1].op == "div" and q.act["scale1"].item() == 7.0
    assert FORMATS["mxfp4"].weight.scales[0].element == E8M0
