"""quantization="inc" in an engine: observers, files, lists, ranks, what is refused, and what reaches a device."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fewbit
from fewbit import LLM, SamplingParams
from fewbit.compat import inc
from fewbit.engine import gaudi
from fewbit.engine.config import EngineConfig
from fewbit.errors import FewbitError, RequestError, UnsupportedError
from fewbit.inc import config as configs
from fewbit.inc.measure import Measure
from fewbit.inc.session import Session
from fewbit.models import fill
from fewbit.models.build import load
from tests.models import saved
from tests.server.served import model

PROMPTS = [[5, 6, 7, 8, 9, 30, 31], [20, 21, 22], [100, 5, 60, 61, 62, 63, 64, 65, 66, 9, 9, 12]]
GREEDY = {"temperature": 0.0, "ignore_eos": True}
QKV, IMPL = "model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.attn.impl"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved.save(saved.model("llama"), tmp_path_factory.mktemp("engine") / "llama")


@pytest.fixture(scope="module")
def stats(path: Path) -> Path:
    """A folder that has the measurements of `path`."""
    folder = path.parent / "measured"
    folder.mkdir()
    run(path, config(folder, mode="MEASURE"))
    return folder


def config(folder: Path, **keys: Any) -> Path:
    file = folder / f"config{len(list(folder.glob('config*')))}.json"
    file.write_text(json.dumps({"dump_stats_path": str(folder / "out" / "inc"), **keys}))
    return file


def run(path: Path, quant: Path | None, tokens: int = 4, **options: Any) -> list[list[int]]:
    more = {"quant_config": str(quant)} if quant is not None else {}
    llm = LLM(str(path), **{"quantization": "inc", "dtype": "float32", **more, **options})
    try:
        found = llm.generate(PROMPTS, SamplingParams(max_tokens=tokens, **GREEDY))
    finally:
        llm.llm_engine.model_executor.shutdown()
    return [list(one.outputs[0].token_ids) for one in found]


def nodes(folder: Path, name: str = "inc_hooks_maxabs.json") -> Any:
    return json.loads((folder / "out" / name).read_text())["Nodes"]


def test_measuring_changes_nothing(path: Path, stats: Path, tmp_path: Path) -> None:
    """Nor does fp8_inc while it measures; earlier files are put aside, with the scales that were made of them."""
    plain = run(path, None, quantization=None)
    assert run(path, config(tmp_path, mode="measure"), kv_cache_dtype="fp8_inc") == plain
    first = nodes(tmp_path)
    assert first == nodes(stats)
    run(path, config(tmp_path))
    run(path, config(tmp_path, mode="MEASURE"))
    assert nodes(tmp_path) == first
    (old,) = (tmp_path / "out").glob("inc_backup_*")
    assert {p.name for p in old.iterdir()} >= {"inc_hooks_maxabs.json", "inc_hooks_maxabs_MAXABS_HW.npz"}


def test_channels(path: Path, stats: Path, tmp_path: Path) -> None:
    """One maximum for each channel, whose largest is the tensor's; scales are made of that."""
    run(path, config(tmp_path, mode="MEASURE", observer="maxabs_per_channel", measure_exclude="NONE"))
    found, one = nodes(tmp_path, "inc_hooks_maxabs_per_channel.json"), nodes(stats)
    for name, node in one.items():
        for part in ("inputs", "outputs"):
            for wide, narrow in zip(found[name].get(part, []), node.get(part, []), strict=False):
                assert np.max(wide) == pytest.approx(narrow[0][0], rel=1e-5)
    attention = saved.model("llama").model.layers[0].self_attn
    rows = [attention.q_proj, attention.k_proj, attention.v_proj]
    want = torch.cat([m.weight.detach().abs().amax(1) for m in rows])
    torch.testing.assert_close(torch.tensor(found[QKV]["params"]["weight"])[:, 0], want)
    assert len(found[QKV]["outputs"][0]) == len(want) and len(found[QKV]["inputs"][0]) == attention.q_proj.in_features
    quant = config(tmp_path, observer="maxabs_per_channel")
    assert run(path, quant) == run(path, config(stats))


def test_shapes_and_tensors(path: Path, tmp_path: Path) -> None:
    run(path, config(tmp_path, mode="SHAPE"), tokens=1)
    shapes = json.loads((tmp_path / "out" / "inc_hooks_shape.json").read_text())
    assert shapes["Mode"] == "Shape" and shapes["Nodes"][QKV]["inputs"][0][0][-1] == 64
    run(path, config(tmp_path, mode="MEASURE", observer="save", allowlist={"names": ["layers.0.*qkv"]}), tokens=1)
    (file,) = (tmp_path / "out" / "tensors").glob(f"{QKV}_input0_iter0*")
    assert load_file(file)["x"].shape == (1, sum(map(len, PROMPTS)), 64)


