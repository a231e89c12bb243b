"""quantize on tiny models: every algorithm, input and dialect gives a sound checkpoint, resumable to the byte."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

import fewbit
from fewbit.errors import FewbitError, RequestError, SpecError, UnsupportedError
from fewbit.files.writer import verify_manifest
from fewbit.workflows.journal import FOLDER
from fewbit.workflows.quantize import quantize
from tests import tiny
from tests.models import saved

LENGTH = 32
QUIET = {"length": LENGTH, "dtype": "float32", "report": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def ids() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 250, (LENGTH,), generator=generator) for _ in range(8)]


def error(model: Path, out: Path, ids: list[Tensor]) -> float:
    """Relative difference of the logits on the calibration tokens."""
    x = torch.stack(ids)
    wanted, got = (fewbit.load(path, dtype=torch.float32)(x).logits for path in (model, out))
    return float((got - wanted).norm() / wanted.norm())


def digests(folder: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.iterdir())
        if p.is_file() and p.suffix in (".safetensors", ".json", ".gguf")
    }


def sound(out: Path) -> None:
    assert not [f for f in fewbit.verify(out) if f.severity == "error"]


CASES = [
    ("int4-g64", "rtn", "compressed-tensors", {}),
    ("int4-g64", "gptq", "gptq", {}),
    ("int4-g64", "gptq", "gptq", {"options": {"order": "group"}}),
    ("int3-g64", "gptq", "compressed-tensors", {}),
    ("int4-g64-asym", "awq", "awq", {}),
    ("int4-g64-asym", "awq+gptq", "compressed-tensors", {}),
    ("W8A8", "smooth", "compressed-tensors", {}),
    ("W8A8", "smooth+gptq", "compressed-tensors", {}),
    ("int2-g64", "autoround", "auto-round", {"options": {"iters": 5}}),
    ("int4-g64", "hqq", "compressed-tensors", {}),
    ("NVFP4", "gptq", "compressed-tensors", {}),
    ("NVFP4", "rtn", "modelopt", {}),
    ("MXFP4", "gptq", "compressed-tensors", {}),
    ("FP8", "rtn", "fp8", {"kv": "fp8"}),
    ("FP8", "rtn", "modelopt", {"kv": "fp8"}),
    ("FP8_DYNAMIC", "rtn", "compressed-tensors", {"kv": "fp8"}),
    ("FP8_BLOCK", "rtn", "compressed-tensors", {}),
    ("FP8", "rtn", "compressed-tensors", {"observer": "mse"}),
    ("int4-g64", "rotate+gptq", "compressed-tensors", {}),
    ("Q4_K_M", "rtn", "compressed-tensors", {}),
]


@pytest.mark.parametrize(("form", "algo", "to", "more"), CASES, ids=lambda v: str(v) if isinstance(v, str) else "")
def test_every_way(form: str, algo: str, to: str, more: dict, model: Path, ids: list[Tensor], tmp_path: Path) -> None:
    if form == "Q4_K_M":
        with pytest.raises(RequestError, match="does not fit this model"):
            quantize(model, tmp_path / "out", form, algo=algo, to=to, calib=ids, **QUIET, **more)
        assert not (tmp_path / "out").exists()
        return
    done = quantize(model, tmp_path / "out", form, algo=algo, to=to, calib=ids, **QUIET, **more)
    sound(tmp_path / "out")
    assert len(done.modules) == 21
    assert not (tmp_path / "out" / FOLDER).exists()
    info = fewbit.inspect(tmp_path / "out")
    assert len(info.modules) == 21 and info.dialect == to
    assert error(model, tmp_path / "out", ids) < (0.3 if form.startswith(("FP8", "W8A8")) else 0.9)
    assert info.kv_modules == (3 if more.get("kv") else 0)


@pytest.mark.parametrize("algo", ["gptq", "awq", "autoround", "hqq", "awq+gptq"])
def test_better_than_nearest(algo: str, model: Path, ids: list[Tensor], tmp_path: Path) -> None:
    options = {"options": {"iters": 30}} if algo == "autoround" else {}
    quantize(model, tmp_path / "rtn", "int3-g64", algo="rtn", **QUIET)
    quantize(model, tmp_path / "out", "int3-g64", algo=algo, calib=ids, **QUIET, **options)
    assert error(model, tmp_path / "out", ids) < error(model, tmp_path / "rtn", ids)


def test_quantized_input(model: Path, ids: list[Tensor], tmp_path: Path) -> None:
    quantize(model, tmp_path / "fp8", "FP8_DYNAMIC", algo="rtn", **QUIET)
    quantize(tmp_path / "fp8", tmp_path / "out", "NVFP4", algo="gptq", calib=ids, **QUIET)
    sound(tmp_path / "out")
    quantize(tmp_path / "fp8", tmp_path / "w4", "int4-g64", to="gptq", calib=ids, **QUIET)
    assert error(model, tmp_path / "w4", ids) < 0.5


def test_twice_the_same_bytes(model: Path, ids: list[Tensor], tmp_path: Path) -> None:
    state = torch.get_rng_state()
    for name in "ab":
        quantize(model, tmp_path / name, "int4-g64", algo="awq+gptq", calib=ids, **QUIET)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("form", "algo"), [("int4-g64-asym", "awq"), ("W8A8", "smooth")])
def test_scalings_are_folded(
    form: str, algo: str, model: Path, ids: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run of a process finds what makes an input too; folded values go on as the file holds them."""
    from fewbit.models import observe

    monkeypatch.setattr(observe, "_WIRINGS", {})
    done = quantize(model, tmp_path / "out", form, algo=algo, calib=ids, **QUIET)
    assert all(m["transforms"] == [] for m in done.modules)
    before, after = read_all(model), read_all(tmp_path / "out")
    norms = [name for name in before if "layernorm" in name]
    assert len(norms) == 6 and all(after[name].dtype is torch.bfloat16 for name in norms)
    assert any(not torch.equal(before[name], after[name]) for name in norms)


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from fewbit.workflows.quantize import quantize
g = torch.Generator().manual_seed(0)
ids = [torch.randint(3, 250, (32,), generator=g) for _ in range(8)]
quantize(sys.argv[1], sys.argv[2], "int4-g64", algo=sys.argv[3], options=OPTIONS, calib=ids, length=32,
         dtype="float32", report=False, max_shard=100_000, max_memory=1)
