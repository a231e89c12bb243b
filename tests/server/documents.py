"""The commands and programs that documents show: taken out of their text, and run as a reader would."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FENCED = re.compile(r"(?ms)^(?P<pad> *)```(?P<kind>\w*) ?(?P<name>\S*)\n(?P<text>.*?)^(?P=pad)```$")
DIRECTIVE = re.compile(r"(?m)^\.\. code-block:: (?P<kind>\w+)\n\n(?P<text>(?:    .*\n|\n)+)")


def runs(tool: str) -> bool:
    """Whether a command is there; of lm_eval also its extra `api`, without which it talks to no server."""
    found = shutil.which(tool)
    if found is None or tool != "lm_eval":
        return found is not None
    asked = [str(Path(found).with_name("python")), "-c", "import lm_eval, tenacity, aiohttp"]
    return subprocess.run(asked, capture_output=True, check=False).returncode == 0


@dataclass(frozen=True, slots=True)
class Block:
    """kind: bash, python ... or "" for a plain one. name: of the file that it is."""

    kind: str
    name: str
    text: str

    def __str__(self) -> str:
        return self.name or re.sub(r"\W+", "-", self.text.strip()[:40]).strip("-")


def blocks(document: str) -> list[Block]:
    """Of Markdown and of reStructuredText, in their order."""
    found = [*FENCED.finditer(document), *DIRECTIVE.finditer(document)]
    ordered = sorted(found, key=lambda match: match.start())
    return [Block(m["kind"], m.groupdict().get("name") or "", textwrap.dedent(m["text"])) for m in ordered]


def commands(text: str) -> Iterator[str]:
    """Whole ones: a quote or a backslash at the end of a line goes on in the next."""
    held = ""
    for line in text.splitlines():
        held += line + "\n"
        with contextlib.suppress(ValueError):
            if not line.endswith("\\") and shlex.split(held, comments=True):
                yield held.strip()
                held = ""
    assert not held.strip(), held


class Shell:
    """Runs what a document shows, in a folder where `fewbit` and `python` are this project's. words: what stands for
    a reader's own names."""

    def __init__(self, place: Path, words: dict[str, str]):
        self.place, self.words = place, words
        bin = place / "bin"
        bin.mkdir()
        for name, call in (("fewbit", "-m fewbit"), ("python", "")):
            (bin / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {call} "$@"\n')
            (bin / name).chmod(0o755)
        self.env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")} | {
            "PATH": f"{bin}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "KEY": "sk-doc",
            "HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip

    def filled(self, text: str) -> str:
        for word, value in self.words.items():
            text = text.replace(word, value)
        return text

    def script(self, text: str) -> str:
        """Run with bash, stopping at what fails. -> what it printed."""
        for tool in ("curl", "lm_eval"):
            if re.search(rf"^{tool} ", text, re.MULTILINE) and not runs(tool):
                pytest.skip(f"{tool} is not installed, or not with what it needs for servers")
        text = re.sub(r"^curl ", "curl --silent --show-error --fail ", text, flags=re.MULTILINE)
        return self._ran(["bash", "-ec", self.filled(text)])

    def program(self, text: str) -> str:
        """Run as a file, as its reader would."""
        file = self.place / "program.py"
        file.write_text(self.filled(text))
        return self._ran([sys.executable, str(file)])

    def _ran(self, command: list[str]) -> str:
        done = subprocess.run(command, capture_output=True, text=True, env=self.env, cwd=self.place, timeout=120,
                              stdin=subprocess.DEVNULL)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextlib.contextmanager
    def server(self, command: str) -> Iterator[str]:
        """The URL of what a command serves, on a free port; Ctrl-C must end it well."""
        line = self.filled(command.split("  #")[0].strip()) + " --port 0"
        child = subprocess.Popen(["bash", "-c", line], stderr=subprocess.PIPE, text=True, env=self.env, cwd=self.place,
                                 start_new_session=True)  # fmt: skip
        assert child.stderr
        try:
            said: list[str] = []
            for each in child.stderr:
                said.append(each)
                if " at http" in each:
                    break
            assert said and " at http" in said[-1], "".join(said)
            yield said[-1].split(" at ")[1].split()[0].replace("0.0.0.0", "127.0.0.1")
            os.killpg(child.pid, signal.SIGINT)
            assert child.wait(30) == 0, child.stderr.read()
        finally:
            child.stderr.close()
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
