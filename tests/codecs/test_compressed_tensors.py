"""compressed-tensors: every layout through files and back, the library's own reading of them, rules, and lies."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fewbit import codecs
from fewbit.codecs.codec import Located
from fewbit.errors import CheckpointError, SpecError, UnsupportedError
from fewbit.quant.elements import BF16, E2M1, E4M3, E8M0, ELEMENTS, F16, F32
from fewbit.quant.formats import FORMATS
from fewbit.quant.plan import Plan
from fewbit.quant.qtensor import Quantized, columns
from fewbit.quant.reference import assign, decode, encode, linear
from fewbit.quant.spec import Format, QuantSpec, Scale, spec
from tests.codecs.common import check, effective, filled
from tests.codecs.roundtrip import NAME, accepted, layout, random_weight, stream, unsigned

CODEC = codecs.CODECS["compressed-tensors"]
INT4, INT8, UINT8 = ELEMENTS["int4"], ELEMENTS["int8"], ELEMENTS["uint8"]
INT4_G128 = spec(INT4, (BF16, 1, 128), rule="range")
BASE: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
W4: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
FP8_ARGS: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "channel"}

MORE = {
    "int1": Format(spec(ELEMENTS["int1"], (BF16, 1, 32), rule="range")),
    "int8 static asymmetric inputs": Format(
        spec(INT8, (BF16, 1, 0), rule="range"), spec(UINT8, (F32, 0, 0), zeros=((UINT8, 0, 0),), rule="range")
    ),
    "int8 dynamic asymmetric inputs": Format(
        spec(INT8, (BF16, 1, 0), rule="range"),
        spec(UINT8, (F32, 1, 0), zeros=((UINT8, 1, 0),), rule="range", dynamic=1),
    ),
    "int4 asymmetric in int8, int8 inputs": Format(
        spec(ELEMENTS["uint4"], (BF16, 1, 64), zeros=((ELEMENTS["uint4"], 1, 64),), rule="range"),
        spec(INT8, (F32, 1, 0), rule="range", dynamic=1),
    ),
    "int4 with int4 inputs": Format(INT4_G128, spec(INT4, (F32, 1, 0), rule="range", dynamic=1)),
    "fp8 with whole inputs": Format(spec(E4M3, (F16, 0, 0)), spec(E4M3, (F32, 0, 0), dynamic=1)),
    "mxfp4 with fp8 inputs": Format(spec(E2M1, (E8M0, 1, 32), rule="mx-round"), spec(E4M3, (F32, 1, 0), dynamic=1)),
    "fp8 in odd blocks": Format(spec(E4M3, (BF16, 64, 32)), spec(E4M3, (F32, 1, 32), dynamic=1)),
}


def rows() -> list[tuple[str, Format]]:
    assert CODEC.fit
    return [*accepted(CODEC), *((name, CODEC.fit(form)) for name, form in MORE.items())]


def test_write_then_read_is_identity(tmp_path: Path) -> None:
    """Also where K is no multiple of a word, N no multiple of a block."""
    found = rows()
    assert len(found) > 100
    for name, form in found:
        whole = form.weight.element in (E2M1, E4M3) or form.weight.scales[0].block[1] == 0
        for n, k in ((64, 256), (37, 160 if whole else 128)):
            q = filled(form, n, k)
            try:
                check(CODEC, q, tmp_path)
            except AssertionError as error:
                raise AssertionError(f"{name} of {n} x {k}: {error}") from error


def test_a_word_holds_codes_lowest_first() -> None:
    assert CODEC.write
    for bits in (1, 2, 3, 4, 5, 7, 8):
        element = ELEMENTS[f"int{bits}"]
        form = Format(spec(element, (F32, 1, 0), rule="range"))
        values = torch.arange(64).remainder(2**bits) - 2 ** (bits - 1)
        q = assign(values.float().view(1, 64), form.weight, {"scale0": torch.ones(1, 1)})
        words = CODEC.write(Quantized(form, q))[".weight_packed"]
        assert unsigned(words) == stream((values + 2 ** (bits - 1)).tolist(), bits), bits


def test_zero_points_lie_along_the_rows() -> None:
    assert CODEC.write and CODEC.fit
    for bits in (2, 3, 4, 8):
        form = CODEC.fit(FORMATS[f"int{bits}-g64-asym"])
        q = filled(form, 64, 128)
        from fewbit.quant.qtensor import scale_codes

        zeros = scale_codes(q.weight, "zero0")
        words = CODEC.write(q)[".weight_zero_point"]
        assert tuple(words.shape) == (64 * bits // 32, 2)
        for group in (0, 1):
            assert unsigned(words[:, group]) == stream(zeros[:, group].tolist(), bits), bits


compressed_tensors = pytest.importorskip("compressed_tensors")


@pytest.mark.filterwarnings("ignore")
def test_the_library_decompresses_what_we_write(tmp_path: Path) -> None:
    """Its own compressors and its own config class; scales in F32, where its arithmetic is exact (FP4 and MX: bf16)."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    assert CODEC.config and CODEC.write
    for name, form in rows():
        form = replace(form, weight=_wide(form.weight))
        q = filled(form, 128, 256)
        whole = QuantizationConfig(**CODEC.config({NAME: form}, ["lm_head"], None)["quantization_config"])
        scheme = whole.config_groups["group_0"]
        tensors = {ending.removeprefix("."): t for ending, t in CODEC.write(q).items()}
        theirs = BaseCompressor.get_value_from_registry(whole.format).decompress(tensors, scheme)["weight"].float()
        ours = decode(q.weight)
        exact = form.weight.element.kind == "int" or form.weight.scales[0].element == F32
        gap, top = float((theirs - ours).abs().amax()), float(ours.abs().amax())
        assert gap <= (0 if exact else 2.0**-8 * top), f"{name}: {gap} of {top}"


