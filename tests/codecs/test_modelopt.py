"""ModelOpt: every algorithm in both spellings of its config, what smoothing leaves behind, and lies."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit import codecs
from fewbit.codecs.codec import Located
from fewbit.codecs.modelopt_config import ALGORITHMS, NVFP4_ACT
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.elements import E2M1, E4M3, E8M0, ELEMENTS, F32
from fewbit.quant.formats import FORMATS, TENSOR_FP8
from fewbit.quant.qtensor import Quantized, Transform
from fewbit.quant.reference import decode, encode, fake_quant, linear
from fewbit.quant.spec import Format, QuantSpec, spec
from tests.codecs.common import check, filled, same_format
from tests.codecs.roundtrip import NAME, accepted, layout, random_weight

CODEC = codecs.CODECS["modelopt"]
INT4 = ELEMENTS["int4"]


def full(form: Format, n: int = 64, k: int = 256) -> Quantized:
    """With the transforms that the format speaks of."""
    q = filled(form, n, k)
    known = {
        "input_scale": Transform("input_scale", {"scale": (random_weight(1, k, 5)[0].abs() + 0.1).bfloat16()}),
        "low_rank": Transform("low_rank", {"a": random_weight(4, k, 6) / 16, "b": random_weight(n, 4, 7)}),
    }
    return replace(q, transforms=tuple(known[kind] for kind in form.transforms))


def rows() -> list[tuple[str, Format]]:
    assert CODEC.fit
    algorithms = [(name, CODEC.fit(form)) for name, form in ALGORITHMS.items()]
    smaller = Format(spec(INT4, (F32, 1, 32)), None, ("input_scale",))
    return [*accepted(CODEC), *algorithms, ("W4A16_AWQ of 32", CODEC.fit(smaller))]


def test_write_then_read_is_identity(tmp_path: Path) -> None:
    """In the flat config; the nested one says the same."""
    names = [name for name, _ in rows()]
    assert {"fp8-tensor-static", "fp8-channel", "fp8-block-a16", "nvfp4", "nvfp4-a16", "mxfp8", "mxfp4"} <= set(names)
    for name, form in rows():
        for n, k in ((64, 256), (38, 384)):
            try:
                files = check(CODEC, full(form, n, k), tmp_path)
            except AssertionError as error:
                raise AssertionError(f"{name} of {n} x {k}: {error}") from error
            flat, nested = (CODEC.plan(files[f]) for f in ("quantization_config", "hf_quant_config.json"))
            assert nested.for_module("lm_head")[0] is None
            a, b = flat.for_module(NAME)[0], nested.for_module(NAME)[0]
            assert a is not None and a == b, name


def test_what_a_flat_config_forgets_the_scales_tell() -> None:
    """The tool writes no group size for most algorithms."""
    assert CODEC.write and CODEC.fit
    for algorithm, size in (("W4A16_AWQ", 32), ("W4A8_AWQ", 128), ("NVFP4_AWQ", 16), ("W4A8_NVFP4_FP8", 32)):
        plan = CODEC.plan({"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]})
        form = plan.for_module(NAME)[0]
        row = ALGORITHMS[algorithm]
        weight = spec(INT4, (F32, 1, size)) if row.weight.element == INT4 else row.weight
        q = full(CODEC.fit(replace(row, weight=weight)))
        assert form is not None
        back = CODEC.read(form, CODEC.write(q))
        assert same_format(back.format, q.format) and back.format.weight.scales[0].block == (1, size), algorithm


def test_int4_packs_pairs_of_rows() -> None:
    """Low nibble = even row, two's complement."""
    form = Format(spec(INT4, (F32, 1, 4)))
    packed = torch.tensor([[0x21, 0xF8, 0x7F, 0x00]], dtype=torch.uint8)
    back = CODEC.read(form, {".weight": packed, ".weight_scale": torch.ones(2, 1)})
    assert decode(back.weight).tolist() == [[1.0, -8.0, -1.0, 0.0], [2.0, -1.0, 7.0, 0.0]]


def test_nvfp4_multiplies_and_w4a8_does_not() -> None:
    """weight_scale_2 is the outer scale of NVFP4, and in W4A8_AWQ a kernel's own business."""
    assert CODEC.write
    nvfp4 = CODEC.write(full(rows_of("NVFP4")))
    form = rows_of("NVFP4")
    doubled = CODEC.read(form, nvfp4 | {".weight_scale_2": nvfp4[".weight_scale_2"] * 2})
    assert torch.equal(decode(doubled.weight), 2 * decode(CODEC.read(form, nvfp4).weight))
    form = rows_of("W4A8_AWQ")
    q = full(form)
    w4a8 = CODEC.write(q)
    assert torch.isclose(w4a8[".weight_scale_2"], decode(q.weight).abs().max() / 448)
    for scale in (torch.tensor(7.0), torch.tensor(0.1)):
        assert torch.equal(decode(CODEC.read(form, w4a8 | {".weight_scale_2": scale}).weight), decode(q.weight))


