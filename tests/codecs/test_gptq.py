"""GPTQ: every bit where the layout says, every rule of its config, and no lie believed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit import codecs
from fewbit.codecs.codec import Located
from fewbit.errors import CheckpointError, SpecError, UnsupportedError
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import QTensor, Quantized, Transform
from fewbit.quant.reference import decode, encode, linear
from fewbit.quant.spec import Format
from tests.codecs.roundtrip import (
    NAME,
    accepted,
    back_again,
    check_round_trip,
    encoded,
    in_order,
    random_weight,
    stream,
    unsigned,
)

WRITERS = {"gptq": 40, "gptq-v2": 40, "gptq-p": 70}
BASE: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}


def plan_of(**changes: Any) -> Any:
    return codecs.CODECS["gptq"].plan(BASE | changes)


def tensors_of(row: str = "int4-g128", dialect: str = "gptq") -> tuple[Format, dict[str, Tensor]]:
    codec = codecs.CODECS[dialect]
    assert codec.fit and codec.write
    form = codec.fit(FORMATS[row])
    return form, codec.write(encoded(form))


@pytest.mark.parametrize("dialect", WRITERS)
def test_write_then_read_is_identity(dialect: str) -> None:
    codec = codecs.CODECS[dialect]
    rows = [(name, form) for name, form in accepted(codec) if form.weight.element.kind == "int"]
    assert len(rows) >= WRITERS[dialect]
    for _, form in rows:
        for n, k in ((64, 256), (32, 160)):
            check_round_trip(codec, encoded(form, n, k))


@pytest.mark.parametrize(
    ("dialect", "bits", "word"),
    [
        ("gptq", 2, 0x55555555), ("gptq", 4, 0x77777777), ("gptq", 8, 0x7F7F7F7F),
        ("gptq-v2", 2, 0xAAAAAAAA), ("gptq-v2", 4, 0x88888888), ("gptq-v2", 8, 0x80808080),
    ],
)  # fmt: skip
def test_zero_words(dialect: str, bits: int, word: int) -> None:
    _, tensors = tensors_of(f"int{bits}-g128", dialect)
    assert set(unsigned(tensors[".qzeros"])) == {word}


def planes(values: list[int], bits: int) -> list[int]:
    """gptq_p: 32 codes as the words of a low plane, then of the higher ones."""
    widths = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}[bits]
    words: list[int] = []
    for i, width in enumerate(widths):
        part = [value >> sum(widths[:i]) & (2**width - 1) for value in values]
        words += stream(part, width)
    return words


def test_golden_words() -> None:
    assert stream(list(range(8)), 4) == [0x76543210]
    assert planes([0b101] * 32, 3) == [0x55555555, 0x55555555, 0xFFFFFFFF]
    assert planes([0b0110001] * 32, 7) == [0x11111111] * 4 + [0xFFFFFFFF] * 2 + [0]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("dialect", WRITERS)
def test_bits_lie_where_the_layout_says(dialect: str, bits: int) -> None:
    codec = codecs.CODECS[dialect]
    assert codec.fit and codec.write
    try:
        form = codec.fit(FORMATS[f"int{bits}-g32-asym"])
    except UnsupportedError:
        assert bits in (5, 6, 7) and dialect != "gptq-p"
        return
    q = encoded(form, 32, 64)
    back = codec.write(q)
    codes = decode_codes(q)
    words = planes if dialect == "gptq-p" else stream
    for row in (0, 31):
        want = [word for start in (0, 32) for word in words(codes[row, start : start + 32].tolist(), bits)]
        assert unsigned(back[".qweight"][:, row]) == want
    zeros = torch.round(-decode_low(q) / q.weight.planes["scale0"].float()).long()  # u - z = -z where u = 0
    zeros -= int(dialect == "gptq")
    for group in (0, 1):
        assert unsigned(back[".qzeros"][group]) == words(zeros[:, group].tolist(), bits)


def decode_codes(q: Quantized) -> Tensor:
    """Codes from values alone: (value - value of code 0) / scale."""
    scale = q.weight.planes["scale0"].float().repeat_interleave(32, 1)
    low = decode_low(q).repeat_interleave(32, 1)
    return torch.round((decode(q.weight) - low) / scale).long()


def decode_low(q: Quantized) -> Tensor:
    """What code 0 means in each group."""
    empty = dict(q.weight.planes, codes=torch.zeros_like(q.weight.planes["codes"]))
    return decode(QTensor(q.weight.spec, q.weight.shape, empty))[:, :: q.weight.spec.scales[0].block[1]]


def test_v1_zeros_wrap_field_by_field() -> None:
    form, tensors = tensors_of("int4-g128-asym", "gptq-v2")
    zeros = torch.tensor([0, 15, 8, 1] * 16)
    stored = torch.tensor(stream(((zeros - 1) % 16).tolist(), 4), dtype=torch.int64).int()
    back = codecs.CODECS["gptq"].read(form, tensors | {".qzeros": stored.expand(2, -1).contiguous()})
    low = decode_low(back)
    assert torch.equal(low, -zeros.float().unsqueeze(1) * back.weight.planes["scale0"].float())


def test_v1_refuses_a_zero_of_0_and_v2_holds_it() -> None:
    form = FORMATS["int4-g128-asym"]
    q = Quantized(form, encode(random_weight().abs(), form.weight))
    for dialect in ("gptq-v2", "gptq-p"):
        check_round_trip(codecs.CODECS[dialect], q)
    write = codecs.CODECS["gptq"].write
    with pytest.raises(UnsupportedError, match=r"a zero of 0(.|\n)*gptq-v2"):
        assert write and write(q)


@pytest.mark.parametrize("dialect", WRITERS)
def test_activation_order(dialect: str) -> None:
    """Groups scattered over the columns: the same linear as the plain sum over columns."""
    codec = codecs.CODECS[dialect]
    assert codec.fit and codec.write
    form = codec.fit(FORMATS["int4-g32"])
    index = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    index = index.view(8, 32).sort(1).values.flatten()
    form = Format(form.weight, None, ("permute",))
    weight = random_weight()
    q = Quantized(form, encode(weight[:, index], form.weight), transforms=(Transform("permute", {"index": index}),))
    check_round_trip(codec, q)
    back = back_again(codec, q)
    assert torch.equal(back.transforms[0].tensors["index"], index)
    weights, x = in_order(q), random_weight(3, 256, seed=2)
    assert torch.allclose(linear(x, back), x @ weights.T, rtol=1e-5, atol=1e-4)
    g_idx = codec.write(q)[".g_idx"]
    assert all(int(g_idx[int(column)]) == place // 32 for place, column in enumerate(index))
    for column in (0, 100, 255):  # column c of the model is where the order puts it
        place = int((index == column).nonzero())
        assert torch.equal(weights[:, column], decode(q.weight)[:, place])


LIES = {
    "a zero off the middle": (".qzeros", lambda t: t + 1, "every zero should be 8"),
    "v2 zeros in a v1 file": (".qzeros", lambda t: torch.full_like(t, -0x77777778), "another checkpoint_format"),
    "a group that is not there": (".g_idx", lambda t: t + 1, "there are 2 groups"),
    "a negative group": (".g_idx", lambda t: t - 1, "is in group -1"),
    "groups of odd sizes": (".g_idx", lambda t: t.clamp(max=0), "group 0 has 256 columns"),
    "half a column order": (".g_idx", lambda t: t[:128], r"want \[256\]"),
    "half the scales": (".scales", lambda t: t[:1], r"want \[2, 64\]"),
    "scales of a wrong type": (".scales", lambda t: t.int(), "float16"),
    "words of a wrong type": (".qweight", lambda t: t.long(), "int32"),
    "half the zeros": (".qzeros", lambda t: t[:, :4], r"want \[2, 8\]"),
    "flat words": (".qweight", lambda t: t.flatten(), "K"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_in_tensors(lie: str) -> None:
    ending, change, message = LIES[lie]
    form, tensors = tensors_of()
    with pytest.raises(CheckpointError, match=message):
        codecs.CODECS["gptq"].read(form, tensors | {ending: change(tensors[ending]).contiguous()})


def test_order_declared_and_missing() -> None:
    form, _ = plan_of(desc_act=True).for_module(NAME)
    _, tensors = tensors_of()
    del tensors[".g_idx"]
    with pytest.raises(CheckpointError, match="g_idx is missing"):
        codecs.CODECS["gptq"].read(form, tensors)


CONFIG_LIES = [
    ({"bits": 9}, CheckpointError, "bits"),
    ({"bits": "4"}, CheckpointError, "bits"),
    ({"bits": True}, CheckpointError, "bits"),
    ({"group_size": 0}, CheckpointError, "group_size"),
    ({"group_size": None}, CheckpointError, "group_size"),
    ({"sym": "yes"}, CheckpointError, "sym"),
    ({"dynamic": ["-:x"]}, CheckpointError, "dynamic"),
    ({"dynamic": {"+:x": 4}}, CheckpointError, "dynamic"),
    ({"dynamic": {"+:x": {"bits": 1}}}, CheckpointError, "bits"),
    ({"dynamic": {"-:(": {}}}, SpecError, "regular expression"),
    ({"modules_in_block_to_quantize": "q_proj"}, CheckpointError, "list of names"),
    ({"modules_in_block_to_quantize": [[1]]}, CheckpointError, "list of names"),
    ({"checkpoint_format": "marlin"}, UnsupportedError, "marlin"),
    ({"format": "bitblas"}, UnsupportedError, "bitblas"),
    ({"checkpoint_format": "gptq_v9"}, UnsupportedError, "known"),
    ({"pack_dtype": "int64"}, UnsupportedError, "pack_dtype"),
]


@pytest.mark.parametrize(("changes", "error", "message"), CONFIG_LIES)
def test_lies_in_config(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan_of(**changes)


CLAIMS = [
    ({"quant_method": "gptq"}, "gptq"),
    ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, "gptq-v2"),
    ({"quant_method": "gptq", "format": "gptq_p"}, "gptq-p"),
    ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "gptq"),
    ({"bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False}, "gptq"),
]


@pytest.mark.parametrize(("config", "dialect"), CLAIMS)
def test_claims(config: dict[str, Any], dialect: str) -> None:
    assert codecs.claimant(Located(config, "quantize_config.json"))[0].name == dialect


def bits_of(form: Format | None) -> tuple[int, int, bool] | None:
    if form is None:
        return None
    return int(form.weight.element.bits), form.weight.scales[0].block[1], not form.weight.zeros


DYNAMIC = {
    r"-:.*\.layers\.0\..*": {},
    r"+:.*\.down_proj$": {"bits": 8, "group_size": 64},
    r".*\.up_proj$": {"sym": False},
}
NAMES = [
    ({"dynamic": DYNAMIC}, "model.layers.0.mlp.down_proj", None),
    ({"dynamic": DYNAMIC}, "model.layers.1.mlp.down_proj", (8, 64, True)),
    ({"dynamic": DYNAMIC}, "model.layers.1.mlp.up_proj", (4, 128, False)),
    ({"dynamic": DYNAMIC}, "model.layers.1.mlp.gate_proj", (4, 128, True)),
    ({}, "lm_head", None),
    ({"lm_head": True}, "lm_head", (4, 128, True)),
    ({"lm_head": True, "dynamic": {"lm_head": {"bits": 8, "group_size": 32}}}, "lm_head", (8, 32, True)),
    ({"modules_in_block_to_quantize": ["self_attn.q_proj"]}, "model.layers.0.self_attn.q_proj", (4, 128, True)),
    ({"modules_in_block_to_quantize": ["self_attn.q_proj"]}, "model.layers.0.mlp.up_proj", None),
    ({"modules_in_block_to_quantize": [["q_proj"], ["up_proj"]]}, "model.layers.0.mlp.up_proj", (4, 128, True)),
    ({"group_size": -1}, "model.layers.0.mlp.up_proj", (4, 0, True)),
]


@pytest.mark.parametrize(("changes", "name", "want"), NAMES)
def test_plan(changes: dict[str, Any], name: str, want: tuple[int, int, bool] | None) -> None:
    assert bits_of(plan_of(**changes).for_module(name)[0]) == want


def test_config_of_mixed_modules_reads_back() -> None:
    codec = codecs.CODECS["gptq-v2"]
    assert codec.fit and codec.config
    rows = {"mlp.up_proj": "int4-g128", "mlp.down_proj": "int8-g64", "self_attn.q_proj": "int4-g128-asym"}
    formats = {f"model.layers.{i}.{m}": codec.fit(FORMATS[r]) for i in (0, 1) for m, r in rows.items()}
    formats["model.layers.1.mlp.up_proj"] = codec.fit(FORMATS["int2-g32"])
    formats["lm_head"] = codec.fit(FORMATS["int8-g32"])
    dense = ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj"]
    config = codec.config(formats, dense, None)["quantization_config"]
    plan = codec.plan(config)
    assert {name: plan.for_module(name)[0] for name in formats} == formats
    assert all(plan.for_module(name)[0] is None for name in dense)
    assert len(config["dynamic"]) < len(formats) and plan.idle([*formats, *dense]) == []


REFUSED = ["fp8-channel", "nvfp4", "mxfp4-a16", "nf4", "q4_k", "int8-channel-a8", "int5-g128"]


@pytest.mark.parametrize("row", REFUSED)
def test_fit_refuses(row: str) -> None:
    codec = codecs.CODECS["gptq"]
    assert codec.fit
    with pytest.raises(UnsupportedError, match="cannot hold") as error:
        codec.fit(FORMATS[row])
    assert error.value.reasons


def test_experts_and_odd_rows_are_refused() -> None:
    codec = codecs.CODECS["gptq"]
    assert codec.fit and codec.write
    form = codec.fit(FORMATS["int4-g128"])
    stacked = Quantized(form, encode(torch.randn(2, 8, 128), form.weight))
    for q in (stacked, encoded(form, 6, 128)):
        with pytest.raises(UnsupportedError):
            codec.write(q)