def _wide(s: QuantSpec) -> QuantSpec:
    return replace(s, scales=tuple(replace(c, element=F32) if c.element.kind == "native" else c for c in s.scales))


@pytest.mark.filterwarnings("ignore")
def test_presets_are_the_library_s() -> None:
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, preset_name_to_scheme

    from fewbit.codecs.compressed_tensors_args import PRESETS

    assert set(PRESET_SCHEMES) == set(PRESETS)
    for name in PRESETS:
        scheme = preset_name_to_scheme(name, ["Linear"]).model_dump(mode="json")
        by_name = CODEC.plan({**BASE, "config_groups": {name: ["Linear"]}})
        in_full = CODEC.plan({**BASE, "config_groups": {"group_0": scheme}})
        assert by_name.for_module(NAME)[0] == in_full.for_module(NAME)[0], name


@pytest.mark.filterwarnings("ignore")
def test_what_the_library_compresses_reads_as_our_own_encoding() -> None:
    """Every preset, and each width with zero points: planes equal to encode's, from its observers' scales."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, preset_name_to_scheme

    schemes = {name: preset_name_to_scheme(name, ["Linear"]) for name in PRESET_SCHEMES if name != "UNQUANTIZED"}
    for bits in range(2, 9):
        args = {**W4, "num_bits": bits, "symmetric": False, "group_size": 64}
        schemes[f"asymmetric {bits}"] = QuantizationScheme(targets=["Linear"], weights=args)
    for name, scheme in schemes.items():
        packing = str(infer_module_format(torch.nn.Linear, scheme).value)
        group = scheme.model_dump(mode="json") | {"format": packing}
        form = plan_of({"group_0": group}, format=packing).for_module(NAME)[0]
        assert form is not None
        weight = random_weight(128, 256)
        state = qparams(weight, scheme.weights) | {"weight": weight, "input_scale": torch.ones(1)}
        state |= {"input_global_scale": torch.ones(1)}
        written = BaseCompressor.get_value_from_registry(packing).compress(state, scheme)
        back = CODEC.read(form, {f".{ending}": tensor for ending, tensor in written.items()})
        ours = encode(weight, form.weight)
        assert all(torch.equal(back.weight.planes[p], plane) for p, plane in ours.planes.items()), name


def qparams(weight: Tensor, args: Any) -> dict[str, Tensor]:
    """Scales and zeros by the library's own functions."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    outer, x = None, weight
    if args.strategy == "tensor_group":
        outer = generate_gparam(weight.amin(), weight.amax())
    if args.strategy == "block":
        rows, cols = args.block_structure
        x = weight.unflatten(0, (-1, rows)).unflatten(-1, (-1, cols)).transpose(1, 2).flatten(-2)
    elif args.strategy != "tensor":
        x = weight.unflatten(-1, (-1, args.group_size or weight.shape[-1]))
    low, high = (weight.amin(), weight.amax()) if args.strategy == "tensor" else (x.amin(-1), x.amax(-1))
    scale, zero = calculate_qparams(low, high, args, global_scale=outer)
    found = {"weight_scale": scale, "weight_zero_point": zero}
    return found if outer is None else found | {"weight_global_scale": outer}


