"""bitsandbytes: nibbles the other way round, blocks over row ends, and a JSON text that is held to its word."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit import codecs
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.elements import DYNAMIC8, FP4, NF4
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import codes
from fewbit.quant.reference import decode
from tests.codecs.roundtrip import accepted, back_again, check_round_trip, encoded, layout, to_meta

BNB = codecs.CODECS["bitsandbytes"]
STATE = ".weight.quant_state.bitsandbytes__nf4"
FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def tensors_of(row: str = "nf4-dq") -> tuple[Any, dict[str, Tensor]]:
    assert BNB.fit and BNB.write
    form = BNB.fit(FORMATS[row])
    return form, BNB.write(encoded(form))


@pytest.mark.parametrize("row", ["nf4", "nf4-dq", "fp4"])
@pytest.mark.parametrize("shape", [(64, 256), (6, 100), (4, 33)])
def test_four_bits_write_then_read(row: str, shape: tuple[int, int]) -> None:
    assert BNB.fit
    check_round_trip(BNB, encoded(BNB.fit(FORMATS[row]), *shape))


@pytest.mark.parametrize("row", ["int8-channel", "int8-channel-a8"])
def test_eight_bits_write_then_read(row: str) -> None:
    """SCB = 127 * scale: exact where a float32 gives the scale back, else one unit in the last place off."""
    assert BNB.fit and BNB.write
    q = encoded(BNB.fit(FORMATS[row]))
    back = back_again(BNB, q)
    assert back.format == q.format and torch.equal(back.weight.planes["codes"], q.weight.planes["codes"])
    a, b = (x.weight.planes["scale0"].view(torch.int32) for x in (back, q))
    assert (a - b).abs().max() <= 1
    assert layout(BNB.write(to_meta(q))) == layout(BNB.write(q))
    again = back_again(BNB, back)  # a scale that came from an SCB always has one
    assert torch.equal(again.weight.planes["scale0"], back.weight.planes["scale0"])
    half = q.weight.planes["scale0"].half().float()
    q.weight.planes["scale0"].copy_(half)  # scales of 16-bit precision always have one
    assert torch.equal(back_again(BNB, q).weight.planes["scale0"], half)


def test_rows_it_accepts() -> None:
    names = {name for name, _ in accepted(BNB)}
    assert names >= {"nf4", "nf4-dq", "fp4", "int8-channel", "int8-channel-a8"}
    for row in ("int4-g128", "int8-g128", "fp8-channel", "nvfp4-a16", "q8_0"):
        assert row not in names


def test_first_of_a_pair_is_in_the_high_nibble() -> None:
    form, tensors = tensors_of("nf4")
    plain = codes(BNB.read(form, tensors).weight)
    stored = tensors[".weight"].flatten()
    assert torch.equal(stored >> 4, plain.flatten()[::2]) and torch.equal(stored & 15, plain.flatten()[1::2])


def test_dequantizes_as_the_format_says() -> None:
    """absmax = map[code] * nested[i // 256] + offset; w = table[code] * absmax[i // 64]."""
    form, tensors = tensors_of("nf4-dq")
    offset = json.loads(bytes(tensors[STATE].tolist()))["nested_offset"]
    maxima = tensors[".weight.nested_quant_map"][tensors[".weight.absmax"].long()]
    maxima = maxima * tensors[".weight.nested_absmax"].repeat_interleave(256)[: len(maxima)] + offset
    stored = tensors[".weight"].flatten()
    order = torch.stack([stored >> 4, stored & 15], -1).flatten().long()
    want = tensors[".weight.quant_map"][order] * maxima.repeat_interleave(64)
    assert torch.allclose(decode(BNB.read(form, tensors).weight).flatten(), want, rtol=1e-6, atol=0)


def test_int8_is_scb_over_127() -> None:
    form, _ = BNB.plan(EIGHT).for_module("q_proj")
    stored = torch.randint(-127, 128, (8, 16), dtype=torch.int8)
    scb = torch.rand(8) + 0.1
    assert form is not None
    q = BNB.read(form, {".weight": stored, ".SCB": scb, ".weight_format": torch.zeros((), dtype=torch.uint8)})
    want = stored.double() * scb.double().unsqueeze(1) / 127
    assert torch.allclose(decode(q.weight).double(), want, rtol=2e-7, atol=0)


def test_threshold_decides_what_is_rounded() -> None:
    """With a threshold outliers stay in 16 bits, which only an unrounded input can promise."""
    for threshold, rounds in ((6.0, False), (0.0, True)):
        form, _ = BNB.plan(EIGHT | {"llm_int8_threshold": threshold}).for_module("q_proj")
        assert form is not None and (form.act is not None) == rounds


@pytest.mark.parametrize(("element", "size"), [(NF4, 16), (FP4, 16), (DYNAMIC8, 256)])
def test_tables_have_distinct_values_and_reach_one(element: Any, size: int) -> None:
    assert len(element.table) == size and max(element.table) == 1.0
    assert len(set(element.table)) >= size - 1  # FP4 has two zeros


def state(**changes: Any) -> Any:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = json.loads(bytes(tensors[STATE].tolist())) | changes
        text = json.dumps({key: value for key, value in found.items() if value is not ...})
        return tensors | {STATE: torch.tensor(list(text.encode()), dtype=torch.uint8)}

    return change


def text(content: bytes) -> Any:
    return lambda tensors: tensors | {STATE: torch.tensor(list(content), dtype=torch.uint8)}


def tensor(ending: str, change: Any) -> Any:
    return lambda tensors: tensors | {ending: change(tensors[ending])}


LIES = {
    "another type": (state(quant_type="fp4"), "quant_type"),
    "an unknown type": (state(quant_type="nf5"), "quant_type"),
    "another shape": (state(shape=[64, 128]), "holds 16384"),
    "a shape of one axis": (state(shape=[16384]), "shape"),
    "a negative shape": (state(shape=[-64, -256]), "shape"),
    "a huge shape": (state(shape=[2**40, 2**40]), "holds 16384"),
    "shape is text": (state(shape="64x256"), "shape"),
    "another block": (state(blocksize=128), "absmax"),
    "an odd block": (state(blocksize=63), "blocksize"),
    "an unknown dtype": (state(dtype="float8"), "dtype"),
    "an unknown field": (state(extra=1), "unknown fields"),
    "no offset": (state(nested_offset=...), "nested_offset"),
    "no nesting": (state(nested_blocksize=..., nested_dtype=..., nested_offset=...), "double_quant"),
    "odd nesting": (state(nested_blocksize=128), "nested_blocksize"),
    "no JSON": (text(b"{"), "JSON"),
    "a list": (text(b"[]"), "object"),
    "a key twice": (text(b'{"shape": [1, 2], "shape": [1, 2]}'), "duplicate"),
    "not a number": (text(b'{"nested_offset": NaN}'), "number"),
    "another table": (tensor(".weight.quant_map", lambda t: t.flip(0)), "code"),
    "another nested table": (tensor(".weight.nested_quant_map", lambda t: t * 2), "code"),
    "half the maxima": (tensor(".weight.absmax", lambda t: t[:100]), "absmax"),
    "maxima of a wrong type": (tensor(".weight.absmax", lambda t: t.float()), "absmax"),
    "no state": (lambda tensors: {k: v for k, v in tensors.items() if k != STATE}, "want one of them"),
    "two states": (lambda tensors: tensors | {STATE[:-3] + "fp4": tensors[STATE]}, "want one of them"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lies_in_tensors(lie: str) -> None:
    change, message = LIES[lie]
    form, tensors = tensors_of()
    with pytest.raises(CheckpointError, match=message):
        BNB.read(form, change(tensors))


def test_lies_in_int8_tensors() -> None:
    form, tensors = tensors_of("int8-channel")
    for ending, bad in ((".SCB", torch.ones(3)), (".weight", tensors[".weight"].float()), (".weight", torch.ones(4))):
        with pytest.raises(CheckpointError, match=ending):
            BNB.read(form, tensors | {ending: bad})
    with pytest.raises(CheckpointError, match="weight_format"):
        BNB.read(form, tensors | {".weight_format": torch.tensor(2, dtype=torch.uint8)})


CONFIG_LIES = [
    (FOUR | {"bnb_4bit_quant_type": "nf3"}, "nf4 or fp4"),
    (FOUR | {"load_in_8bit": True}, "one of"),
    ({"quant_method": "bitsandbytes"}, "one of"),
    (FOUR | {"bnb_4bit_use_double_quant": 1}, "double_quant"),
    (EIGHT | {"llm_int8_threshold": -1}, "threshold"),
    (EIGHT | {"llm_int8_threshold": "6"}, "threshold"),
    (FOUR | {"llm_int8_skip_modules": "lm_head"}, "list of names"),
]


@pytest.mark.parametrize(("config", "message"), CONFIG_LIES)
def test_lies_in_config(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        BNB.plan(config)


SKIPS = [
    ("lm_head", "lm_head", True), ("lm_head", "model.lm_head", True), ("model.layers.1", "model.layers.1.q_proj", True),
    ("model.layers.1", "model.layers.11.q_proj", False), ("fc1", "model.layers.2.fc1", True),
    ("mlp.gate", "model.mlp.gate_proj", False),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "name", "skipped"), SKIPS)
def test_skipped_modules(entry: str, name: str, skipped: bool) -> None:
    form, _ = BNB.plan(FOUR | {"llm_int8_skip_modules": [entry]}).for_module(name)
    assert (form is None) == skipped


def test_one_format_a_checkpoint() -> None:
    assert BNB.fit and BNB.config
    with pytest.raises(UnsupportedError, match="side by side"):
        BNB.config({"a": BNB.fit(FORMATS["nf4"]), "b": BNB.fit(FORMATS["fp4"])}, [], None)
