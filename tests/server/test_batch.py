"""Files of requests, and load from outside, on the real engine."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fewbit.errors import RequestError
from fewbit.server import batch, load
from fewbit.server.config import ServerConfig
from tests.server.echo_engine import EchoEngine
from tests.server.served import Running, engine, model, running
from tests.verbs import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("batch") / "model")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running(engine(folder)) as up:
        yield up


def line(i: int, **body: Any) -> str:
    held = {"model": "tiny", "prompt": f"line {i}", "max_tokens": 3, "temperature": 0} | body
    return json.dumps({"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": held})


def test_a_batch_is_what_the_server_answers(folder: Path, server: Running) -> None:
    text = "\n".join([line(0), line(1), line(2, max_tokens=-1), "", line(3, model="other")])
    asked = batch.read(text, "batch.jsonl")
    told: list[int] = []
    answers = list(batch.run(engine(folder), ServerConfig(), asked, told.append))
    assert [a["custom_id"] for a in answers] == ["r0", "r1", "r2", "r3"] and told[-1] == 4
    assert [a["response"]["status_code"] for a in answers] == [200, 200, 400, 404]
    for a, sent in zip(answers[:2], asked, strict=False):
        served = server.post(sent.url, sent.body).json()
        assert a["response"]["body"]["choices"] == served["choices"] and a["error"] is None
    assert answers[2]["error"]["message"]


MISTAKES = [
    ("{", "line 1"), ("[]", "custom_id, url and body"), (line(0) + "\n" + line(0), "was there before"),
    (line(0).replace("/v1/completions", "/v1/files"), "can POST to"), (line(0, stream=True), "no streams"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), MISTAKES)
def test_files_are_checked_before_anything_runs(text: str, words: str) -> None:
    with pytest.raises(Exception, match=words):
        batch.read(text, "batch.jsonl")


def test_load_finds_what_was_served(server: Running) -> None:
    asked = load.Load(server.url, "tiny", count=12, input_len=9, output_len=5, rate=200.0, vocab=200)
    found = asyncio.run(load.run(asked))
    assert found.completed == 12 and found.failed == 0 and not found.errors
    assert found.output_rate * found.seconds == pytest.approx(60)
    assert found.total_rate * found.seconds == pytest.approx(60 + 12 * 9)
    assert 0 < found.ttft["p50"] <= found.ttft["p99"] <= found.seconds * 1000
    assert load.models(server.url) == "tiny"


def test_load_tells_what_failed(server: Running) -> None:
    found = asyncio.run(load.run(load.Load(server.url, "nobody", count=2, vocab=200)))
    assert found.completed == 0 and found.failed == 2 and "404" in found.errors[0]
    with pytest.raises(RequestError, match="no list of models"):
        load.models("http://127.0.0.1:9")
    with pytest.raises(RequestError, match="http://host:port"):
        load.models("127.0.0.1:9")
    with running(EchoEngine, api_key=("k",)) as keyed, pytest.raises(RequestError, match="--api-key"):
        load.models(keyed.url)


def test_verbs(folder: Path, tmp_path: Path, server: Running) -> None:
    done = run("complete", folder, "abc", "--max-tokens", 4)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert run("complete", folder, "-", "--max-tokens", 4, given="abc").stdout == done.stdout
    talk = run("chat", folder, "--max-tokens", 4, "--temperature", 0, given="hello\nagain\n")
    assert talk.returncode == 0 and len(talk.stdout.splitlines()) >= 2, talk.stderr
    (tmp_path / "in.jsonl").write_text("\n".join(line(i) for i in range(3)))
    for status, words in ((0, "3 answered, 0 failed"), (1, "is there already")):
        ran = run("run-batch", folder, "-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl")
        assert ran.returncode == status and words in ran.stdout + ran.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3
    for input, output, words in (("none", "new", "no such file"), ("in.jsonl", "none/new", "no folder")):
        ran = run("run-batch", folder, "-i", tmp_path / input, "-o", tmp_path / output)
        assert ran.returncode == 1 and words in ran.stderr and "Errno" not in ran.stderr


def test_bench(folder: Path, server: Running) -> None:
    one = run("bench", "latency", folder, "--input-len", 8, "--output-len", 4, "--repeat", 1, "--json")
    found = json.loads(one.stdout)
    assert found["output_tokens"] == 4 and 0 < found["first"] < found["seconds"]
    many = run("bench", "throughput", folder, "--num-prompts", 5, "--input-len", 8, "--output-len", 4)
    assert many.returncode == 0 and "5 x 8 + 4 tokens" in many.stdout
    asked = ("--num-prompts", 3, "--input-len", 8, "--output-len", 3, "--json")
    both = run("bench", "serve", "--url", server.url, "--peer-url", server.url, "--vocab", 200, *asked)
    assert both.returncode == 0 and [f["completed"] for f in json.loads(both.stdout)] == [3, 3]
    beyond = run("bench", "serve", "--url", server.url, *asked)  # ids up to 1000, of a vocabulary of 264
    assert beyond.returncode == 1 and "400" in json.loads(beyond.stdout)[0]["errors"][0]