def plan_of(groups: dict[str, Any], **more: Any) -> Plan:
    return CODEC.plan({**BASE, "config_groups": groups, **more})


def test_rules_match_as_the_library_does() -> None:
    eight = {**W4, "num_bits": 8}
    groups = {
        "group_0": {"targets": ["Linear"], "weights": W4},
        "group_1": {"targets": ["re:.*down_proj", "model.layers.0.mlp.up_proj"], "weights": eight},
        "group_2": {"targets": ["re:.*b"], "weights": {**W4, "num_bits": 3}},
        "group_3": {"targets": ["re:.*a.*b"], "weights": {**W4, "num_bits": 2}},
    }
    plan = plan_of(groups, ignore=["lm_head", "re:.*gate$", "Embedding"])
    bits = {
        "model.layers.0.mlp.down_proj": 8, "model.layers.0.mlp.up_proj": 8, "model.layers.1.mlp.up_proj": 4,
        "lm_head": None, "model.layers.0.mlp.gate": None, "xb": 3, "xab": 2, "model.layers.0.mlp.gate_proj": 4,
    }  # fmt: skip
    for name, want in bits.items():
        form, rule = plan.for_module(name)
        assert (form and form.weight.element.bits) == want, name
        assert rule is not None and "quantization_config" in rule.where
    assert plan.for_module("x", "Embedding")[0] is None
    assert {r.pattern for r in plan.idle(["a.down_proj", "xab"])} == {
        "lm_head", ".*gate$", "Embedding", "model.layers.0.mlp.up_proj",
    }  # fmt: skip


def test_mixed_formats_go_into_groups() -> None:
    assert CODEC.config and CODEC.fit
    names = ("int4-g128", "fp8-channel", "nvfp4", "int8-channel-a8", "int4-g128-asym")
    forms = {f"model.layers.{i}.proj": CODEC.fit(FORMATS[name]) for i, name in enumerate(names)}
    forms["model.layers.9.proj"] = CODEC.fit(FORMATS["fp8-channel"])
    config = CODEC.config(forms, ["lm_head", "model.layers.0.mlp.gate"], None)["quantization_config"]
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 5
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    plan = CODEC.plan(config)
    for name, form in forms.items():
        found = plan.for_module(name)[0]
        assert found is not None and _wide(found.weight) == _wide(form.weight) and found.act == form.act, name
    assert plan.for_module("lm_head")[0] is None


CACHES = {
    "tensor": ({"num_bits": 8, "type": "float", "strategy": "tensor"}, spec(E4M3, (F32, 0, 0), rule="range")),
    "attn_head": ({"num_bits": 8, "type": "float", "strategy": "attn_head"}, spec(E4M3, (F32, 1, 0), rule="range")),
    "int8": ({"num_bits": 8, "type": "int", "strategy": "tensor"}, spec(INT8, (F32, 0, 0), rule="range")),
}


@pytest.mark.parametrize("name", CACHES)
def test_cache_schemes(name: str) -> None:
    args, want = CACHES[name]
    assert CODEC.config
    plan = plan_of({"group_0": {"targets": ["Linear"], "weights": W4}}, kv_cache_scheme=args)
    assert plan.kv == want
    again = CODEC.config({NAME: Format(INT4_G128)}, [], plan.kv)["quantization_config"]
    assert again["kv_cache_scheme"]["strategy"] == args["strategy"] and CODEC.plan(again).kv == want


