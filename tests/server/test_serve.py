"""The verb serve as a process: flags, files, signals, and how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.served import until

VERB = "import torch; torch.set_num_threads(1); from fewbit.cli.serving import serve; import typer; typer.run(serve)"
WHOLE = ("import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); sys.argv.insert(1, 'serve'); "
         "from fewbit.__main__ import main; main()")  # fmt: skip
DYING = ("from fewbit.engine.engine import Engine; step = Engine.step\n"
         "def fails(self):\n    raise MemoryError('the card is gone')\nEngine.step = fails\n")  # fmt: skip


class Child:
    def __init__(self, *args: object, code: str = VERB, **env: str):
        command = [sys.executable, "-c", code, *map(str, args)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **env})
        self.said: list[str] = []
        self.url = ""

    def up(self) -> "Child":
        assert self.process.stderr
        for line in self.process.stderr:
            self.said.append(line)
            if " at http" in line:
                self.url = line.split(" at ")[1].split()[0]
                return self
        raise AssertionError("".join(self.said))

    def ended(self, seconds: float = 30) -> int:
        code = self.process.wait(seconds)
        assert self.process.stderr
        self.said.append(self.process.stderr.read())
        self.process.stderr.close()
        return code

    def post(self, **body: Any) -> httpx.Response:
        return httpx.post(self.url + "/v1/completions", json=body, timeout=60, trust_env=False)

    def children(self) -> list[int]:
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        listed = [p.read_text().split() for p in found.parent.parent.glob("*/children")]
        return [int(one) for some in listed for one in some]


@pytest.fixture
def start() -> Iterator[Callable[..., Child]]:
    made: list[Child] = []

    def one(*args: object, **env: str) -> Child:
        made.append(Child(*args, **env))
        return made[-1].up()

    yield one
    for child in made:
        if child.process.poll() is None:
            child.process.kill()
            child.ended()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_sigterm_finishes_what_runs(folder: Path, start: Callable[..., Child]) -> None:
    child = start(folder, "--port", 0, "-tp", 1, "--served-model-name", "mine")
    below = child.children()
    assert len(below) == 1  # the renderer of templates
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(child.post, prompt="a", max_tokens=400, ignore_eos=True, temperature=0)
        until(lambda: httpx.get(child.url + "/stats", trust_env=False).json()["running"])
        child.process.send_signal(signal.SIGTERM)
        assert running.result().json()["usage"]["completion_tokens"] == 400
    assert child.ended() == 0
    assert not any(map(alive, below))


def test_a_second_interrupt_cuts_off_what_runs(folder: Path, start: Callable[..., Child]) -> None:
    child = start(folder, "--port", 0, "--max-num-seqs", 1)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(child.post, prompt="a", max_tokens=500, ignore_eos=True) for _ in range(2)]
        until(lambda: httpx.get(child.url + "/stats", trust_env=False).json()["waiting"])
        child.process.send_signal(signal.SIGINT)
        assert child.process.stderr and next(line for line in child.process.stderr if "until Ctrl-C again" in line)
        child.process.send_signal(signal.SIGINT)
        assert child.ended() == 0
        assert isinstance(asked[-1].exception(), httpx.HTTPError)
    assert "Traceback" not in child.said[-1]


@pytest.mark.parametrize("after", [0.0, 0.2, 0.4, 0.6])
def test_an_interrupt_while_loading(folder: Path, after: float) -> None:
    child = Child(folder, "--port", 0, code=WHOLE)
    assert child.process.stderr and next(line for line in child.process.stderr if "loading" in line)
    time.sleep(after)  # the engine's thread is in C++ most of the time
    child.process.send_signal(signal.SIGINT)
    assert child.ended(60) in ((130, 0) if after else (130,))  # it may have been up by then
    assert not {"Traceback", "terminate"} & set(child.said[-1].split())


def test_an_engine_that_dies(folder: Path, start: Callable[..., Child]) -> None:
    child = start(folder, "--port", 0, code=DYING + VERB)
    below = child.children()
    found = child.post(prompt="a")
    assert found.status_code == 503 and "the card is gone" in found.text
    assert httpx.get(child.url + "/health", trust_env=False).status_code == 503
    assert child.ended(5) == 1
    assert not any(map(alive, below))


def test_killed_outright_leaves_no_orphan(folder: Path, start: Callable[..., Child]) -> None:
    child = start(folder, "--port", 0)
    below = child.children()
    child.process.kill()
    child.ended()
    until(lambda: not any(map(alive, below)))


def test_flags_over_environment_over_file(folder: Path, tmp_path: Path, start: Callable[..., Child]) -> None:
    file = tmp_path / "serve.yaml"
    settings = {"model": str(folder), "max-model-len": "256", "max_num_seqs": 3, "served-model-name": ["file"]}
    file.write_text(json.dumps({**settings, "port": 0, "api-key": "k"}))
    env = {"FEWBIT_MAX_NUM_SEQS": "5", "FEWBIT_SERVED_MODEL_NAME": "environment"}
    child = start("--config", file, "--served-model-name", "flag", **env)
    head = {"authorization": "Bearer k"}
    found = httpx.get(child.url + "/info", headers=head, trust_env=False).json()
    assert found["models"] == ["flag"] and found["engine"]["max_num_seqs"] == 5
    assert found["engine"]["max_model_len"] == 256 and found["model"]["architecture"] == "LlamaForCausalLM"
    assert httpx.get(child.url + "/info", trust_env=False).status_code == 401


def test_off_is_a_word_in_a_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML 1.1 takes it for false, which is no value of --fusion; switches take both."""
    import typer
    from typer.main import get_command

    from fewbit.cli import serving_run
    from fewbit.cli.serving import serve

    file, seen = tmp_path / "serve.yaml", []
    file.write_text("fusion: off\nenable-prefix-caching: off\nenforce_eager: True\nallow-credentials: no\n")
    app = typer.Typer()
    app.command()(serve)
    monkeypatch.setattr(serving_run, "run", lambda given: seen.append(given) or 0)
    for value in ("strict", ""):
        if value:
            monkeypatch.setenv("FEWBIT_FUSION", value)
        get_command(app).main([str(folder), "--config", str(file)], standalone_mode=False)
        monkeypatch.delenv("FEWBIT_FUSION", raising=False)
    assert [given["fusion"] for given in seen] == ["strict", "off"]
    assert (seen[0]["enable_prefix_caching"], seen[0]["enforce_eager"], seen[0]["allow_credentials"]) == (
        False,
        True,
        False,
    )


