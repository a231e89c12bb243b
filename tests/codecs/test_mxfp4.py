"""gpt-oss's stacked MXFP4 experts and MiniMax's MXFP8: layout, rules, lies."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit import codecs
from fewbit.codecs.codec import Located
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.elements import E2M1, values
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import Quantized
from fewbit.quant.reference import decode, encode
from fewbit.quant.spec import Format
from tests.codecs.common import check, filled
from tests.codecs.roundtrip import NAME, accepted, layout, random_weight, to_meta

STACKED, ROWS = codecs.CODECS["mxfp4"], codecs.CODECS["mxfp8"]
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
KEPT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": KEPT}


def experts(e: int = 3, n: int = 8, k: int = 96) -> Quantized:
    form = FORMATS["mxfp4-a16"]
    return Quantized(form, encode(random_weight(e * n, k).view(e, n, k), form.weight))


def form_of(name: str = EXPERTS) -> Format:
    form = STACKED.plan(CONFIG).for_module(name)[0]
    assert form is not None
    return form


def test_experts_are_written_and_read() -> None:
    assert STACKED.write and STACKED.config
    assert {name for name, _ in accepted(STACKED)} == {"mxfp4-a16", "mxfp4-ggml"}
    q = experts()
    tensors = STACKED.write(q)
    assert layout(tensors) == {"_blocks": (torch.uint8, (3, 8, 3, 16)), "_scales": (torch.uint8, (3, 8, 3))}
    assert layout(STACKED.write(to_meta(q))) == layout(tensors)
    config = STACKED.config({EXPERTS: q.format}, ["lm_head"], None)["quantization_config"]
    assert codecs.claimant(Located(config, "config.json: quantization_config"))[0] is STACKED
    form = STACKED.plan(config).for_module(EXPERTS)[0]
    assert form
    back = STACKED.read(form, tensors)
    assert back.weight.shape == (3, 8, 96) and back.act == {} and back.format.act is None
    assert all(torch.equal(back.weight.planes[name], plane) for name, plane in q.weight.planes.items())


def test_by_arithmetic() -> None:
    """Byte i of a block holds columns 2 i (low) and 2 i + 1 (high); the exponent has a bias of 127."""
    table = values(E2M1)
    blocks = torch.arange(2 * 4 * 2 * 16).remainder(256).to(torch.uint8).view(2, 4, 2, 16)
    scales = torch.arange(16, dtype=torch.uint8).view(2, 4, 2) + 120
    back = decode(STACKED.read(form_of(), {"_blocks": blocks, "_scales": scales}).weight)
    for e, n, k in ((0, 0, 0), (1, 3, 63), (0, 2, 33), (1, 0, 30)):
        byte = int(blocks[e, n, k // 32, k % 32 // 2])
        code = byte >> 4 if k % 2 else byte & 15
        assert back[e, n, k] == table[code] * 2.0 ** (int(scales[e, n, k // 32]) - 127)


def test_only_experts_are_quantized() -> None:
    plan = STACKED.plan(CONFIG)
    for name in ("lm_head", "model.layers.3.self_attn.q_proj", "model.layers.3.mlp.router", "model.layers.3.mlp.other"):
        assert plan.for_module(name)[0] is None, name
    assert plan.for_module("model.layers.11.mlp.experts.down_proj")[0] is not None
    kept = STACKED.plan({**CONFIG, "modules_to_not_convert": ["model.layers.*.mlp.experts"]})
    form, rule = kept.for_module(EXPERTS)
    assert form is None and rule and rule.where.endswith("modules_to_not_convert[0]")


def test_minimax(tmp_path: Path) -> None:
    assert ROWS.fit
    assert {name for name, _ in accepted(ROWS)} == {"mxfp8"}
    for n, k in ((64, 256), (37, 96)):
        check(ROWS, filled(ROWS.fit(FORMATS["mxfp8"]), n, k), tmp_path)
    plan = ROWS.plan({"quant_method": "mxfp8", "ignored_layers": ["lm_head", "gate"]})
    assert plan.for_module("model.layers.0.block_sparse_moe.gate")[0] is None
    assert plan.for_module(NAME)[0] == FORMATS["mxfp8"]


LIES: list[tuple[str, Any, str]] = [
    ("_blocks", None, "_blocks is missing"),
    ("_scales", None, "_scales is missing"),
    ("_blocks", lambda t: t.flatten(-2), r"uint8 \[E, N, K / 32, 16\]"),
    ("_blocks", lambda t: t.view(torch.int8), "uint8"),
    ("_scales", lambda t: t[..., :1], r"want \[3, 8, 3\] bytes"),
    ("_scales", lambda t: t.float(), "one for each block"),
]


@pytest.mark.parametrize("case", range(len(LIES)))
def test_tensors_that_lie(case: int) -> None:
    ending, change, message = LIES[case]
    assert STACKED.write
    tensors: dict[str, Tensor] = STACKED.write(experts())
    stored = tensors.pop(ending)
    if change is not None:
        tensors[ending] = change(stored)
    with pytest.raises(CheckpointError, match=message):
        STACKED.read(form_of(), tensors)


def test_what_they_do_not_hold() -> None:
    assert STACKED.write and STACKED.config and STACKED.fit and ROWS.fit and ROWS.config
    for codec, row in ((STACKED, "mxfp4"), (STACKED, "nvfp4-a16"), (ROWS, "mxfp8-a16"), (ROWS, "fp8-channel")):
        assert codec.fit
        with pytest.raises(UnsupportedError) as refusal:
            codec.fit(FORMATS[row])
        assert refusal.value.reasons
    form = FORMATS["mxfp4-a16"]
    with pytest.raises(UnsupportedError, match="stacked experts"):
        STACKED.write(Quantized(form, encode(random_weight(), form.weight)))
    with pytest.raises(UnsupportedError, match="experts alone"):
        STACKED.config({NAME: form}, [], None)
    with pytest.raises(UnsupportedError, match="cache"):
        ROWS.config({NAME: FORMATS["mxfp8"]}, [], FORMATS["fp8-tensor-static"].act)
    with pytest.raises(CheckpointError, match="must be a string"):
        STACKED.plan({"quant_method": "mxfp4", "modules_to_not_convert": [1]})