def rows_of(algorithm: str) -> Format:
    assert CODEC.fit
    return CODEC.fit(ALGORITHMS[algorithm])


def test_svd_adds_a_product_of_the_smoothed_input() -> None:
    assert CODEC.write
    q = full(rows_of("NVFP4_SVD"))
    back = CODEC.read(rows_of("NVFP4_SVD"), CODEC.write(q))
    smooth, low = (t.tensors for t in back.transforms)
    renamed = {e.replace(".svd", ".weight_quantizer._svd"): t for e, t in CODEC.write(q).items()}
    assert set(renamed) <= set(CODEC.endings)
    assert torch.equal(CODEC.read(rows_of("NVFP4_SVD"), renamed).transforms[1].tensors["a"], low["a"])
    x = random_weight(3, 256, 9)
    seen = x * smooth["scale"].float()
    want = seen @ decode(q.weight).T + seen @ low["a"].T @ low["b"].T
    assert torch.allclose(linear(x, back, activations=False), want, atol=1e-3)


def e2m1(x: Tensor) -> Tensor:
    """Nearest value, ties to the even code: by thresholds."""
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    a = x.abs()
    up = (a > 0.25).int() + (a >= 0.75) + (a > 1.25) + (a >= 1.75) + (a > 2.5) + (a >= 3.5) + (a > 5)
    return levels[up.long()] * x.sign()


def test_inputs_are_rounded_by_the_formulas() -> None:
    """FP8 clamps at 448 scales; NVFP4 takes the outer scale from the file and a scale for every 16 at each call."""
    x = random_weight(8, 256, 4) * torch.exp2(random_weight(8, 256, 5).mul(3))
    x[0, :32] = 0
    scale = torch.full((1, 1), 0.01)
    fp8 = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(fake_quant(x, TENSOR_FP8, {"scale0": scale}), fp8)
    blocks = x.view(8, 16, 16)
    amax = blocks.abs().amax(-1, keepdim=True)
    inner = (amax / (6 * scale)).clamp(2**-9, 448).to(torch.float8_e4m3fn).float()
    inner = torch.where(amax > 0, inner, 1.0)
    want = (e2m1(blocks / (inner * scale)) * (inner * scale)).view(8, 256)
    assert torch.equal(fake_quant(x, NVFP4_ACT, {"scale1": scale}), want)


GROUP = {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}
CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"quant_algo": "fp8_pb_wo"}, "FP8_PB_WO"),
    ({"quant_algo": "FP8_BLOCK_SCALES"}, "FP8_PB_WO"),
    ({"quant_algo": "nvfp4", "group_size": 16}, "NVFP4"),
    ({"quant_algo": "NVFP4", "config_groups": {"a": {**GROUP, "input_activations": None}}}, "W4A16_NVFP4"),
    ({"quant_algo": "NVFP4", "config_groups": {"a": {**GROUP, "input_activations": {"num_bits": 4}}}}, "NVFP4"),
    ({"quant_algo": "mxfp4"}, "MXFP4"),
    ({"quant_algo": "MXFP8", "group_size": 32}, "MXFP8"),
]


@pytest.mark.parametrize(("config", "algorithm"), CONFIGS)
def test_configs(config: dict[str, Any], algorithm: str) -> None:
    for whole in ({"quant_method": "modelopt", **config}, {"producer": {"name": "modelopt"}, "quantization": config}):
        assert codecs.claimant(Located(whole, "somewhere"))[0] is CODEC
        form = CODEC.plan(whole).for_module(NAME)[0]
        want = ALGORITHMS[algorithm]
        bare = replace(form, weight=_sized(form.weight, want.weight)) if form else None
        assert bare is not None and (bare.weight, bare.act) == (want.weight, want.act)


def _sized(s: QuantSpec, like: QuantSpec) -> QuantSpec:
    inner = replace(s.scales[0], block=like.scales[0].block)
    return replace(s, scales=(inner, *s.scales[1:])) if len(s.scales) == 2 else s


EXCLUDED = ["lm_head", "model.layers.0.self_attn*", "model.layers.1.mlp.*", "*router*", "model.layers.2.mlp"]
NAMES = {
    "lm_head": False, "model.layers.0.self_attn.q_proj": False, "model.layers.1.mlp.up_proj": False,
    "model.layers.1.self_attn.q_proj": True, "model.layers.3.router": False, "model.layers.2.mlp.up_proj": False,
    "model.layers.2.mlp_two.up_proj": True, "vision_tower.proj": False, "model.vision_model.proj": False,
    "model.layers.0.mlp.up_proj": True,
}  # fmt: skip


