"""AWQ: the order of its nibbles, its three layouts, its two spellings of a config, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit import codecs
from fewbit.codecs.codec import Located
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import Quantized
from fewbit.quant.reference import decode, encode
from tests.codecs.roundtrip import accepted, check_round_trip, encoded, stream, unsigned

AWQ = codecs.CODECS["awq"]
BASE: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def form_of(**changes: Any) -> Any:
    return AWQ.plan(BASE | changes).for_module("model.layers.0.mlp.up_proj")[0]


def sample(n: int, k: int, group: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], zeros [N, G], scales [N, G]."""
    generator = torch.Generator().manual_seed(n + k)
    groups = -(-k // group)
    codes = torch.randint(0, 16, (n, k), generator=generator)
    zeros = torch.randint(0, 16, (n, groups), generator=generator)
    return codes, zeros, (torch.rand(n, groups, generator=generator) * 0.01 + 0.005).half()


def values(codes: Tensor, zeros: Tensor, scales: Tensor, group: int = 32) -> Tensor:
    wide = [t.float().repeat_interleave(group, 1) for t in (zeros, scales)]
    return (codes - wide[0]) * wide[1]


def words(rows: list[list[int]], bits: int = 4) -> Tensor:
    packed = torch.tensor([stream(row, bits) for row in rows], dtype=torch.int64)
    return packed.int()


def test_write_then_read_is_identity() -> None:
    rows = list(accepted(AWQ))
    assert {"int4-g128", "int4-g128-asym", "int4-channel"} <= {name for name, _ in rows}
    for _, form in rows:
        for n, k in ((64, 256), (8, 160)):
            check_round_trip(AWQ, encoded(form, n, k))


def test_golden_word() -> None:
    """Columns 0..7 with values 0..7."""
    assert AWQ.fit and AWQ.write
    form = AWQ.fit(FORMATS["int4-channel-asym"])
    ramp = torch.arange(8.0).view(8, 1) * torch.ones(1, 2)
    ramp[:, 1] = torch.arange(8.0) * 0 + 15  # so that every row spans the codes 0 to 15 with scale 1
    q = Quantized(form, encode(ramp, form.weight))
    assert unsigned(AWQ.write(q)[".qweight"][0]) == [0x75316420]


def test_gemm() -> None:
    codes, zeros, scales = sample(16, 64)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    picked = [8 * word + place for word in range(2) for place in order]
    tensors = {
        ".qweight": words(codes.T[:, picked].tolist()),
        ".qzeros": words(zeros.T[:, picked].tolist()),
        ".scales": scales.T.contiguous(),
    }
    assert torch.equal(decode(AWQ.read(form_of(), tensors).weight), values(codes, zeros, scales))


def gemv(codes: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """Rows in plain order; zeros and scales padded to 32 groups."""
    pad = (0, 32 - scales.shape[1])
    zeros, scales = (torch.nn.functional.pad(t, pad) for t in (zeros, scales))
    return {".qweight": words(codes.tolist()), ".qzeros": words(zeros.tolist()), ".scales": scales}


def gemv_fast(codes: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """One code at a time: where each goes, by the shuffle's own description."""
    n, k = codes.shape
    out = torch.zeros(n // 4, k, dtype=torch.int32)
    for row in range(n):
        for column in range(k):
            run, inside = divmod(column, 32)
            eight, pair, odd = inside // 8, inside % 8 // 2, inside % 2
            spread = pair * 8 + eight * 2 + odd  # pairs of the four runs of eight come together
            base, rest = spread // 8 * 8, spread % 8
            place = run * 32 + base + rest % 2 * 4 + rest // 2  # then even places before odd ones
            stripe, offset = divmod(place, 64)
            flat = (row % 4) * 64 + offset
            out[row // 4, stripe * 64 + flat // 4] |= int(codes[row, column]) << (4 * (flat % 4))
    pad = (0, 0, 0, 32 - scales.shape[1])
    offsets = torch.nn.functional.pad(-(scales.float() * zeros).half().T, pad)
    return {
        ".qweight": out.to(torch.int16), ".qzeros": offsets.contiguous(),
        ".scales": torch.nn.functional.pad(scales.T, pad).contiguous(),
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(16, 128), (8, 192)])
@pytest.mark.parametrize(("version", "pack", "bound"), [("gemv", gemv, 0.0), ("gemv_fast", gemv_fast, 5e-4)])
def test_read_only_layouts(version: str, pack: Any, bound: float, shape: tuple[int, int]) -> None:
    codes, zeros, scales = sample(*shape)
    config = BASE | {"version": version}
    codec, evidence = codecs.claimant(Located(config, "config.json: quantization_config"))
    assert codec.name == "awq-" + version.replace("_", "-") and version.replace("_", "-") in evidence
    form, _ = codec.plan(config).for_module("q_proj")
    assert form is not None and codec.write is None
    got = decode(codec.read(form, pack(codes, zeros, scales)).weight)
    want = values(codes, zeros, scales)
    assert (got - want).abs().max() <= bound * want.abs().max()  # gemv_fast rounds scale * zero to float16
    short = pack(codes, zeros, scales)
    short[".scales"] = short[".scales"][..., :1] if version == "gemv" else short[".scales"][:1]
    with pytest.raises(CheckpointError):
        codec.read(form, short)


def test_without_zero_points() -> None:
    codes, _, scales = sample(16, 64)
    order = [8 * word + place for word in range(2) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
    tensors = {".qweight": words(codes.T[:, order].tolist()), ".scales": scales.T.contiguous()}
    want = values(codes, torch.full((16, 2), 8), scales)
    form = form_of(zero_point=False)
    assert torch.equal(decode(AWQ.read(form, tensors).weight), want)
    middle = words([[8] * 16] * 2)
    assert torch.equal(decode(AWQ.read(form, tensors | {".qzeros": middle}).weight), want)
    with pytest.raises(CheckpointError, match="every zero should be 8"):
        AWQ.read(form, tensors | {".qzeros": words([[7] * 16] * 2)})


NATIVE = {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}


@pytest.mark.parametrize(("config", "group"), [(BASE, 32), (NATIVE, 64), (BASE | {"group_size": -1}, 0)])
def test_spellings(config: dict[str, Any], group: int) -> None:
    codec, _ = codecs.claimant(Located(config, "quant_config.json"))
    form, _ = codec.plan(config).for_module("model.layers.0.mlp.up_proj")
    assert codec.name == "awq" and form is not None
    assert form.weight.scales[0].block == form.weight.zeros[0].block == (1, group)


def test_skipped_modules() -> None:
    plan = AWQ.plan(BASE | {"modules_to_not_convert": ["lm_head", "mlp.gate."]})
    assert plan.for_module("lm_head")[0] is None and plan.for_module("model.layers.0.mlp.up_proj")[0] is not None
    assert next(rule.where for rule in plan.idle(["lm_head"])).endswith("[1]")


CONFIG_LIES = [
    ({"bits": 3}, UnsupportedError, "3 bits"),
    ({"group_size": 0}, CheckpointError, "group_size"),
    ({"zero_point": "no"}, CheckpointError, "zero_point"),
    ({"version": "llm-awq"}, UnsupportedError, "llm-awq"),
    ({"version": "exllama"}, UnsupportedError, "known"),
    ({"modules_to_not_convert": "lm_head"}, CheckpointError, "list of names"),
]


@pytest.mark.parametrize(("changes", "error", "message"), CONFIG_LIES)
def test_lies_in_config(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AWQ.plan(BASE | changes)


@pytest.mark.parametrize("ending", [".qweight", ".qzeros", ".scales"])
def test_lies_in_tensors(ending: str) -> None:
    assert AWQ.fit and AWQ.write
    form = AWQ.fit(FORMATS["int4-g32-asym"])
    tensors = AWQ.write(encoded(form))
    for change in (lambda t: t[: len(t) // 4], lambda t: t.flatten(), lambda t: t.double()):
        with pytest.raises(CheckpointError, match="want"):
            AWQ.read(form, tensors | {ending: change(tensors[ending])})


@pytest.mark.parametrize("row", ["int8-g128", "fp8-channel", "nf4", "q4_k", "int4-g128-a8fp8"])
def test_fit_refuses(row: str) -> None:
    assert AWQ.fit
    with pytest.raises(UnsupportedError, match="cannot hold"):
        AWQ.fit(FORMATS[row])


def test_config_refuses_what_it_cannot_say() -> None:
    assert AWQ.fit and AWQ.config
    a, b = AWQ.fit(FORMATS["int4-g128"]), AWQ.fit(FORMATS["int4-g64"])
    with pytest.raises(UnsupportedError, match="groups"):
        AWQ.config({"m.up_proj": a, "m.down_proj": b}, [], None)
    with pytest.raises(UnsupportedError, match="substring"):
        AWQ.config({"mlp.gate_proj": a}, ["mlp.gate"], None)
