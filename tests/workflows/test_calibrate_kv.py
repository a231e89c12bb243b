"""Scales of the KV cache measured on a text: those of every layer, as a model's own attention sees keys and values."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fewbit
from fewbit.cli import app
from fewbit.engine.config import EngineConfig
from fewbit.engine.engine import Engine
from fewbit.errors import RequestError
from fewbit.models import kv_file
from fewbit.quant.kv import HEAD, MEASURED
from fewbit.workflows.calibrate_kv import calibrate_kv
from tests.engine.test_kv_cache import LAYER, declared
from tests.tiny import llama

IDS = torch.randint(3, 250, (5, 24), generator=torch.Generator().manual_seed(0))
REACH = {"fp8": 448.0, "fp8_e4m3": 448.0, "fp8_e5m2": 57344.0, "fp8_inc": 240.0, "int8": 127.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("measured") / "model"
    return llama(path, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_hidden_layers=3)


def seen(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """[G]: the largest keys after rotary, and values, by transformers' own cache."""
    model = fewbit.load(folder, dtype="float32")
    found: dict[str, dict[str, torch.Tensor]] = {}
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
    for i, layer in enumerate(cache.layers):
        found[LAYER.format(i)] = {"k": layer.keys.abs().amax((0, 2, 3)), "v": layer.values.abs().amax((0, 2, 3))}
    return found


@pytest.mark.parametrize("head", ["", HEAD])
@pytest.mark.parametrize("name", MEASURED)
def test_scales_are_the_largest_over_what_codes_reach(folder: Path, tmp_path: Path, name: str, head: str) -> None:
    done = calibrate_kv(folder, tmp_path / "s.safetensors", name + head, calib=IDS, dtype="float32")
    found = kv_file.read(done.out, fewbit.load(folder).config)
    want = seen(folder)
    assert (found.format, found.per_head) == (name, bool(head)) and found.scales.keys() == want.keys()
    assert done.tokens == found.measured["tokens"] == IDS.numel() and found.measured["dtype"] == "float32"
    for module, held in found.scales.items():
        for of, scale in held.items():
            top = want[module][of] if head else want[module][of].max()[None]
            torch.testing.assert_close(scale, top / REACH[name])


def test_what_a_checkpoint_declares_is_not_in_what_is_measured(tmp_path: Path) -> None:
    """Not even scales that mean nothing stop it; and its file stands for them."""
    path = declared(tmp_path, kv_scale=1e-6)
    calibrate_kv(path, tmp_path / "s.safetensors", calib=IDS, dtype="float32")
    found = kv_file.read(tmp_path / "s.safetensors", fewbit.load(path).config)
    model = fewbit.load(path, dtype="float32", activations="off")
    tops = []
    for i in range(2):
        model.get_submodule(LAYER.format(i)).fewbit_watch_kv = lambda k, v: tops.append(float(v.abs().max()))
    with torch.no_grad():
        model(input_ids=IDS)
    torch.testing.assert_close(
        torch.tensor(tops) / 448, torch.cat([found.scales[LAYER.format(i)]["v"] for i in (0, 1)])
    )


def test_one_file_for_every_checkpoint_of_a_model(folder: Path, tmp_path: Path) -> None:
    path = calibrate_kv(folder, tmp_path / "s.safetensors", "fp8-head", calib=IDS).out
    for to, form in (("gptq", "int4-g128"), ("gguf", "q8_0")):
        out = tmp_path / (f"{to}.gguf" if to == "gguf" else to)
        fewbit.convert(folder, out, to, requantize=form)
        engine = Engine(EngineConfig.of(model=str(out), kv_scales=str(path)))
        assert engine.facts()["kv_scales"] == f"file {path}" and engine.facts()["kv"] == "e4m3 x f32[row]"
        engine.shutdown()


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    cases: list[tuple[str, Path, str]] = [
        ("nvfp4", tmp_path / "s", "scales are measured for fp8"), ("fp8", tmp_path / "there", "is there already"),
        ("fp8", tmp_path / "no" / "s", "no such folder"),
    ]  # fmt: skip
    for name, out, words in cases:
        with pytest.raises(RequestError, match=words):
            calibrate_kv(folder, out, name, calib=IDS)


def test_the_verb(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    real = calibrate_kv

    def with_ids(src: str, out: Path, kv: str, **options: Any) -> Any:
        given.update(options)
        return real(src, out, kv, calib=IDS, overwrite=options["overwrite"])

    monkeypatch.setattr("fewbit.workflows.calibrate_kv.calibrate_kv", with_ids)
    out = tmp_path / "s.safetensors"
    command = ["calibrate", str(folder), "--kv", "int8-head", "-o", str(out), "--calib-len", "64", "--overwrite"]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["modules"].keys() == {LAYER.format(i) for i in range(3)} and given["length"] == 64
    done = CliRunner().invoke(app, command)
    assert f"--kv-scales {out}" in done.output.replace("\n", "")
    info = fewbit.inspect(folder, kv_scales=out)
    assert (
        info.kv == "int8 x f32[row]"
        and info.kv_scales == f"file {out}, measured on token ids given, {IDS.numel()} tokens"
    )
    done = CliRunner().invoke(app, ["inspect", str(folder), "--kv-scales", str(out)])
    assert "KV cache: int8 x f32[row], scales: file" in done.output
    assert fewbit.inspect(folder).kv_scales == "none"