def test_what_is_excluded(path: Path, tmp_path: Path) -> None:
    run(path, config(tmp_path, mode="MEASURE", measure_exclude="NONE"), tokens=1)
    assert set(nodes(tmp_path)[QKV]) == {"inputs", "outputs", "params"}
    run(path, config(tmp_path, mode="MEASURE", measure_exclude="PARAMS"), tokens=1)
    assert set(nodes(tmp_path)[QKV]) == {"inputs", "outputs"}
    found = run(path, config(tmp_path))  # weights are looked at where they were not measured
    assert found == run(path, config(tmp_path, recalc_scales=True))


def test_dumps_in_between(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quant = config(tmp_path, mode="MEASURE", calibration_sample_interval=2)
    with LLM(str(path), quantization="inc", quant_config=str(quant), dtype="float32") as llm:
        llm.generate(PROMPTS, SamplingParams(max_tokens=3, **GREEDY))
        assert json.loads((tmp_path / "out" / "inc_hooks_maxabs.json").read_text())["NumSamples"] == 2
    assert json.loads((tmp_path / "out" / "inc_hooks_maxabs.json").read_text())["NumSamples"] == 3


def test_what_is_not_finite(path: Path, tmp_path: Path) -> None:
    model = load(path)
    measure = Measure(model, configs.read(config(tmp_path, mode="MEASURE")))
    with torch.no_grad():
        model(inputs_embeds=torch.full((1, 3, 64), torch.inf))
    with pytest.raises(UnsupportedError, match=r"qkv_proj: its inputs were not finite"):
        measure.write()


def planned(path: Path, quant: Path, cached: bool = True) -> Session:
    session = Session(quant)
    session.plan(path, cached)
    return session


def test_lists_choose(path: Path, stats: Path) -> None:
    block = config(stats, blocklist={"types": ["Softmax", "Matmul", "ModuleFusedSDPA"], "names": ["lm_head", r"\.1\."]})
    found = planned(path, block).becomes
    layer = "model.layers.0."
    assert set(found.arrivals) == {
        layer + p for p in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }  # fmt: skip
    assert set(found.kv) == {"model.layers.0.self_attn"} and not found.inside
    only = planned(path, config(stats, allowlist={"names": ["mlp.down_proj"]}), cached=False).becomes
    assert set(only.arrivals) == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"} and not only.kv
    with pytest.raises(RequestError, match="leave the caches out"):
        planned(path, config(stats, blocklist={"types": ["KVCache"]}))
    with pytest.raises(UnsupportedError, match="keys or values alone"):
        planned(path, config(stats, blocklist={"names": ["v_cache", "matmul", "fused"]}))


def test_the_fused_share_scales(path: Path, stats: Path) -> None:
    found = planned(path, config(stats)).becomes.arrivals
    scales = [found[f"model.layers.0.self_attn.{p}_proj"].weight["scale0"] for p in "qkv"]
    assert torch.equal(scales[0], scales[1]) and torch.equal(scales[1], scales[2]) and scales[0].shape == (1, 1)
    rows = planned(path, config(stats, scale_method="act_maxabs_hw_weights_pcs_maxabs_pow2")).becomes.arrivals
    assert rows["model.layers.0.self_attn.k_proj"].weight["scale0"].shape[0] > 1


def test_names_of_hugging_face(path: Path, stats: Path, tmp_path: Path) -> None:
    """A file of the parts, under transformers' names, is as good; what is missing is said, or passed over."""
    held = dict(nodes(stats))
    for name in list(held):
        base, _, leaf = name.rpartition(".")
        parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}.get(leaf)
        if parts:
            held |= {f"{base}.{part}": held[name] for part in parts}
            del held[name]
        elif ".attn.impl." in name:
            held[name.replace(".attn.impl.", ".")] = held.pop(name)
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "inc_hooks_maxabs.json"
    file.write_text(json.dumps({"Mode": "DynamicRange", "Nodes": held}))
    ours, theirs = (planned(path, config(folder)).becomes for folder in (stats, tmp_path))
    assert str(ours) == str(theirs)
    for name in ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.softmax"):
        del held[name]
    held = {n: v for n, v in held.items() if not n.endswith("fused_scaled_dot_product_attention")}
    file.write_text(json.dumps({"Mode": "DynamicRange", "Nodes": held}))
    with pytest.raises(UnsupportedError, match=r"2 modules .* not measured\n  - model.layers.0.*softmax, .*down_proj"):
        planned(path, config(tmp_path))
    session = planned(path, config(tmp_path, ignore_modules_wo_measures=True))
    assert "model.layers.1.mlp.down_proj" not in session.becomes.arrivals
    assert "the measurements know no fused_scaled_dot_product_attention" in session.left.values()