@pytest.mark.parametrize("key", ["ignore", "exclude_modules"])
def test_excluded_names(key: str) -> None:
    plan = CODEC.plan({"quant_method": "modelopt", "quant_algo": "FP8", key: EXCLUDED})
    for name, quantized in NAMES.items():
        assert (plan.for_module(name)[0] is not None) == quantized, name


def test_mixed_precision_names_every_module() -> None:
    assert CODEC.fit and CODEC.config
    layers = {
        "model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
        "model.layers.0.mlp.down_proj": {"quant_algo": "NVFP4", "group_size": 16},
        "model.layers.0.mlp.experts": {"quant_algo": "W4A16_AWQ", "group_size": 64},
    }
    whole = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    plan = CODEC.plan(whole)
    elements = {
        "model.layers.0.self_attn.q_proj": E4M3, "model.layers.0.mlp.down_proj": E2M1,
        "model.layers.0.mlp.experts.7.up_proj": INT4, "model.layers.0.mlp.up_proj": None,
    }  # fmt: skip
    for name, element in elements.items():
        form = plan.for_module(name)[0]
        assert (form and form.weight.element) == element, name
    forms = {name: CODEC.fit(ALGORITHMS[a]) for name, a in (("a", "FP8"), ("b", "NVFP4"), ("c", "W4A16_NVFP4"))}
    files = CODEC.config(forms, ["lm_head"], None)
    for config in files.values():
        again = CODEC.plan(config)
        assert all(same_format(again.for_module(n)[0] or form, form) for n, form in forms.items())
        assert again.for_module("lm_head") == (None, None)
    assert len(files["quantization_config"]["config_groups"]) == 3


def test_modules_with_and_without_smoothing_share_one_algorithm() -> None:
    assert CODEC.config
    forms = {"a": rows_of("NVFP4"), "b": rows_of("NVFP4_AWQ")}
    assert CODEC.config(forms, [], None)["quantization_config"]["quant_algo"] == "NVFP4_AWQ"


CACHES: list[tuple[Any, QuantSpec | None]] = [
    ("FP8", spec(E4M3, (F32, 0, 0))),
    ({"num_bits": 8, "type": "float", "dynamic": False}, spec(E4M3, (F32, 0, 0))),
    ("NVFP4", NVFP4_ACT),
    ("INT8", spec(ELEMENTS["int8"], (F32, 0, 0))),
    (None, None),
]


@pytest.mark.parametrize(("scheme", "want"), CACHES)
def test_caches(scheme: Any, want: QuantSpec | None) -> None:
    assert CODEC.config
    flat = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": scheme}
    assert CODEC.plan(flat).kv == want
    if not isinstance(scheme, dict):
        assert CODEC.plan({"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": scheme}}).kv == want
    for config in CODEC.config({NAME: rows_of("FP8")}, [], want).values():
        assert CODEC.plan(config).kv == want


