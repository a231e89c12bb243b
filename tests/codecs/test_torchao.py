"""torchao: its tensors taken apart, its nested config, and the names it gives."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit import codecs
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.reference import decode
from fewbit.quant.spec import Format
from tests.codecs.roundtrip import random_weight

AO = codecs.CODECS["torchao"]
ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
GROUP = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": 32}}
WHOLE = {"_type": "PerTensor", "_version": 1, "_data": {}}


def kind(name: str, version: int = 2, **data: Any) -> dict[str, Any]:
    return {"_type": name, "_version": version, "_data": data}


def enum(value: str) -> dict[str, str]:
    return {"_type": "MappingType", "_data": value}


def dtype(value: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": value}


def plan(config: Any, **more: Any) -> Any:
    return AO.plan({"quant_method": "torchao", "quant_type": {"default": config}} | more)


def form_of(config: Any) -> Format:
    form = plan(config).for_module("model.layers.0.q_proj")[0]
    assert form is not None
    return form


ASYM = kind("IntxWeightOnlyConfig", weight_dtype=dtype("int4"), granularity=GROUP, mapping_type=enum("ASYMMETRIC"))
SYM = kind("IntxWeightOnlyConfig", weight_dtype=dtype("int4"), granularity=GROUP, mapping_type=enum("SYMMETRIC"))
# config -> (bits, block, asymmetric, element of the input)
CONFIGS = [
    (kind("Int8WeightOnlyConfig", granularity=ROW), (8, (1, 0), False, None)),
    (kind("Int8WeightOnlyConfig", granularity=WHOLE), (8, (0, 0), False, None)),
    (kind("Int8WeightOnlyConfig", group_size=32), (8, (1, 32), False, None)),
    (kind("Int8DynamicActivationInt8WeightConfig", granularity=ROW), (8, (1, 0), False, "int8")),
    (ASYM, (4, (1, 32), True, None)),
    (SYM, (4, (1, 32), False, None)),
    (
        kind("Int8DynamicActivationIntxWeightConfig", weight_dtype=dtype("int3"), weight_granularity=GROUP,
             weight_mapping_type=enum("SYMMETRIC"), act_mapping_type=enum("ASYMMETRIC")),
        (3, (1, 32), False, "uint8"),
    ),
    (kind("Float8WeightOnlyConfig"), (8, (1, 0), False, None)),
    (kind("Float8DynamicActivationFloat8WeightConfig"), (8, (0, 0), False, "e4m3")),
    (kind("Float8DynamicActivationFloat8WeightConfig", granularity=[ROW, ROW]), (8, (1, 0), False, "e4m3")),
]  # fmt: skip


@pytest.mark.parametrize(("config", "want"), CONFIGS)
def test_configs(config: Any, want: tuple[int, tuple[int, int], bool, str | None]) -> None:
    form = form_of(config)
    weight = form.weight
    act = form.act.element.name if form.act else None
    assert (int(weight.element.bits), weight.scales[0].block, bool(weight.zeros), act) == want


def ints(asym: bool, n: int = 8, k: int = 64) -> tuple[dict[str, Tensor], Tensor]:
    """INT4 codes in groups of 32, and what they mean."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
    zeros = torch.randint(-8, 8, (n, 2), dtype=torch.int8, generator=generator) * asym
    scales = (random_weight(n, 2).abs() + 0.1).bfloat16()
    wide = [t.float().repeat_interleave(32, 1) for t in (zeros, scales)]
    tensors = {"._weight_qdata": codes, "._weight_scale": scales, "._weight_zero_point": zeros.contiguous()}
    return tensors, (codes.float() - wide[0]) * wide[1]


@pytest.mark.parametrize("asym", [False, True])
def test_integers(asym: bool) -> None:
    tensors, want = ints(asym)
    q = AO.read(form_of(ASYM if asym else SYM), tensors)
    assert torch.equal(decode(q.weight), want)


@pytest.mark.parametrize(("name", "held"), [("float8_e4m3fn", torch.float8_e4m3fn), ("float8_e5m2", torch.float8_e5m2)])
def test_floats(name: str, held: torch.dtype) -> None:
    codes, scale = random_weight(8, 64).to(held), random_weight(8, 1).abs()
    form = form_of(kind("Float8WeightOnlyConfig", weight_dtype=dtype(name)))
    q = AO.read(form, {"._weight_qdata": codes, "._weight_scale": scale})
    assert torch.equal(decode(q.weight), codes.float() * scale)


LIES = {
    "codes out of range": ("._weight_qdata", lambda t: t * 0 + 9, "range of 4 bits"),
    "codes of a wrong type": ("._weight_qdata", lambda t: t.int(), "int8"),
    "half the scales": ("._weight_scale", lambda t: t[:4], "scale"),
    "half the zeros": ("._weight_zero_point", lambda t: t[:4], "want 16 int8"),
    "a zero in a symmetric file": ("._weight_zero_point", lambda t: t + 1, "symmetric"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_in_tensors(lie: str) -> None:
    ending, change, message = LIES[lie]
    tensors, _ = ints(asym=False)
    with pytest.raises(CheckpointError, match=message):
        AO.read(form_of(SYM), tensors | {ending: change(tensors[ending])})


def test_zeros_declared_and_missing() -> None:
    tensors, _ = ints(asym=True)
    del tensors["._weight_zero_point"]
    with pytest.raises(CheckpointError, match="is missing"):
        AO.read(form_of(ASYM), tensors)


REFUSED = [
    kind("Int4WeightOnlyConfig", group_size=128),
    kind("Int8WeightOnlyConfig", version=1),
    kind("Int8WeightOnlyConfig", granularity={"_type": "PerAxis", "_data": {"axis": 1}}),
    "int8_weight_only",
]


@pytest.mark.parametrize("config", REFUSED)
def test_refuses(config: Any) -> None:
    with pytest.raises(UnsupportedError) as error:
        plan(config)
    assert error.value.reasons


def test_names() -> None:
    table = {"_default": SYM, "re:.*up_proj": None, "model.a": ASYM, "model.b.weight": None}
    found = plan(kind("FqnToConfig", version=1, fqn_to_config=table), modules_to_not_convert=["lm_head"])
    bits = {name: found.for_module(name)[0] for name in ("model.a", "model.b", "x.up_proj", "x.up_proj_2", "lm_head")}
    assert bits["model.a"].weight.zeros and not bits["x.up_proj_2"].weight.zeros
    assert bits["model.b"] is bits["x.up_proj"] is bits["lm_head"] is None