def test_demo_once(folder: Path) -> None:
    code = "from fewbit.cli.serving_demo import demo; import typer; typer.run(demo)"
    env = {**os.environ, "DEMO_ONCE": "1"}
    command = [sys.executable, "-c", code, str(folder), "--port", "0", "--tokens", "3", "--prompt", "it's"]
    found = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert found.returncode == 0, found.stderr
    assert "> it's" in found.stdout and "curl http://127.0.0.1:" in found.stdout


MISTAKES: list[tuple[list[str], str]] = [
    (["MODEL", "--max-model-len", "99999"], "512"),
    (["MODEL", "--max-model-len", "long"], "8k"),
    (["MODEL", "--quantization", "nonsense"], "nonsense"),
    (["MODEL", "--tool-call-parser", "x"], "hermes"),
    (["MODEL", "--chat-template", "/no/such"], "no such file"),
    (["MODEL", "--chat-template", "{{ open"], "no template"),
    (["MODEL", "--config", "/no/such.yaml"], "no such file"),
    (["MODEL", "--override-generation-config", '{"temperature": -1}'], "temperature"),
    (["MODEL", "--config", "FILE"], "served_model_name"),
    (["MODEL", "--port", "99999"], "65535"),
    (["MODEL", "--port", "BUSY"], "another port"),
    (["MODEL", "--host", "192.0.2.1"], "an address of this machine"),
    (["MODEL", "--host", "no host"], "an address of this machine"),
    (["MODEL", "--device", "toaster"], "auto takes what is there"),
    (["MODEL", "--device", "cuda:99"], "torch sees"),
    (["MODEL", "--enable-lora"], "--enable-lora: this version cannot"),
    (["MODEL", "--fusion", "all"], "known are off, auto, strict"),
    (["MODEL", "--ssl-keyfile", "x"], "both"),
    (["MODEL", "--ssl-keyfile", "/no/key", "--ssl-certfile", "x"], "/no/key"),
    (["/no/such/model"], "/no/such/model"),
]


@pytest.mark.parametrize(("args", "words"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes(folder: Path, tmp_path: Path, args: list[str], words: str) -> None:
    """As errors of ours, before anything is served; in this process, for they are many."""
    import typer
    from typer.main import get_command

    from fewbit.cli.serving import serve
    from fewbit.errors import FewbitError

    file = tmp_path / "wrong.yaml"
    file.write_text("served_model_nme: x")
    app = typer.Typer()
    app.command()(serve)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        known = {"MODEL": str(folder), "FILE": str(file), "BUSY": str(taken.getsockname()[1])}
        with pytest.raises(FewbitError, match=words):
            get_command(app).main([known.get(a, a) for a in args], standalone_mode=False)


def test_sampling_defaults_of_the_checkpoint(tmp_path: Path) -> None:
    from fewbit.cli.serving_run import defaults, listed, tokens_of

    (tmp_path / "generation_config.json").write_text('{"temperature": 1, "top_k": 20, "max_new_tokens": 9, "x": 1}')
    assert defaults(str(tmp_path), "auto", None) == {"temperature": 1.0, "top_k": 20, "max_tokens": 9}
    assert defaults(str(tmp_path), "vllm", '{"top_p": 0.5}') == {"top_p": 0.5}
    assert listed(["a", "b,c", '["d"]']) == ("a", "b", "c", "d")
    assert [tokens_of(text) for text in ("8k", "8K", "100", "auto")] == [8000, 8192, 100, None]