def test_old_cache_as_the_output_of_projections() -> None:
    output = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
    group = {"targets": ["re:.*k_proj", "re:.*v_proj"], "weights": FP8_ARGS, "output_activations": output}
    plan = plan_of({"group_0": {"targets": ["Linear"], "weights": FP8_ARGS}, "cache": group})
    assert plan.kv == CACHES["tensor"][1] and plan.for_module("a.k_proj")[0] is not None
    attention = {"targets": ["LlamaAttention"], "input_activations": output}
    assert plan_of({"group_0": attention}).rules == ()


@pytest.mark.parametrize("where", ["compression_config", "quantization_config"])
def test_old_places(where: str) -> None:
    inner = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": W4}}, "format": "pack-quantized"}
    old = {"quantization_config": inner, "sparsity_config": {"format": "dense"}}
    located = Located({**old, "quant_method": "compressed_tensors"}, f"config.json: {where}")
    assert codecs.claimant(located)[0].name == "compressed-tensors"
    assert CODEC.plan(located.config).for_module(NAME)[0] is not None
    if where == "compression_config":
        assert codecs.claimant(Located(old, f"config.json: {where}"))[0].name == "compressed-tensors"


def ordered(g_idx: Tensor, k: int = 256) -> tuple[Format, dict[str, Tensor], Tensor]:
    """A file of the old group order: columns where they were, their groups beside them."""
    assert CODEC.write
    form = Format(spec(INT4, (F32, 1, 64), rule="range"))
    index = torch.argsort(g_idx, stable=True)
    weight = random_weight(16, k)
    q = encode(weight[:, index], form.weight)
    shuffled = replace(q, planes=q.planes | {"codes": _packed(columns(q, torch.argsort(index)))})
    tensors = CODEC.write(Quantized(form, shuffled)) | {".weight_g_idx": g_idx.int()}
    return form, tensors, decode(q)[:, torch.argsort(index)]


def _packed(raw: Tensor) -> Tensor:
    return raw[:, 0::2] | (raw[:, 1::2] << 4)