def test_scale_files(path: Path, stats: Path, tmp_path: Path) -> None:
    """Without measurements scales are those of the file; in so many words they are kept beside measurements too."""
    want = planned(path, config(stats, scale_method="maxabs_pow2"))
    (tmp_path / "out").mkdir()
    name = "inc_hooks_maxabs_MAXABS_POW2.json"
    held = json.loads((stats / "out" / name).read_text())
    assert held["Mode"] == "Scale" and isinstance(held["Nodes"][QKV]["inputs"][0], float)
    (tmp_path / "out" / name).write_text(json.dumps(held))
    assert str(planned(path, config(tmp_path, scale_method="maxabs_pow2")).becomes) == str(want.becomes)
    with pytest.raises(RequestError, match=r"no measurements of 1 ranks at .*inc_hooks_maxabs\.json"):
        planned(path, config(tmp_path, scale_method="maxabs_pow2", recalc_scales=True))
    held["Nodes"][QKV]["inputs"] = [0.5]
    (stats / "out" / name.replace("json", "npz")).unlink()
    (stats / "out" / name).write_text(json.dumps(held))
    kept = planned(path, config(stats, scale_method="maxabs_pow2", recalc_scales=False)).becomes
    assert kept.arrivals["model.layers.0.self_attn.q_proj"].act["scale0"].item() == 0.5
    anew = planned(path, config(stats, scale_method="maxabs_pow2")).becomes
    assert str(anew) == str(want.becomes)


@pytest.mark.parametrize("method", ["act_maxabs_pcs_pow2_weight_maxabs_pts_pow2_hw", "maxabs_pcs_pow2"])
def test_tokens_need_no_measurements(path: Path, tmp_path: Path, method: str) -> None:
    quant = config(tmp_path, scale_method=method, dynamic_quantization=True)
    assert len(run(path, quant)) == 3
    session = planned(path, quant, cached=False)
    assert not session.becomes.inside and len(session.becomes.arrivals) == 15
    with pytest.raises(UnsupportedError, match="scales of caches"):
        planned(path, quant)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_ranks(name: str, tmp_path: Path) -> None:
    """Calibration on two ranks gives the scales of one, and both serve the same texts from them."""
    path = saved.save(saved.model(name), tmp_path / name)
    folders = [tmp_path / size for size in "12"]
    for folder, size in zip(folders, (1, 2), strict=True):
        folder.mkdir()
        quant = config(folder, mode="MEASURE")
        done = inc.calibrate(path, quant, calib=[torch.tensor(p) for p in PROMPTS], tokens=3, dtype="float32",
                             tensor_parallel_size=size)  # fmt: skip
        assert done.samples == 3 and len(done.written) == {1: 3, 2: 9}[size]
    one, two = (nodes(folder) for folder in folders)
    assert one.keys() == two.keys() and (folders[1] / "out" / "inc_hooks_maxabs_1_2.npz").is_file()
    for key, node in one.items():
        for x, y in zip(node["inputs"], two[key]["inputs"], strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4)
        assert node.get("params") == two[key].get("params")
    texts = [run(path, config(folders[1]), kv_cache_dtype="fp8_inc", tensor_parallel_size=size) for size in (1, 2)]
    scales = [nodes(folders[1], f"inc_hooks_maxabs_MAXABS_HW{which}.json") for which in ("", "_0_2", "_1_2")]
    assert scales[0] == scales[1] == scales[2]
    (folders[1] / "out" / "inc_hooks_maxabs.json").unlink()
    (folders[1] / "out" / "inc_hooks_maxabs.npz").unlink()
    assert texts[0] == texts[1]
    if name == "llama":  # each rank by what it measured itself
        own = run(path, config(folders[1]), kv_cache_dtype="fp8_inc", tensor_parallel_size=2)
        assert [len(text) for text in own] == [4, 4, 4]