"""


def run(model: Path, out: Path, algo: str, options: str = "None") -> subprocess.Popen:
    script = SCRIPT.replace("OPTIONS", options)
    return subprocess.Popen([sys.executable, "-c", script, str(model), str(out), algo])


@pytest.mark.parametrize(("algo", "options"), [("gptq", "None"), ("autoround", "{'iters': 3}")])
def test_killed_at_random_points(algo: str, options: str, model: Path, tmp_path: Path) -> None:
    whole = run(model, tmp_path / "whole", algo, options)
    begun = time.monotonic()
    assert whole.wait() == 0
    took = time.monotonic() - begun
    chance = random.Random(7)
    for _ in range(6):
        process = run(model, tmp_path / "out", algo, options)
        try:
            process.wait(took * (0.3 + 0.7 * chance.random()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        ended = process.wait() == 0
        whole_model = (tmp_path / "out" / "model.safetensors.index.json").exists()
        if ended or (whole_model and not (tmp_path / "out" / FOLDER).exists()):  # or killed on its way out
            break
    else:
        process = run(model, tmp_path / "out", algo, options)
        assert process.wait() == 0
    assert digests(tmp_path / "whole") == digests(tmp_path / "out")


GPTQ = {"format": "int4-g64", "algo": "gptq"}


def interrupted(
    model: Path, out: Path, ids: list[Tensor], monkeypatch: pytest.MonkeyPatch, after: int = 3, **given: object
) -> None:
    """A run that ends after what is outside the layers and two of them, as Ctrl-C would end it."""
    from fewbit.workflows import quantize as module

    real, count = module._save, 0

    def save(*args: object) -> None:
        nonlocal count
        if count == after:
            raise KeyboardInterrupt
        count += 1
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_save", save)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, out, calib=ids, **QUIET, **(given or GPTQ))


RESUMED = [
    GPTQ,
    GPTQ | {"to": "gptq", "options": {"order": "group"}, "max_shard": 200_000},
    {"format": "int4-g64-asym", "algo": "awq", "to": "awq"},
    {"format": "FP8", "algo": "rtn", "to": "fp8", "kv": "fp8"},
    {"format": "NVFP4", "algo": "gptq", "to": "modelopt"},
    {"format": "W8A8", "algo": "smooth+gptq", "max_shard": 100_000},
    {"format": "int8-g32", "algo": "rtn", "to": "gguf"},
    {"format": "q8_0", "algo": "imatrix", "to": "gguf"},
]


@pytest.mark.parametrize("given", RESUMED, ids=lambda given: f"{given['format']}-{given.get('to', 'default')}")
def test_resumes_where_it_stopped(
    given: dict, model: Path, ids: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished layers come back from their files as the dialect holds them, to the bit."""
    whole = quantize(model, tmp_path / "whole", calib=ids, **QUIET, **given)
    interrupted(model, tmp_path / "out", ids, monkeypatch, **given)
    done = quantize(model, tmp_path / "out", calib=ids, **QUIET, **given)
    assert done.resumed == 2 and [m["name"] for m in done.modules] == [m["name"] for m in whole.modules]
    assert digests(tmp_path / "whole") == digests(tmp_path / "out")


