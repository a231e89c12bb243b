"""Every bad file is refused with words that name the file and the field, before memory is taken for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewbit.errors import CheckpointError
from fewbit.files.checkpoint import open_checkpoint
from fewbit.files.gguf import check_vocabulary, open_gguf
from tests.hostile.generators import BENIGN, HOSTILE, VOCABULARY, Make, narrow_array

ROOT = Path(__file__).parents[2]
LONGEST_MESSAGE = 700

# runs apart: the limit on the address space holds for the whole process
LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
from fewbit.errors import CheckpointError
from fewbit.files.checkpoint import open_checkpoint

def virtual():
    return 1024 * int(next(x for x in open("/proc/self/status") if x.startswith("VmSize")).split()[1])

paths = json.load(sys.stdin)
for path in paths["good"]:
    open_checkpoint(path).close()
resource.setrlimit(resource.RLIMIT_AS, (virtual() + (16 << 20), resource.RLIM_INFINITY))
for path in paths["bad"]:
    try:
        open_checkpoint(path)
    except CheckpointError:
        continue
    sys.exit(f"{path} opened")
print(len(paths["bad"]))
"""


def open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(os.listdir(folder)) if folder.exists() else 0


def test_case_names_are_unique() -> None:
    names = [row[0] for row in HOSTILE + BENIGN + VOCABULARY]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("make", "words"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_refused(make: Make, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "m")
    monkeypatch.setattr(torch, "empty", lambda *a, **k: pytest.fail("memory was taken"))
    before = open_files()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path)), message
    assert not [word for word in words if word not in message], message
    assert len(message) < LONGEST_MESSAGE + 2 * len(str(tmp_path))
    del caught
    assert open_files() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS and /proc")
def test_refused_in_little_memory(tmp_path: Path) -> None:
    bad = [str(make(tmp_path / case / "m")) for case, make, _ in HOSTILE]
    good = [str(make(tmp_path / case / "m")) for case, make in BENIGN]
    job = json.dumps({"bad": bad, "good": good})
    done = subprocess.run([sys.executable, "-c", LIMITED], input=job, text=True, capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(HOSTILE)


@pytest.mark.parametrize("make", [row[1] for row in BENIGN], ids=[row[0] for row in BENIGN])
def test_odd_files_open(make: Make, tmp_path: Path) -> None:
    with open_checkpoint(make(tmp_path / "m")) as checkpoint:
        for name, info in checkpoint.tensors.items():
            assert checkpoint.read(name).nbytes == info.nbytes


@pytest.mark.parametrize(("make", "words"), [row[1:] for row in VOCABULARY], ids=[row[0] for row in VOCABULARY])
def test_vocabulary_traps(make: Make, words: tuple[str, ...], tmp_path: Path) -> None:
    with open_gguf(make(tmp_path / "m")) as file:
        (problem,) = check_vocabulary(file.kv)
    assert not [word for word in words if word not in problem], problem


def test_narrow_array(tmp_path: Path) -> None:
    with open_gguf(narrow_array(tmp_path)) as file:
        with pytest.raises(CheckpointError, match=r"model\.gguf: key 'tokenizer\.ggml\.scores': is stored as \[u8\]"):
            file.kv_array("tokenizer.ggml.scores", "f32")
        assert file.kv_array("tokenizer.ggml.scores", "f32", "u8") == [0, 0, 0, 0]
        with pytest.raises(CheckpointError, match="'absent' is missing"):
            file.kv_array("absent", "f32")
