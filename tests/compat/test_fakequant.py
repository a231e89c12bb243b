"""Fakequant: what is served is what quantizing in place computes, whoever says how and wherever it comes from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fewbit.compat.modelopt as mtq
from fewbit.compat import fakequant, fakequant_run, fakequant_write
from fewbit.compat.fakequant import Fakequant
from fewbit.compat.group import grouped
from fewbit.errors import CheckpointError, FewbitError, RequestError, UnsupportedError
from fewbit.models import emulation, hf
from fewbit.models.build import load
from fewbit.quant.formats import FORMATS
from fewbit.workflows.calibration import calibration
from tests.compat import small
from tests.models import saved

CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.folder(tmp_path_factory.mktemp("fakequant") / "base")


@pytest.fixture(autouse=True)
def same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration sees what small.loop runs."""
    monkeypatch.setattr(fakequant, "samples", lambda *_: calibration(None, small.ids()))


def made(path: Path, dtype: torch.dtype = BF16, **asked: Any) -> Any:
    """The model as it is served."""
    found = fakequant.emulation(path, Fakequant(**asked), CPU, dtype)
    return load(path, dtype=dtype, kernels="emulated", format=found.arrivals, kv=found.sides)


def keyword(name: str) -> str:
    return "kv_fakequant" if "_KV_" in name else "fakequant"