def test_group_order_is_a_permutation_of_the_input() -> None:
    g_idx = torch.arange(256).remainder(4)
    form, tensors, want = ordered(g_idx)
    back = CODEC.read(form, tensors)
    assert back.format.transforms == ("permute",) and torch.equal(effective(back), want)
    x = random_weight(3, 256, seed=1)
    assert torch.allclose(linear(x, back), x @ want.T, atol=1e-4)
    for plain in (torch.arange(256) // 64, torch.full((256,), -1)):
        assert CODEC.read(form, tensors | {".weight_g_idx": plain.int()}).transforms == ()


def test_uncompressed_weights_are_rounded_as_they_are_at_run_time() -> None:
    """Formats dense and fakequant: floats beside their scales."""
    assert CODEC.fit
    for name in ("int8-channel", "int4-g128-asym", "fp8-channel-a16"):
        form = CODEC.fit(FORMATS[name])
        q, weight = filled(form), random_weight()
        tensors = {".weight": weight, ".weight_scale": q.weight.planes["scale0"]}
        if form.weight.zeros:
            from fewbit.quant.qtensor import scale_codes

            tensors[".weight_zero_point"] = (scale_codes(q.weight, "zero0").int() - 8).to(torch.int8)
        back = CODEC.read(form, tensors)
        assert all(torch.equal(back.weight.planes[p], q.weight.planes[p]) for p in q.weight.planes), name


@pytest.mark.parametrize("packing", ["sparse-24-bitmask", "sparse-bitmask"])
def test_bitmasks(packing: str) -> None:
    assert CODEC.fit and CODEC.write
    form = CODEC.fit(FORMATS["fp8-channel"])
    kept = torch.tensor([True, False, False, True]).repeat(64, 64)
    q = Quantized(form, encode(random_weight() * kept, form.weight))
    written = CODEC.write(q)
    values = written[".weight"].view(torch.uint8)[kept].view(torch.float8_e4m3fn).view(64, 128)
    bits = (kept.view(64, 32, 8) * 2 ** torch.arange(8)).sum(-1).to(torch.uint8)
    sparse = {".compressed": values, ".bitmask": bits, ".shape": torch.tensor([[64], [256]])}
    config = {**BASE, "sparsity_config": {"format": packing}, "config_groups": {"g": {"targets": ["Linear"]}}}
    CODEC.plan(config)
    tensors = {".weight_scale": written[".weight_scale"], **sparse}
    back = CODEC.read(form, tensors)
    where = kept & (decode(q.weight) != 0)
    assert torch.equal(decode(back.weight)[where], decode(q.weight)[where])
    assert not decode(back.weight)[~kept].any()
    with pytest.raises(CheckpointError, match="marks 8192 places"):
        CODEC.read(form, tensors | {".compressed": values[:32]})


@pytest.mark.parametrize("head_dim", [None, 64])
def test_a_hadamard_rotation_of_the_input(head_dim: int | None) -> None:
    """Against the library's own transform; what is fused into weights needs nothing."""
    from compressed_tensors.transform.factory.matrix_multiply import apply_transform_weight
    from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix

    assert CODEC.write and CODEC.fit
    steps = [
        {"targets": ["re:.*down_proj$"], "location": "input", "ignore": ["re:.*layers\\.5\\..*"]},
        {"targets": ["re:.*down_proj$"], "location": "weight_input", "inverse": True},
    ]
    scheme = {"type": "hadamard", "apply": steps, "head_dim": head_dim}
    groups = {"group_0": {"targets": ["Linear"], "weights": W4}}
    plan = plan_of(groups, transform_config={"config_groups": {"R4": scheme}})
    for name in ("model.layers.0.mlp.up_proj", "model.layers.5.mlp.down_proj"):
        form = plan.for_module(name)[0]
        assert form is not None and form.transforms == ()
    form, _ = plan.for_module(NAME)
    assert form is not None and plan.for_module("lm_head")[0] is not None
    q = filled(CODEC.fit(FORMATS["int4-g128"]))
    back = CODEC.read(form, CODEC.write(q))
    assert back.format.transforms == ("rotate",)
    x = random_weight(3, 256, seed=1)
    size = head_dim or 256
    matrix = deterministic_hadamard_matrix(size, torch.float32)
    rotated = apply_transform_weight(matrix, x, "input", torch.nn.Linear) / size**0.5
    assert torch.allclose(linear(x, back), rotated @ decode(q.weight).T, atol=1e-4)


TRANSFORM = {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}
SCORES = {"type": "hadamard", "head_dim": 64, "apply": [
    {"targets": ["re:.*self_attn$"], "location": "q_attn"}, {"targets": ["re:.*self_attn$"], "location": "k_cache"},
]}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "marlin": ({"format": "marlin-24"}, "removed"),
    "sparse alone": ({"sparsity_config": {"format": "sparse-24-bitmask"}, "config_groups": {}}, "without quant"),
    "another sparsity": ({"sparsity_config": {"format": "csr"}}, "csr"),
    "a format of tomorrow": ({"format": "trit-quantized"}, "known: pack-quantized"),
    "never calibrated": ({"format": "dense", "quantization_status": "initialized"}, "never set"),
    "outputs": ({"config_groups": {"g": {"targets": ["Linear"], "weights": W4, "output_activations": W4}}}, "returns"),
    "inputs alone": ({"config_groups": {"g": {"targets": ["Linear"], "input_activations": W4}}}, "no weights"),
    "int9": ({"config_groups": {"g": {"targets": ["Linear"], "weights": {**W4, "num_bits": 9}}}}, "1 to 8 bits"),
    "fp6": ({"config_groups": {"g": {"targets": ["Linear"], "weights": {**FP8_ARGS, "num_bits": 6}}}}, "4 and 8"),
    "groups of 0": ({"config_groups": {"g": {"targets": ["Linear"], "weights": {**W4, "group_size": 0}}}}, "positive"),
    "blocks of nothing": (
        {"config_groups": {"g": {"targets": ["Linear"], "weights": {**FP8_ARGS, "strategy": "block"}}}},
        "block_structure",
    ),
    "a strategy": ({"config_groups": {"g": {"targets": ["Linear"], "weights": {**W4, "strategy": "token"}}}}, "token"),
    "static groups": (
        {"config_groups": {"g": {"targets": ["Linear"], "weights": W4, "input_activations": {**W4, "num_bits": 8}}}},
        "static activations per group",
    ),
    "no preset": ({"config_groups": {"W9A16": ["Linear"]}}, "presets"),
    "a group that is a number": ({"config_groups": {"g": 4}}, "must be an object"),
    "groups that are a list": ({"config_groups": [W4]}, "must be an object"),
    "a target that is a number": ({"config_groups": {"g": {"targets": [4], "weights": W4}}}, "must be a string"),
    "a pattern that is none": ({"ignore": ["re:("]}, "regular expression"),
    "a matrix of any kind": (
        {"transform_config": {"config_groups": {"u": {**TRANSFORM, "type": "random-matrix"}}}}, "location input",
    ),
    "a rotation of outputs": (
        {"transform_config": {"config_groups": {"u": {"type": "hadamard", "apply": [
            {"targets": ["Linear"], "location": "output"}]}}}}, "location output",
    ),
    "a rotation of keys that the cache rounds": (
        {"transform_config": {"config_groups": {"R3": SCORES}}, "kv_cache_scheme": {**FP8_ARGS, "strategy": "tensor"}},
        "location q_attn",
    ),
    "a rotation of queries": (
        {"transform_config": {"config_groups": {"R3": {"type": "hadamard", "apply": [
            {"targets": ["re:.*self_attn"], "location": "q_attn"}]}}}}, "location q_attn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_configs_that_are_refused(name: str) -> None:
    changes, message = REFUSED[name]
    base = {**BASE, "config_groups": {"group_0": {"targets": ["Linear"], "weights": W4}}}
    with pytest.raises((UnsupportedError, CheckpointError, SpecError), match=message):
        CODEC.plan(base | changes)


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))