def test_only_quantized_weights_reach_the_device(path: Path, stats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is brought to the device, by size: of a linear its codes of 8 bits and its scales, never its floats."""
    arrived: list[tuple[str, Any]] = []
    dense, quantized = fill.assign, fill.on_device

    def assign(module: Any, leaf: str, tensor: Tensor) -> None:
        arrived.append((type(module).__name__, tensor))
        dense(module, leaf, tensor)

    def on_device(q: Any, device: Any) -> Any:
        moved = quantized(q, device)
        arrived.append(("codes", moved.weight))
        return moved

    monkeypatch.setattr(fill, "assign", assign)
    monkeypatch.setattr(fill, "on_device", on_device)
    session = planned(path, config(stats))
    load(path, format=session.arrives, kv=session.becomes.kv)
    floats = {name for name, _ in arrived if name != "codes"}
    assert floats == {"Embedding", "LlamaRMSNorm"}
    codes = [q for name, q in arrived if name == "codes"]
    assert len(codes) == 15 and all(q.nbytes == q.shape[0] * q.shape[1] + 4 for q in codes)


def test_environment(
    path: Path, stats: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {"QUANT_CONFIG": str(config(stats)), "VLLM_SKIP_WARMUP": "true", "VLLM_RPC_TIMEOUT": "600000",
                        "VLLM_ENGINE_ITERATION_TIMEOUT_S": "600"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.INFO, "fewbit"):
        found = run(path, None)
    assert all(f"{name}=" in caplog.text for name in ("VLLM_SKIP_WARMUP", "VLLM_RPC_TIMEOUT"))
    assert found == run(path, config(stats)) != run(path, None, quantization=None)
    with caplog.at_level(logging.WARNING, "fewbit"):
        run(path, None, quantization=None)
    assert "is not used" in caplog.text


WRONG: list[tuple[dict[str, Any], type[FewbitError], str]] = [
    ({"quantization": "inc"}, RequestError, "QUANT_CONFIG is not set"),
    ({"kv_cache_dtype": "fp8_inc"}, RequestError, "holds no scales for it"),
    ({"quantization": "inc", "quant_config": "/none.json"}, RequestError, "no such file"),
    ({"weights_load_device": "cuda"}, RequestError, "cpu is the one value"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_refusals(path: Path, case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANT_CONFIG", raising=False)
    options, error, text = WRONG[case]
    with pytest.raises(error, match=text):
        LLM(str(path), **options)


def test_what_else_decides(path: Path, stats: Path) -> None:
    for options, text in (({"kv_cache_dtype": "fp8", "kv_scale": 1.0}, "fp8_inc takes its scales"),
                          ({"emulation": "file"}, "and fakequant both")):  # fmt: skip
        with pytest.raises(RequestError, match=text):
            LLM(str(path), quantization="inc", quant_config=str(config(stats)), **options)


def test_quantized_checkpoints(path: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """inc without QUANT_CONFIG is upstream's word for what AutoRound or INC has quantized."""
    monkeypatch.delenv("QUANT_CONFIG", raising=False)
    fewbit.quantize(path, tmp_path / "ar", "int4-g32", algo="rtn", to="auto-round", report=False)
    assert gaudi.session(EngineConfig.of(model=str(tmp_path / "ar"), quantization="inc"), None) is None
    assert len(run(tmp_path / "ar", None)) == 3
    with pytest.raises(UnsupportedError, match=r"already quantized[^\n]*\n.*it is auto-round"):
        run(tmp_path / "ar", config(stats))
    fewbit.quantize(path, tmp_path / "gptq", "int4-g32", algo="rtn", to="gptq", report=False)
    with pytest.raises(RequestError, match="is gptq"):
        run(tmp_path / "gptq", None)


def test_what_was_decided_is_said(path: Path, stats: Path) -> None:
    with LLM(str(path), quantization="inc", quant_config=str(config(stats, device_for_scales="GAUDI2")),
             kv_cache_dtype="fp8_inc", weights_load_device="cpu") as llm:  # fmt: skip
        facts = llm.llm_engine.facts()
        llm.generate(PROMPTS, SamplingParams(max_tokens=1))
        bytes_of_a_token = llm.llm_engine.runner.slot_bytes
    assert facts["inc"]["element"] == "e4m3-240" and facts["inc"]["nodes"]["row_parallel_linear"] == 4
    assert facts["attention"] == "queries, probabilities rounded to e4m3-240 x f32[tensor] (exactly, in plain torch)"
    assert "e4m3-240" in facts["kv"] and (facts["kv_scales"], facts["kv_held"]) == ("INC's", "codes")
    assert bytes_of_a_token == 2 * 2 * 2 * 16  # of two layers' keys and values, two heads of 16 each, a byte


def test_weights_rounded_once(path: Path, stats: Path) -> None:
    assert run(path, config(stats), kernels="emulated") == run(path, config(stats))


def test_the_verb(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Calibration text in, files out."""
    from fewbit.cli.calibrating import calibrate

    folder = model(tmp_path / "llama")
    (tmp_path / "text.txt").write_text("The fog came in from the sea before noon.\n" * 40)
    options = {"calib": str(tmp_path / "text.txt"), "calib_samples": 3, "calib_len": 16, "as_json": True}
    calibrate(str(folder), inc=config(tmp_path, mode="MEASURE"), **options)
    said = json.loads(capsys.readouterr().out)
    assert said["samples"] == 3 and said["tokens"] == 48 and said["nodes"] == len(nodes(tmp_path)) == 11
    with pytest.raises(RequestError, match="set it to MEASURE"):
        calibrate(str(folder), inc=config(tmp_path), **options)