def test_uncalibrated_w4a8_takes_the_scale_of_the_whole_input() -> None:
    assert CODEC.write
    for algorithm in ("W4A8_MXFP4_FP8", "W4A8_NVFP4_FP8"):
        tensors = CODEC.write(full(rows_of(algorithm)))
        del tensors[".input_scale"]
        act = CODEC.read(rows_of(algorithm), tensors).format.act
        assert act == spec(E4M3, (F32, 0, 0), dynamic=1)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an algorithm of tomorrow": ({"quant_algo": "FP2"}, "known: FP8"),
    "an affine cache": ({"quant_algo": "FP8", "kv_cache_scheme": "NVFP4_AFFINE"}, "affine"),
    "mixed without names": ({"quant_algo": "MIXED_PRECISION"}, "names every module"),
    "a bare layer": ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {}}}, "quant_algo is missing"),
    "a group of text": ({"quant_algo": "NVFP4", "group_size": "16"}, "positive number"),
    "a pattern that is none": ({"quant_algo": "FP8", "ignore": [3]}, "must be a string"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_configs_that_are_refused(name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        CODEC.plan({"quant_method": "modelopt", **changes})


# algorithm, tensor, what becomes of it (None: it is not there), what the error says
LIES: list[tuple[str, str, Any, str]] = [
    ("FP8", ".weight", None, "weight is missing"),
    ("FP8", ".weight_scale", None, "weight_scale is missing"),
    ("FP8", ".input_scale", None, "input_scale is missing: the algorithm rounds inputs"),
    ("FP8", ".weight_scale", lambda t: torch.ones(64), r"want \[1, 1\]"),
    ("FP8", ".weight", lambda t: t.view(torch.uint8), "float8_e4m3fn matrix"),
    ("FP8_PER_CHANNEL_PER_TOKEN", ".weight_scale", lambda t: t[:32], r"want \[64, 1\]"),
    ("FP8_PB_WO", ".weight_scale", lambda t: t.repeat(2, 1, 1, 1), r"want \[1, 2\]"),
    ("NVFP4", ".weight_scale_2", None, "two levels"),
    ("NVFP4", ".weight_scale", lambda t: t.float(), "e4m3 in a byte"),
    ("NVFP4", ".weight_scale", lambda t: t[:, :8], r"one for each 1 x 16"),
    ("NVFP4", ".weight", lambda t: t.view(torch.int8), "uint8 matrix"),
    ("NVFP4_SVD", ".svdquant_lora_a", None, "low-rank"),
    ("NVFP4_SVD", ".svdquant_lora_b", lambda t: t[:, :2], r"svdquant_lora_b: want floats of \[64, 4\]"),
    ("NVFP4_AWQ", ".pre_quant_scale", lambda t: t[:16], r"pre_quant_scale: want floats of \[256\]"),
    ("MXFP8", ".weight_scale", lambda t: t.float(), "e8m0 in a byte"),
    ("W4A16_AWQ", ".weight_scale", lambda t: t[:32], r"want \[64, 2\]"),
    ("W8A8_SQ_PER_CHANNEL", ".weight", lambda t: t.view(torch.uint8), "int8 matrix"),
]


@pytest.mark.parametrize("case", range(len(LIES)))
def test_tensors_that_lie(case: int) -> None:
    algorithm, ending, change, message = LIES[case]
    assert CODEC.write
    form = rows_of(algorithm)
    tensors = CODEC.write(full(form))
    stored = tensors.pop(ending)
    if change is not None:
        tensors[ending] = change(stored)
    with pytest.raises(CheckpointError, match=message):
        CODEC.read(form, tensors)


def test_scales_that_fit_no_group() -> None:
    form = CODEC.plan({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}).for_module(NAME)[0]
    assert form
    with pytest.raises(CheckpointError, match="groups of 256 columns"):
        CODEC.read(form, {".weight": torch.zeros(32, 256, dtype=torch.uint8), ".weight_scale": torch.ones(64, 3)})


OTHERS = [
    "fp8-tensor",
    "fp8-tensor-a16",
    "fp8-block",
    "int4-channel",
    "int8-g128",
    "mxfp8-a16",
    "nf4",
    "int4-g128-asym",
]


@pytest.mark.parametrize("row", OTHERS)
def test_fit_says_why_not(row: str) -> None:
    """Inputs that would be rounded otherwise than before are a refusal, not a detail."""
    assert CODEC.fit
    with pytest.raises(UnsupportedError) as refusal:
        CODEC.fit(FORMATS[row])
    assert refusal.value.reasons


def test_writing_says_why_not() -> None:
    assert CODEC.fit and CODEC.write and CODEC.config
    static = rows_of("FP8")
    with pytest.raises(UnsupportedError, match="calibrate"):
        CODEC.write(Quantized(static, encode(random_weight(), static.weight)))
    odd = rows_of("W4A16_AWQ")
    with pytest.raises(UnsupportedError, match="N must be even"):
        CODEC.write(Quantized(replace(odd, transforms=()), encode(random_weight(37, 256), odd.weight)))
    with pytest.raises(UnsupportedError, match="a cache of"):
        CODEC.config({NAME: static}, [], spec(E4M3, (F32, 1, 0)))
    with pytest.raises(UnsupportedError, match="no algorithm"):
        CODEC.config({NAME: Format(spec(E4M3, (E8M0, 128, 128)), TENSOR_FP8)}, [], None)


def test_layouts() -> None:
    """What other readers look for."""
    assert CODEC.write
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "FP8": {".weight": (64, 256), ".weight_scale": (), ".input_scale": ()},
        "FP8_PER_CHANNEL_PER_TOKEN": {".weight": (64, 256), ".weight_scale": (64,)},
        "FP8_PB_WO": {".weight": (64, 256), ".weight_scale": (1, 1, 2, 1)},
        "NVFP4": {".weight": (64, 128), ".weight_scale": (64, 16), ".weight_scale_2": (), ".input_scale": ()},
        "MXFP8": {".weight": (64, 256), ".weight_scale": (64, 8)},
        "W4A16_AWQ": {".weight": (32, 256), ".weight_scale": (64, 2), ".pre_quant_scale": (256,)},
        "W8A16": {".weight": (64, 256), ".weight_scale": (64,)},
    }
    for algorithm, want in shapes.items():
        found: dict[str, Tensor] = CODEC.write(full(rows_of(algorithm)))
        assert {ending: shape for ending, (_, shape) in layout(found).items()} == want, algorithm