def test_queries_and_keys_turned_alike_need_nothing() -> None:
    groups = {"group_0": {"targets": ["Linear"], "weights": W4}}
    plan = plan_of(groups, transform_config={"config_groups": {"R3": SCORES}})
    form, _ = plan.for_module(NAME)
    assert form is not None and form.transforms == ()


@pytest.mark.parametrize(("inverse", "permuted"), [(False, False), (True, False), (True, True)])
def test_a_rotation_whose_matrix_stands_under_one_of_its_modules(tmp_path: Path, inverse: bool, permuted: bool) -> None:
    """Files hold it once for each size, up to its norm; against the definition x P / sqrt(n)."""
    assert CODEC.write and CODEC.fit and CODEC.config
    sizes = {f"model.layers.{leaf}": k for leaf, k in (("0.down_proj", 256), ("1.down_proj", 256), ("0.up_proj", 128))}
    plain = {name: filled(CODEC.fit(FORMATS["int4-g128"]), 64, k) for name, k in sizes.items()}
    held = {k: torch.linalg.qr(random_weight(k, k, seed=k).double())[0] * k**0.5 for k in (128, 256)}
    orders = {k: torch.randperm(k, generator=torch.Generator().manual_seed(k)) for k in held}
    tensors = {f"{name}{ending}": t for name, q in plain.items() for ending, t in CODEC.write(q).items()}
    for name in list(sizes)[::2]:
        tensors[f"{name}.v_input.weight"] = held[sizes[name]]
        tensors |= {f"{name}.v_input.perm": orders[sizes[name]]} if permuted else {}
    whole = CODEC.config({name: q.format for name, q in plain.items()}, [], None)["quantization_config"]
    step = {"targets": ["Linear"], "location": "input", "inverse": inverse}
    scheme = {"type": "random-hadamard", "randomize": permuted, "apply": [step]}
    write_checkpoint(tmp_path, tensors, {**whole, "transform_config": {"config_groups": {"v": scheme}}})
    with codecs.open(tmp_path) as source:
        assert source.problems == [] and source.modules.keys() == plain.keys() and not source.dense
        for name, q in plain.items():
            back, k, order = source.read(name), sizes[name], orders[sizes[name]]
            assert isinstance(back, Quantized)
            matrix = held[k][order][:, order] if permuted else held[k]
            x = random_weight(3, k, seed=1)
            want = (x.double() @ (matrix.T if inverse else matrix) / k**0.5).float() @ decode(q.weight).T
            assert torch.allclose(linear(x, back), want, atol=1e-4)


