"""Every bad file through every door: refused in words, quickly, in little memory, with nothing written."""

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fewbit
from fewbit.errors import CheckpointError, FewbitError
from tests.hostile.generators import HOSTILE, VOCABULARY, Make, narrow_array
from tests.tiny import edit_config, llama
from tests.yardstick import within

CASES = [(case, make) for case, make, _ in HOSTILE + VOCABULARY] + [("F8-narrow-array", narrow_array)]
SECONDS, MEBIBYTES = 5.0, 64
Door = Callable[[Path, Path], Any]
DOORS: dict[str, Door] = {
    "inspect": lambda path, out: fewbit.inspect(path),
    "load": lambda path, out: fewbit.load(path),
    "load quantized": lambda path, out: fewbit.load(path, format="int8-channel"),
    "convert to dense": lambda path, out: fewbit.convert(path, out, "dense"),
    "convert to gptq": lambda path, out: fewbit.convert(path, out, "gptq", requantize="int4-g128"),
    "convert to gguf": lambda path, out: fewbit.convert(path, out.with_suffix(".gguf"), "gguf", requantize="q8_0"),
}


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is imported and compared once must not count."""
    path = llama(tmp_path_factory.mktemp("warm") / "m", num_hidden_layers=1)
    fewbit.load(path)
    fewbit.verify(path)


def listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@pytest.mark.parametrize("make", [make for _, make in CASES], ids=[case for case, _ in CASES])
def test_refused_at_every_door(make: Make, tmp_path: Path) -> None:
    path = make(tmp_path / "m")
    before, memory, start = listing(tmp_path), peak(), time.monotonic()
    for name, door in DOORS.items():
        try:
            found = door(path, tmp_path / "out")
        except FewbitError as error:
            assert str(error) and len(str(error)) < 4000
        else:
            # a vocabulary is met where a tokenizer is rebuilt, everything else at once
            pytest.fail(f"{name} took it: {found}")
    errors = [finding for finding in fewbit.verify(path) if finding.severity == "error"]
    assert errors and all(finding.text for finding in errors)
    assert listing(tmp_path) == before
    assert peak() - memory < MEBIBYTES and within(time.monotonic() - start, SECONDS)


CONFIGS: list[tuple[str, Any]] = [
    ("hidden_size", 2**40), ("hidden_size", "x"), ("hidden_size", 0), ("hidden_size", -1), ("vocab_size", -3),
    ("vocab_size", 2**50), ("head_dim", 2**33), ("head_dim", 0), ("num_hidden_layers", 10**9), ("num_hidden_layers", 3),
    ("num_hidden_layers", -1), ("num_attention_heads", -2), ("num_attention_heads", 3), ("num_key_value_heads", 0),
    ("num_key_value_heads", 3), ("model_type", None), ("model_type", []), ("model_type", "../x"), ("dtype", "evil"),
    ("rope_theta", "a"), ("rope_scaling", {"type": "evil"}), ("hidden_act", "evil"), ("pad_token_id", 999_999),
    ("text_config", []), ("text_config", {"quantization_config": 3}), ("quantization_config", []),
    ("quantization_config", {"quant_method": []}), ("quantization_config", {"quant_method": "evil"}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), CONFIGS, ids=[f"{k}={v}" for k, v in CONFIGS])
def test_configs_that_no_weights_back(tmp_path: Path, key: str, value: Any) -> None:
    path = edit_config(llama(tmp_path / "m", num_hidden_layers=1), lambda config: config.update({key: value}))
    memory, start = peak(), time.monotonic()
    with pytest.raises(FewbitError):
        fewbit.load(path)
    if key != "dtype":  # how it computes is a question of load alone
        assert [f for f in fewbit.verify(path) if f.severity == "error"]
        with pytest.raises(FewbitError):
            fewbit.convert(path, tmp_path / "out", "gptq", requantize="int4-g128")
    assert not (tmp_path / "out").exists()
    assert peak() - memory < MEBIBYTES and within(time.monotonic() - start, SECONDS)


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
def test_cut_while_it_is_converted(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """F10: the file was whole when it was opened and proved, and loses its end before it is copied."""
    from fewbit.workflows import convert

    base = llama(tmp_path / "base", num_hidden_layers=1)
    if name == "model.gguf":
        fewbit.convert(base, base / name, "gguf", requantize="q8_0")
    path = base / name
    proved = convert.refuse_inexact

    def cut(*args: Any) -> None:
        proved(*args)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    monkeypatch.setattr(convert, "refuse_inexact", cut)
    with pytest.raises(CheckpointError, match=r"became shorter|the file has"):
        fewbit.convert(path if name == "model.gguf" else base, tmp_path / "out", "gptq", requantize="int4-g128")
    assert not (tmp_path / "out").exists()


def test_paths_that_cannot_be_looked_at(tmp_path: Path) -> None:
    for path in (tmp_path / ("n" * 5000), Path("a\0b"), tmp_path / "file" / "below"):
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(FewbitError):
            fewbit.inspect(path)
        assert [f.name for f in fewbit.verify(path)] == ["unreadable"]
