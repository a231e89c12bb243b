"""The fuzz target runs, and finds nothing in the seconds a test may take."""

import subprocess
import sys
from pathlib import Path


def test_a_few_seconds_of_fuzzing() -> None:
    target = Path(__file__).with_name("fuzz_files.py")
    done = subprocess.run([sys.executable, str(target), "--seconds", "4"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    last = done.stdout.splitlines()[-1]
    assert all(f"{kind} {end}" in last for kind in (".safetensors", ".gguf") for end in ("opened", "refused")), last