def test_a_random_rotation_without_its_matrix() -> None:
    assert CODEC.write and CODEC.fit
    groups = {"group_0": {"targets": ["Linear"], "weights": W4}}
    plan = plan_of(groups, transform_config={"config_groups": {"v": {**TRANSFORM, "type": "random-hadamard"}}})
    form, _ = plan.for_module(NAME)
    assert form is not None
    with pytest.raises(UnsupportedError, match="must be in the file"):
        CODEC.read(form, CODEC.write(filled(CODEC.fit(FORMATS["int4-g128"]))))


def test_embeddings_follow_the_rule_of_their_class(tmp_path: Path) -> None:
    assert CODEC.write and CODEC.fit and CODEC.config
    formats = {"model.embed_tokens": "int8-channel", "model.layers.0.mlp.up_proj": "int4-g128"}
    held = {name: filled(CODEC.fit(FORMATS[row])) for name, row in formats.items()}
    tensors = {f"{name}{ending}": t for name, q in held.items() for ending, t in CODEC.write(q).items()}
    eight = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    groups = {"a": {"targets": ["Embedding"], "weights": eight}, "b": {"targets": ["Linear"], "weights": W4}}
    write_checkpoint(tmp_path, tensors, {**BASE, "config_groups": groups})
    with codecs.open(tmp_path) as source:
        assert source.problems == []
        for name, q in held.items():
            back = source.read(name)
            assert isinstance(back, Quantized) and torch.equal(decode(back.weight), decode(q.weight))
    alike = dict.fromkeys(formats, held["model.embed_tokens"].format)
    (group,) = CODEC.config(alike, [], None)["quantization_config"]["config_groups"].values()
    assert group["targets"] == ["Linear", "model.embed_tokens"]


def stored(row: str) -> tuple[Format, dict[str, Tensor]]:
    assert CODEC.fit and CODEC.write
    form = CODEC.fit(FORMATS[row])
    return form, CODEC.write(filled(form))


# row, tensor, what becomes of it (None: it is not there), what the error says
LIES: list[tuple[str, str, Any, str]] = [
    ("int4-g128", ".weight_scale", None, "weight_scale is missing"),
    ("int4-g128", ".weight_shape", None, "weight_shape is missing"),
    ("int4-g128", ".weight_shape", torch.tensor([64, 512]), r"want \[64, 64\] words .* found \[64, 32\]"),
    ("int4-g128", ".weight_shape", torch.tensor([64]), "two positive sizes"),
    ("int4-g128", ".weight_shape", torch.tensor([-64, 256]), "two positive sizes"),
    ("int4-g128", ".weight_scale", lambda t: t[:, :1], r"weight_scale: want \[64, 2\] scales .* found \[64, 1\]"),
    ("int4-g128", ".weight_scale", lambda t: t.T, r"want \[64, 2\]"),
    ("int4-g128", ".weight_scale", lambda t: t.int(), "want F32, F16 or BF16 scales, found int32"),
    ("int4-g128", ".weight_packed", lambda t: t.long(), "uint8 matrix"),
    ("int4-g128", ".weight_packed", lambda t: t.flatten(), "int32 matrix"),
    ("int4-g128", ".weight_zero_point", torch.ones(8, 2, dtype=torch.int32), "the config says symmetric"),
    ("int4-g128-asym", ".weight_zero_point", None, "weight_zero_point is missing: the weights are asymmetric"),
    ("int4-g128-asym", ".weight_zero_point", lambda t: t[:4], r"want \[8, 2\] words"),
    ("int4-g128-asym", ".weight_zero_point", lambda t: t.float(), r"want \[64, 2\] int8"),
    ("int8-channel-a8", ".weight", lambda t: t.float().to(torch.float8_e4m3fn), "int8 matrix"),
    ("fp8-channel", ".weight", lambda t: t.view(torch.int8), "float8_e4m3fn matrix"),
    ("fp8-channel", ".weight", None, "weight is missing: or .weight_packed"),
    ("fp8-channel", ".weight_scale", lambda t: t[:32], r"want \[64, 1\]"),
    ("fp8-tensor-static", ".input_scale", None, "input_scale is missing"),
    ("fp8-block", ".weight_scale", lambda t: t.repeat(2, 1), r"one for each 128 x 128"),
    ("nvfp4", ".weight_global_scale", None, "two levels"),
    ("nvfp4", ".input_global_scale", None, "input_global_scale is missing"),
    ("nvfp4", ".weight_scale", lambda t: t.float(), "e4m3 in a byte"),
    ("mxfp4", ".weight_scale", lambda t: t.repeat(1, 2), r"want \[64, 8\]"),
    ("mxfp8", ".weight_scale", lambda t: t.float(), "e8m0 in a byte"),
]


