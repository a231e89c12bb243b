"""The command line as a user types it: right, wrong, and interrupted."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import llama


def run(*args: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fewbit", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("cli") / "model")


def test_inspect_and_verify(model: Path) -> None:
    out = run("inspect", model)
    assert out.returncode == 0 and "LlamaForCausalLM" in out.stdout
    assert json.loads(run("inspect", model, "--json").stdout)["dialect"] == "dense"
    assert run("verify", model).returncode == 0


def test_convert_round_trip(model: Path, tmp_path: Path) -> None:
    first = run("convert", model, "--to", "gptq", "-o", tmp_path / "g", "--requantize", "--format", "int4-g128")
    assert first.returncode == 0, first.stderr
    out = run("convert", tmp_path / "g", "--to", "awq", "-o", tmp_path / "a")
    assert out.returncode == 0 and "codes equal in 14 of 14" in out.stdout, out.stdout + out.stderr


MISTAKES: list[tuple[tuple[str, ...], str, int]] = [
    (("inspect", "/no/such/model"), "/no/such/model", 1),
    (("verify", "/no/such/model"), "/no/such/model", 1),
    (("convert", "MODEL", "--to", "nonsense", "-o", "OUT"), "known", 1),
    (("convert", "MODEL", "--to", "gptq", "-o", "OUT", "--requantize", "--format", "int4-g129"), "near", 1),
    (("convert", "MODEL", "--to", "dense", "-o", "OUT", "--dtype", "f99"), "f99", 1),
    (("convert", "MODEL"), "--to", 2),
    (("frobnicate",), "frobnicate", 2),
]


@pytest.mark.parametrize(("args", "words", "code"), MISTAKES)
def test_mistakes_get_one_message(model: Path, tmp_path: Path, args: tuple[str, ...], words: str, code: int) -> None:
    filled = [{"MODEL": str(model), "OUT": str(tmp_path / "out")}.get(a, a) for a in args]
    out = run(*filled)
    assert out.returncode == code
    assert words in out.stderr + out.stdout
    assert "Traceback" not in out.stderr


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C in the middle of a conversion: no traceback, no model, no debris."""
    big = llama(tmp_path / "big", hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fewbit", "convert", big, "--to", "gptq", "-o", out, "--requantize"]
    child = subprocess.Popen([*map(str, command), "--format", "int4-g128"], stderr=subprocess.PIPE, text=True)
    while not list(out.glob(".*")) and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=60)
    if child.returncode != 0:  # else it was quicker than we were
        assert child.returncode == 130 and "Traceback" not in error
        assert not out.exists() or not list(out.iterdir())