def test_files_of_layers_are_the_shards(model: Path, ids: list[Tensor], tmp_path: Path) -> None:
    """What does not fit in one file has the same tensors in a file for each layer, or several of a wide one."""
    for name, most in (("one", 10**9), ("layers", 10**5), ("less", 3 * 10**4)):
        quantize(model, tmp_path / name, "int4-g64", algo="rtn", max_shard=most, **QUIET)
        sound(tmp_path / name)
        assert verify_manifest(tmp_path / name) == []
    held = {name: read_all(tmp_path / name) for name in ("one", "layers", "less")}
    for name in ("layers", "less"):
        assert held[name].keys() == held["one"].keys()
        assert all(torch.equal(held[name][key], value) for key, value in held["one"].items())
    counts = {name: len(list((tmp_path / name).glob("*.safetensors"))) for name in held}
    assert counts["one"] == 1 and counts["layers"] >= 4 and counts["less"] > counts["layers"]


def test_killed_while_files_get_their_names(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.files.staging import Staging

    given = {"format": "int4-g64", "algo": "rtn", "max_shard": 10**5, **QUIET}
    quantize(model, tmp_path / "whole", **given)
    real = Staging.publish

    def killed(self: Staging, names: list[str]) -> None:
        os.rename(self.partial(names[0]), self.folder / names[0])
        raise SystemExit  # neither discarded nor named: what kill -9 leaves

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "publish", killed)
        patch.setattr(Staging, "discard", lambda self: None)
        with pytest.raises(SystemExit):
            quantize(model, tmp_path / "out", **given)
    assert list((tmp_path / "out").glob(".*.partial")) and Staging.publish is real
    quantize(model, tmp_path / "out", **given)
    assert digests(tmp_path / "whole") == digests(tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*"))


def read_all(folder: Path) -> dict[str, Tensor]:
    from fewbit.files.checkpoint import open_checkpoint

    with open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def test_something_else_is_not_resumed(
    model: Path, ids: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    copy = tiny.llama(tmp_path / "copy", num_hidden_layers=3)
    interrupted(copy, out, ids, monkeypatch)
    given = {"algo": "gptq", "calib": ids, **QUIET}
    with pytest.raises(RequestError, match=r"recipe: begun with .*int4-g64.*int3-g64"):
        quantize(copy, out, "int3-g64", **given)
    with pytest.raises(RequestError, match="calibration: begun with"):
        quantize(copy, out, "int4-g64", **(given | {"calib": ids[:4]}))
    with pytest.raises(RequestError, match="dialect: begun with compressed-tensors, now gptq"):
        quantize(copy, out, "int4-g64", to="gptq", **given)
    with monkeypatch.context() as patch:
        patch.setattr(fewbit, "__version__", "9.9")
        with pytest.raises(RequestError, match=r"fewbit: begun with .*, now 9.9"):
            quantize(copy, out, "int4-g64", **given)
    tiny.edit(copy, lambda tensors: tensors["model.norm.weight"].mul_(2))
    with pytest.raises(RequestError, match=r"model: begun with .*model.safetensors"):
        quantize(copy, out, "int4-g64", **given)
    done = quantize(copy, out, "int4-g64", restart=True, **given)
    assert done.resumed == 0
    sound(out)


def test_an_older_model_is_not_replaced_unasked(
    model: Path, ids: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that may overwrite and is interrupted gives no leave to another run."""
    from fewbit.errors import CheckpointError
    from fewbit.workflows import quantize as module

    out = tmp_path / "out"
    quantize(model, out, "int8-channel", algo="rtn", **QUIET)
    before = digests(out)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "assemble", interrupt)
        quantize(model, out, "int4-g64", algo="rtn", overwrite=True, **QUIET)
    with pytest.raises(RequestError, match="recipe: begun with"):
        quantize(model, out, "int3-g64", algo="rtn", **QUIET)
    with pytest.raises(CheckpointError, match="already holds a model"):
        quantize(model, out, "int3-g64", algo="rtn", restart=True, **QUIET)
    assert digests(out) == before
    quantize(model, out, "int4-g64", algo="rtn", **QUIET)  # the same run goes on
    assert {m.format for m in fewbit.inspect(out).modules} == {"int4-g64"}


def test_a_damaged_journal_is_told(
    model: Path, ids: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(model, tmp_path / "out", ids, monkeypatch)
    file = tmp_path / "out" / FOLDER / "00001-000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(FewbitError, match=r"00001-000.safetensors: its digest is not the journal's; --restart"):
        quantize(model, tmp_path / "out", "int4-g64", algo="gptq", calib=ids, **QUIET)


def test_a_full_disk_keeps_what_is_done(
    model: Path, ids: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewbit.errors import CapacityError

    real, count = os.fsync, 0

    def full(fd: int) -> None:
        nonlocal count
        count += 1
        if count > 10:  # a line of what the run depends on; a file, its name and a line for outside and two layers
            raise OSError(28, "No space left on device")
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CapacityError, match=r"same command goes on|free some"):
            quantize(model, tmp_path / "out", "int4-g64", algo="gptq", calib=ids, **QUIET)
    done = quantize(model, tmp_path / "out", "int4-g64", algo="gptq", calib=ids, **QUIET)
    assert done.resumed == 2
    sound(tmp_path / "out")


def test_two_runs_do_not_share_a_folder(model: Path, ids: list[Tensor], tmp_path: Path) -> None:
    from fewbit.workflows.journal import Journal

    with Journal(tmp_path / "out" / FOLDER, {}), pytest.raises(RequestError, match="another run is writing here"):
        quantize(model, tmp_path / "out", "int4-g64", algo="rtn", **QUIET)


def test_recipe_of_mixed_formats(model: Path, ids: list[Tensor], tmp_path: Path) -> None:
    recipe = tmp_path / "mixed.yaml"
    body = {"version": 1, "format": "int4-g64", "algo": "rtn", "rules": [
        {"match": "*.down_proj", "format": "int8-channel"}, {"match": "re:.*[.]0[.]self_attn.*", "format": "dense"},
        {"match": "*.gate_proj", "algo": "gptq", "options": {"damp": 0.05}},
    ]}  # fmt: skip
    recipe.write_text(yaml.safe_dump(body))
    done = quantize(model, tmp_path / "out", recipe, calib=ids, **QUIET)
    sound(tmp_path / "out")
    found = {m.name: m.format for m in fewbit.inspect(tmp_path / "out").modules}
    assert found["model.layers.1.mlp.down_proj"] == "int8-channel"
    assert found["model.layers.1.mlp.up_proj"] == "int4-g64"
    assert "model.layers.0.self_attn.q_proj" not in found
    assert {m["algo"] for m in done.modules if m["name"].endswith("gate_proj")} == {"gptq"}


BAD = [
    ({"format": "int4-g64"}, "version None"),
    ({"version": 1}, "no format"),
    ({"version": 1, "format": "int4-g64", "colour": 1}, "unknown key colour; known: format, algo"),
    ({"version": 1, "format": "int4-g64", "rules": [{"match": "*.nothing", "format": "dense"}]}, "matches no module"),
    ({"version": 1, "format": "int4-g64", "rules": [{"match": "*"}]}, "a match, and a format or an algo"),
    ({"version": 1, "format": "int4-g64", "rules": [{"match": "re:(", "format": "dense"}]}, "not a regular expression"),
    ({"version": 1, "format": "int4-g64", "algo": "gptq", "options": {"damping": 1}}, "gptq has no option damping"),
    ({"version": 1, "format": "int4-g64", "kv": "fp7"}, "kv 'fp7' is not known"),
    ({"version": 1, "format": "int4-g64", "algo": "magic"}, "magic"),
    ({"version": 1, "format": "int5-g64x"}, "int5-g64x"),
    ([1], "a recipe is a mapping"),
]


@pytest.mark.parametrize(("body", "told"), BAD, ids=[t for _, t in BAD])
def test_bad_recipes_are_told(body: object, told: str, model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(yaml.safe_dump(body))
    with pytest.raises((RequestError, SpecError), match=told):
        quantize(model, tmp_path / "out", recipe, **QUIET)
    assert not (tmp_path / "out").exists()


def test_requests_that_cannot_be_met(model: Path, ids: list[Tensor], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RequestError, match=r"blocks of 128 do not divide rows of 96; 32 does: --group-size 32"):
        narrow = tiny.llama(tmp_path / "narrow", hidden_size=96, head_dim=48)
        quantize(narrow, out, "W4A16", **QUIET)
    with pytest.raises(UnsupportedError, match=r"dialect 'nonsense' cannot be written"):
        quantize(model, out, "W4A16", to="nonsense", **QUIET)
    with pytest.raises(RequestError, match="is the model that is read"):
        quantize(model, model, "W4A16", overwrite=True, **QUIET)
    with pytest.raises(UnsupportedError, match="no place for KV scales"):
        quantize(model, out, "int4-g64", to="gptq", kv="fp8", **QUIET)
    with pytest.raises(RequestError, match="the model has 256 tokens"):
        quantize(model, out, "int4-g64", algo="gptq", calib=[torch.full((LENGTH,), 999)], **QUIET)
    with pytest.raises(RequestError, match=r"has dropped columns in another order than their groups \(gptq holds them"):
        quantize(model, out, "int4-g64", algo="gptq", options={"order": "group"}, **QUIET)
    with pytest.raises(FewbitError, match="nowhere"):
        quantize(tmp_path / "nowhere", out, "W4A16", **QUIET)
    assert not out.exists() or not list(out.iterdir())


def test_what_a_gguf_file_cannot_be_is_told_before_the_work(tmp_path: Path) -> None:
    path = saved.save(saved.model("opt"), tmp_path / "opt")
    with pytest.raises(UnsupportedError, match="model_type 'opt' has no GGUF architecture here"):
        quantize(path, tmp_path / "out", "q8_0", algo="rtn", to="gguf", **QUIET)
    assert not (tmp_path / "out").exists()