@pytest.mark.parametrize("case", range(len(LIES)))
def test_tensors_that_lie(case: int) -> None:
    row, ending, change, message = LIES[case]
    form, tensors = stored(row)
    if change is None:
        del tensors[ending]
    else:
        tensors[ending] = change(tensors[ending]).contiguous() if callable(change) else change
    with pytest.raises(CheckpointError, match=message):
        CODEC.read(form, tensors)


def test_more_lies() -> None:
    form, tensors, _ = ordered(torch.arange(256).remainder(4))
    old = plan_of({"group_0": {"targets": ["Linear"], "weights": {**W4, "group_size": 64, "actorder": "group"}}})
    declared = old.for_module(NAME)[0]
    assert declared is not None and CODEC.read(declared, tensors).format.transforms == ("permute",)
    with pytest.raises(CheckpointError, match="weight_g_idx is missing: actorder = group"):
        CODEC.read(declared, {ending: t for ending, t in tensors.items() if ending != ".weight_g_idx"})
    with pytest.raises(CheckpointError, match="64 columns in each"):
        CODEC.read(form, tensors | {".weight_g_idx": torch.zeros(256, dtype=torch.int32)})
    with pytest.raises(CheckpointError, match="one group for each of 256"):
        CODEC.read(form, tensors | {".weight_g_idx": torch.zeros(8, dtype=torch.int32)})
    wide = {".weight": torch.full((4, 128), 9, dtype=torch.int8), ".weight_scale": torch.ones(4, 1)}
    with pytest.raises(CheckpointError, match=r"must lie in -8 \.\. 7, found 9"):
        CODEC.read(Format(INT4_G128), wide)
    with pytest.raises(CheckpointError, match="the config says e2m1"):
        CODEC.read(FORMATS["mxfp4-a16"], stored("int4-g128")[1])


@pytest.mark.parametrize("row", ["nf4", "q4_k", "q6_k", "mxfp6-e2m3", "mxint8", "fp8-e5m2-tensor", "iq4_nl", "fp4"])
def test_fit_says_why_not(row: str) -> None:
    assert CODEC.fit
    with pytest.raises(UnsupportedError) as refusal:
        CODEC.fit(FORMATS[row])
    assert refusal.value.reasons


def test_fit_says_why_not_of_more() -> None:
    assert CODEC.fit and CODEC.write
    smoothed = Format(INT4_G128, None, ("input_scale",))
    rounded = Format(INT4_G128, QuantSpec(E4M3, (Scale(F32, (0, 128)),)))
    for form in (smoothed, rounded, Format(spec(INT8, (F32, 2, 0)))):
        with pytest.raises(UnsupportedError):
            CODEC.fit(form)
    static = CODEC.fit(FORMATS["fp8-tensor-static"])
    with pytest.raises(UnsupportedError, match="calibrate"):
        CODEC.write(Quantized(static, encode(random_weight(), static.weight)))
    stacked = CODEC.fit(FORMATS["int4-g128"])
    with pytest.raises(UnsupportedError, match="each expert apart"):
        CODEC.write(Quantized(stacked, encode(torch.randn(2, 64, 256), stacked.weight)))


def test_layout_names() -> None:
    """What other readers look for."""
    form, tensors = stored("nvfp4")
    assert layout(tensors) == {
        ".weight_packed": (torch.uint8, (64, 128)),
        ".weight_scale": (torch.float8_e4m3fn, (64, 16)),
        ".weight_global_scale": (torch.float32, (1,)),
        ".input_global_scale": (torch.float32, (1,)),
    }
    assert form.act is not None and form.act.scales[1].op == "div" and not form.act.scales[1].dynamic
