"""The command line as a user types it: right, wrong, and interrupted."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fewbit
from tests.tiny import llama
from tests.verbs import run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("cli") / "model")


@pytest.mark.parametrize(("path", "code"), [("MODEL", 0), ("/no/such/model", 1)])
def test_a_process_of_its_own(model: Path, path: str, code: int) -> None:
    """What comes out of it is all that comes out; the others are run within this one."""
    command = [sys.executable, "-m", "fewbit", "inspect", path.replace("MODEL", str(model)), "--json"]
    done, here = subprocess.run(command, capture_output=True, text=True), run(*command[3:])
    assert (done.returncode, done.stdout, done.stderr.strip()) == (code, here.stdout, here.stderr)
    assert here.returncode == code and bool(here.stdout) != bool(here.stderr)


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
    (("convert", "MODEL", "--to", "dense", "-o", "MODEL"), "already holds a model", 1),
    (("convert", "MODEL", "--to", "dense", "-o", "MODEL", "--overwrite"), "is the checkpoint that is read", 1),
    (("convert", "MODEL", "--to", "dense", "-o", "MODEL/config.json"), "is not a folder", 1),
    (("convert", "MODEL", "--to", "dense", "-o", "MODEL/config.json/x"), "cannot write", 1),
    (("convert", "MODEL", "--to", "dense", "-o", "OUT", "--max-shard", "0"), "above 0", 1),
    (("inspect", "MODEL/config.json"), "nothing else is read", 1),
    (("inspect", "hub/id"), "must be downloaded first", 1),
    (("inspect", "MODEL", "--device", "evil"), "'evil' is not known", 1),
    (("inspect", "MODEL", "--activations", "quick"), "known are declared, hardware, fast, off", 1),
    (("inspect", "MODEL", "--frob"), "--frob", 2),
    *([] if torch.cuda.is_available() else [(("inspect", "MODEL", "--device", "cuda"), "no CUDA device", 1)]),
    (("verify", "MODEL/model.safetensors"), "no config.json", 1),
    (
        ("calibrate", "MODEL", "-o", "OUT", "--fakequant", "int8-channel", "--tokens", "1"),
        "--fakequant and --tokens",
        1,
    ),
    (("calibrate", "MODEL", "-o", "OUT", "--kv-fakequant", "fp8", "--max-memory", "1GB"), "--max-memory belong", 1),
    (("calibrate", "MODEL", "-o", "OUT", "--kv", "fp8", "--tokens", "2"), "--kv and --tokens belong", 1),
    (("calibrate", "MODEL", "--inc", "CONFIG", "--max-memory", "1GB"), "--inc and --max-memory belong", 1),
    (("convert", "MODEL"), "--to", 2),
    (("frobnicate",), "frobnicate", 2),
]


@pytest.mark.parametrize(("args", "words", "code"), MISTAKES)
def test_mistakes_get_one_message(model: Path, tmp_path: Path, args: tuple[str, ...], words: str, code: int) -> None:
    filled = [a.replace("MODEL", str(model)).replace("OUT", str(tmp_path / "out")) for a in args]
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


UP = """
import sys
from fewbit.__main__ import main
class Up:
    def find_spec(self, name, *_):
        if name == "fewbit.cli":
            print("up", flush=True)
sys.meta_path.insert(0, Up())
main()
"""


SWALLOWED = """
import os, signal, time
import fewbit.cli
from fewbit.__main__ import main

def swallowing():
    try:
        while {interrupt}:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)  # another thread may be the one that is told
    except KeyboardInterrupt:
        pass
    raise ImportError("cannot load module more than once per process")

fewbit.cli.main = swallowing
main()
"""


@pytest.mark.parametrize(("interrupt", "code"), [(True, 130), (False, 1)])
def test_an_interrupt_that_an_import_swallows(interrupt: bool, code: int) -> None:
    command = [sys.executable, "-c", SWALLOWED.format(interrupt=interrupt)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and ("Traceback" in done.stderr) == (code == 1), done.stderr


WITHIN = """
import fewbit.cli
from fewbit.__main__ import main
fewbit.cli.main = lambda: exec("raise KeyboardInterrupt")
main()
"""


def test_an_interrupt_within_an_exec(tmp_path: Path) -> None:
    """Python would die of the signal at its end, though it was caught."""
    (tmp_path / "within.py").write_text(WITHIN)
    command = [sys.executable, "-m", "within"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and not done.stderr


@pytest.mark.parametrize("after", [0.0, 0.3, 1.0, 2.5, 5.0])
def test_interrupt_of_verify(model: Path, after: float) -> None:
    """Ctrl-C at any time from our first import on, the slow ones included, ends quietly."""
    command = [sys.executable, "-c", UP, "verify", str(model)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "up\n"
    time.sleep(after)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=60)
    assert child.returncode in (0, 130), error
    assert "Traceback" not in error


@pytest.fixture(scope="module")
def quantized(model: Path) -> Path:
    out = model.parent / "quantized"
    fewbit.convert(model, out, "gptq", requantize="int4-g128", max_shard=40_000)
    return out


def test_inspect_says_what_fast_does(quantized: Path) -> None:
    assert "activations fast on cpu: int4-g128 (" in run("inspect", quantized, "--activations", "fast").stdout
    assert "activations fast" not in run("inspect", quantized).stdout


def test_disk_full(quantized: Path, tmp_path: Path) -> None:
    command = f"ulimit -f 60; exec {sys.executable} -m fewbit convert {quantized} --to awq -o {tmp_path / 'out'}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1 and "free some space" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_killed_then_the_same_again(quantized: Path, tmp_path: Path) -> None:
    """kill -9 while it writes; the same command then works, or says what to do."""
    args = ["convert", quantized, "--to", "awq", "-o", tmp_path / "out", "--max-shard", 40_000]
    child = subprocess.Popen([sys.executable, "-m", "fewbit", *map(str, args)], stderr=subprocess.DEVNULL)
    while not (tmp_path / "out").exists() and child.poll() is None:
        time.sleep(0.002)
    child.kill()
    child.wait()
    again = run(*args)
    assert again.returncode == 0 or ("--overwrite" in again.stderr and "Traceback" not in again.stderr)


@pytest.mark.skipif(shutil.which("script") is None, reason="needs script(1) for a terminal")
def test_on_a_terminal(quantized: Path, tmp_path: Path) -> None:
    for args in (f"inspect {quantized} --all --kernels", f"convert {quantized} --to awq -o {tmp_path / 'a'}"):
        command = f"{sys.executable} -m fewbit {args}"
        done = subprocess.run(["script", "-qec", command, "/dev/null"], capture_output=True, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout


def test_json_is_one_document(quantized: Path, tmp_path: Path) -> None:
    verbs = [("inspect", quantized), ("verify", quantized), ("doctor",)]
    for args in [*verbs, ("convert", quantized, "--to", "awq", "-o", tmp_path / "a")]:
        json.loads(run(*args, "--json").stdout)


def test_a_pipe_that_closes(quantized: Path) -> None:
    command = f"{sys.executable} -m fewbit doctor | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr


def test_gguf_into_a_folder_or_a_file(quantized: Path, tmp_path: Path) -> None:
    for out, file in (("folder", "folder/model.gguf"), ("x.gguf", "x.gguf")):
        args = ("convert", quantized, "--to", "gguf", "-o", tmp_path / out)
        assert run(*args).returncode == 0 and (tmp_path / file).is_file()
    again = run(*args)
    assert again.returncode == 1 and "--overwrite" in again.stderr