@pytest.mark.parametrize("name", [n for n in mtq.PRESETS if n != "NVFP4_EXPERTS_ONLY_CFG"])
def test_every_preset_is_quantize_in_place(name: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, in bfloat16; what engines fuse has one scale here."""
    monkeypatch.setattr(mtq, "made", fakequant_run.quantizer)
    theirs = small.model(base, dtype=BF16)
    theirs.config._attn_implementation = hf.OURS
    mtq.quantize(theirs, getattr(mtq, name), small.loop)
    for group in grouped(theirs):
        fakequant_run.merge(group)
    got, want = small.logits(made(base, **{keyword(name): name})), small.logits(theirs)
    assert torch.equal(got, want)
    assert not torch.equal(want, small.logits(small.model(base, dtype=BF16)))


def test_experts(tmp_path: Path) -> None:
    """A stack of experts: scales of each, one for what they read; calibrated, written, read again."""
    theirs = saved.model("qwen3_moe")  # in float32: few rows of bfloat16 are added up in another order
    saved.save(theirs, tmp_path / "m")
    theirs.config._attn_implementation = hf.OURS
    mtq.quantize(theirs, mtq.NVFP4_EXPERTS_ONLY_CFG, lambda m: [m(row[None] % 90) for row in small.ids()])
    text = {"data": small.ids() % 90}
    state = fakequant.calibrate(tmp_path / "m", tmp_path / "out", "NVFP4_EXPERTS_ONLY_CFG", text=text)
    assert "model.layers.0.mlp.experts.1.up_proj.weight_quantizer._amax" in state
    want = saved.logits(theirs)
    again = made(tmp_path / "out", torch.float32, amax_file=str(tmp_path / "out"))
    torch.testing.assert_close(saved.logits(again), want, rtol=1e-4, atol=1e-5)
    vllm: dict[str, Tensor] = {}
    for key, t in state.items():
        host, _, rest = key.partition(".experts.")
        _, leaf, role, suffix = rest.split(".")
        spelled = f"{host}.experts.routed_experts.{'w2' if leaf == 'down_proj' else 'w13'}_{role}.{suffix}"
        vllm[spelled] = torch.maximum(vllm.get(spelled, t), t)
    torch.save(vllm, tmp_path / "amax.pth")
    found = made(tmp_path / "m", amax_file=str(tmp_path / "amax.pth"), fakequant="NVFP4_EXPERTS_ONLY_CFG")
    assert (
        torch.nn.functional.cosine_similarity(saved.logits(found).float().flatten(), want.float().flatten(), 0) > 0.99
    )


def e4m3(x: Tensor, amax: Tensor) -> Tensor:
    codes = (x.detach().float() / (amax / 448)).clamp(-448, 448).numpy().astype(ml_dtypes.float8_e4m3fn)
    return torch.from_numpy(codes.astype(np.float32)) * (amax / 448)


def nvfp4(x: Tensor, amax: Tensor) -> Tensor:
    """Two levels: e2m1 in blocks of 16 with scales in e4m3, under one float."""
    outer = amax / (6 * 448)
    blocks = x.detach().float().reshape(*x.shape[:-1], -1, 16)
    inner = (blocks.abs().amax(-1, keepdim=True) / 6 / outer).clamp(2.0**-9, 448)
    inner = torch.from_numpy(inner.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    codes = (blocks / (inner * outer)).clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return (torch.from_numpy(codes) * inner * outer).reshape(x.shape)


def test_transformers_rounded_by_hand(base: Path) -> None:
    """FP8 linears and NVFP4 keys and values, by casts of ml_dtypes in hooks of transformers' own model."""
    theirs = small.model(base)
    theirs.config._attn_implementation = hf.OURS
    attentions = [layer.self_attn for layer in theirs.model.layers]
    linears = {n: m for n, m in theirs.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"}
    seen: dict[str, Tensor] = {}

    def noting(name: str) -> Callable[..., None]:
        def hook(_: Any, args: Any) -> None:
            seen[name] = torch.maximum(seen.get(name, torch.zeros(())), args[0].abs().max())

        return hook

    hooks = [m.register_forward_pre_hook(noting(n)) for n, m in linears.items()]
    kv: dict[Any, list[Tensor]] = {a: [torch.zeros(()), torch.zeros(())] for a in attentions}
    for a in attentions:

        def watch(key: Tensor, value: Tensor, a: Any = a) -> None:
            kv[a] = [torch.maximum(top, t.abs().max()) for top, t in zip(kv[a], (key, value), strict=True)]

        a.fewbit_watch_kv = watch
    with torch.no_grad():
        small.loop(theirs)
    for h in hooks:
        h.remove()
    for a in attentions:
        del a.fewbit_watch_kv
    for n, m in linears.items():
        leaves = next(
            (g for g in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")) if n.split(".")[-1] in g), ()
        )
        group = [n.rpartition(".")[0] + "." + leaf for leaf in leaves] or [n]
        top, reach = (torch.stack(ts).amax() for ts in ([linears[g].weight.detach().abs().max() for g in group],
                                                        [seen[g] for g in group]))  # fmt: skip
        m.rounded = e4m3(m.weight.data, top)
        m.register_forward_pre_hook(lambda _, args, reach=reach: (e4m3(args[0], reach),))
    for m in linears.values():
        m.weight.data = m.rounded

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **more: Any) -> Any:
        from fewbit.modules import attention

        key, value = (nvfp4(t, top) for t, top in zip((key, value), kv[module], strict=True))
        return attention.forward(module, query, key, value, *args, **more)

    hf.register_attention("by-hand", attend)
    theirs.config._attn_implementation = "by-hand"
    got = small.logits(made(base, torch.float32, fakequant="FP8_DEFAULT_CFG", kv_fakequant="NVFP4_KV_CFG"))
    torch.testing.assert_close(got, small.logits(theirs), rtol=1e-4, atol=1e-4)


def same(a: Any, b: Any) -> bool:
    return torch.equal(small.logits(a), small.logits(b))


RECIPE = """
version: 1
format: nvfp4
algo: rtn
rules:
- {match: '*self_attn*', format: fp8-channel}
- {match: '*layers.1.mlp*', format: dense}
"""
CONFIG = {"quant_cfg": [{"quantizer_name": "*", "enable": False},
                        {"quantizer_name": "*self_attn*proj.weight_quantizer", "cfg": {"num_bits": [4, 3], "axis": 0}},
                        {"quantizer_name": "*layers.0.mlp*weight_quantizer", "cfg": {
                            "num_bits": [2, 1], "block_sizes": {"-1": 16, "type": "dynamic", "scale_bits": [4, 3]}}}],
          "algorithm": "max"}  # fmt: skip


def test_whatever_says_it(base: Path, tmp_path: Path) -> None:
    """Dicts of both forms, files, rows, schemes and recipes come to the same."""
    entries = {rule["quantizer_name"]: rule["cfg"] for rule in CONFIG["quant_cfg"][1:]}
    old = {"quant_cfg": {"default": {"enable": False}, **entries}, "algorithm": "max"}
    want = made(base, fakequant=CONFIG)
    (tmp_path / "c.json").write_text(json.dumps(CONFIG))
    (tmp_path / "c.yaml").write_text(f"metadata: {{recipe_type: ptq}}\nquantize: {json.dumps(CONFIG)}\n")
    for asked in (old, str(tmp_path / "c.json"), str(tmp_path / "c.yaml")):
        assert same(made(base, fakequant=asked), want)
    assert same(made(base, fakequant="nvfp4-a16"), made(base, fakequant="NVFP4A16"))
    (tmp_path / "r.yaml").write_text(RECIPE)
    mixed = made(base, fakequant=str(tmp_path / "r.yaml"))
    found = {n: m.parts[0].quantized.format for n, m in mixed.named_modules() if getattr(m, "parts", ())}
    assert found["model.layers.1.self_attn.q_proj"] == FORMATS["fp8-channel"]
    assert found["model.layers.0.mlp.up_proj"] == FORMATS["nvfp4"] and "model.layers.1.mlp.up_proj" not in found


@pytest.mark.parametrize("name", ["int4-g32-asym", "nf4-dq", "mxfp6-e3m2", "int8-channel-a8", "fp8-tensor-static"])
def test_rows(name: str, tmp_path: Path) -> None:
    """Any row serves as quantizing on arrival does; static inputs are calibrated."""
    path = small.folder(tmp_path, hidden_size=256)
    got = small.logits(made(path, fakequant=name))
    if name != "fp8-tensor-static":
        assert torch.equal(got, small.logits(load(path, format=name, kernels="emulated")))
    assert not torch.equal(got, small.logits(load(path)))


@pytest.mark.parametrize("algo", ["gptq", "awq", "smooth"])
def test_algorithms_of_a_recipe(algo: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"version: 1\nformat: int4-g32-asym\nalgo: {algo}\n")
    plain, better = (made(base, torch.float32, fakequant=f) for f in ("int4-g32-asym", str(tmp_path / "r.yaml")))
    want = small.logits(small.model(base))
    errors = [float((small.logits(m) - want).square().mean()) for m in (plain, better)]
    assert errors[0] != errors[1] and (algo == "smooth" or errors[1] < errors[0])


FILES = ["FP8_DEFAULT_CFG", "NVFP4_AWQ_FULL_CFG", "INT4_AWQ_CFG", "NVFP4_SVDQUANT_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG",
         "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "NVFP4_AFFINE_KV_CFG"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_state_serves_what_calibration_serves(name: str, base: Path, tmp_path: Path) -> None:
    asked = {keyword(name): name, "kv_fakequant": name if "_KV_" in name else "FP8_KV_CFG"}
    want = made(base, **asked)
    out = tmp_path / "out"
    state = fakequant.calibrate(base, out, **asked, text={"data": small.ids()})
    assert load_file(out / "quant_amax.st").keys() == state.keys()
    pickled = torch.load(out / "quant_amax.pth", weights_only=True)
    assert all(torch.equal(pickled[key], t) for key, t in state.items()) and pickled.keys() == state.keys()
    assert "model.layers.0.self_attn.k_bmm_quantizer._amax" in state
    assert same(made(out, amax_file=str(out)), want)
    assert same(made(out, amax_file=str(out / "quant_amax.pth"), **asked), want)
    if any(key.endswith("_pre_quant_scale") for key in state):
        with pytest.raises(CheckpointError, match="serve the folder that the file was written into"):
            made(base, amax_file=str(out))


def test_a_state_as_vllm_spells_it(base: Path, tmp_path: Path) -> None:
    """Fused linears, attention one level down, rows one below the other; and Megatron's underscore."""
    name = {"fakequant": {"quant_cfg": [{"quantizer_name": "*", "enable": False},
                                        {"quantizer_name": "*proj.weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
                                        {"quantizer_name": "*proj.input_quantizer", "cfg": {"num_bits": 8}}],
                          "algorithm": "max"}, "kv_fakequant": "FP8_KV_CFG"}  # fmt: skip
    want = made(base, **name)
    state = fakequant.calibrate(base, tmp_path / "out", **name, text={"data": small.ids()})
    parts: dict[str, list[Tensor]] = {}
    for leaf in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj", "down_proj", "bmm"):
        for key in (k for k in state if leaf in k):
            spelled = key.replace(f".{leaf}.", ".qkv_proj." if leaf[0] in "qkv" else ".gate_up_proj." if leaf[0] in "gu"
                                  else f".{leaf}.").replace("self_attn.k_bmm", "self_attn.attn.k_bmm")  # fmt: skip
            spelled = spelled.replace("self_attn.v_bmm", "self_attn.attn.v_bmm")
            parts.setdefault(spelled, []).append(state[key])
    fused = {k: torch.cat(ts) if ts[0].dim() else torch.stack(ts).amax() for k, ts in parts.items()}
    torch.save(fused, tmp_path / "vllm.pth")
    assert same(made(base, amax_file=str(tmp_path / "vllm.pth"), **name), want)
    torch.save({k.replace("quantizer._amax", "quantizer_amax"): t for k, t in state.items()}, tmp_path / "mcore.pth")
    assert same(made(base, amax_file=str(tmp_path / "mcore.pth"), **name), want)
    nested: dict[str, Any] = {}
    for key, t in state.items():
        nested.setdefault(key.rpartition(".")[0], {})[key.rpartition(".")[2]] = t
    torch.save({"modelopt_state_weights": nested, "modelopt_version": "0.41"}, tmp_path / "later.pth")
    assert same(made(base, amax_file=str(tmp_path / "later.pth"), **name), want)


def test_weights_that_came_folded(base: Path, tmp_path: Path) -> None:
    """Newer exports have weights rounded already, and no magnitudes of them."""
    state = fakequant.calibrate(base, tmp_path / "out", "FP8_DEFAULT_CFG", text={"data": small.ids()})
    torch.save(
        {k: t for k, t in state.items() if "weight_quantizer" not in k}, tmp_path / "out" / "quantizer_state.pth"
    )
    found = made(tmp_path / "out", fakequant="FP8_DEFAULT_CFG", amax_file=str(tmp_path / "out" / "quantizer_state.pth"))
    formats = {m.parts[0].quantized.format.weight.element.name for m in found.modules() if getattr(m, "parts", ())}
    assert formats == {"bf16"}
    torch.save({k: t for k, t in state.items() if "down_proj.input" not in k}, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match=r"no model\.layers\.0\.mlp\.down_proj\.input_quantizer\._amax"):
        made(base, fakequant="FP8_DEFAULT_CFG", amax_file=str(tmp_path / "less.pth"))


def test_an_emulation_is_written_and_read(base: Path, tmp_path: Path) -> None:
    asked = Fakequant(fakequant="NVFP4_SVDQUANT_DEFAULT_CFG", kv_fakequant="NVFP4_AFFINE_KV_CFG")
    found = fakequant.emulation(base, asked, CPU, BF16)
    found.write(tmp_path / "e.safetensors")
    again = emulation.read(tmp_path / "e.safetensors")
    models = [load(base, kernels="emulated", format=e.arrivals, kv=e.sides) for e in (found, again)]
    assert same(*models)


WRONG: list[tuple[dict[str, Any], type[FewbitError], str]] = [
    ({"fakequant": "NVFP4_DEFUALT_CFG"}, RequestError, "near: NVFP4_DEFAULT_CFG"),
    ({"fakequant": "missing.yaml"}, RequestError, "cannot be read as a config"),
    ({"fakequant": {"quant_cfg": {"*q_prj*": {"num_bits": 8}}}}, RequestError, "matches no quantizer"),
    (
        {"fakequant": {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "bias": {-1: None}}}}},
        UnsupportedError,
        "bias",
    ),
    ({"fakequant": "NVFP4_EXPERTS_ONLY_CFG"}, RequestError, "no rule switches on"),
    ({"kv_fakequant": "int4-g32-asym"}, UnsupportedError, "symmetric ones"),
    ({"fakequant": "int8-channel", "calib_size": 0}, RequestError, "calib_size=0"),
    ({"amax_file": "nowhere.pth"}, CheckpointError, "there is no such file"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_what_is_refused(case: int, base: Path) -> None:
    asked, kind, text = WRONG[case]
    with pytest.raises(kind, match=text):
        made(base, **asked)


def test_a_quantized_model_is_refused(base: Path, tmp_path: Path) -> None:
    mtq.export_hf_checkpoint(mtq.quantize(small.model(base), mtq.FP8_DEFAULT_CFG, small.loop), tmp_path)
    with pytest.raises(UnsupportedError, match="fakequant rounds float weights"):
        made(tmp_path, fakequant="nvfp4")


def test_an_interrupt_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fakequant.calibrate(base, out, "FP8_DEFAULT_CFG", text={"data": small.ids()}, tell=stop)
    assert not out.exists()

    def fails(self: Any, name: str) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(fakequant_write.Weights, "read", fails)
    with pytest.raises(KeyboardInterrupt):
        fakequant.calibrate(base, out, "FP8_DEFAULT_CFG", text={"data": small.ids()})
    assert not out.exists() or not list(out.iterdir())


def test_the_text_that_ships_where_no_hub_is(base: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = fakequant.samples(small.tokenizer(), "cnn_dailymail", 3, 64)
    assert found.source == "shipped" and len(found.ids) == 3 and "calibrating on the text that ships" in caplog.text
    with pytest.raises(RequestError, match="neither a file or folder nor the name of a data set"):
        fakequant.samples(small.tokenizer(), "cnn-dailymial", 3, 64)
    assert 2 <= len(fakequant.samples(small.tokenizer(), None, 1 << 22, 64).ids) < 1 << 22
