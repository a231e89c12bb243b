"""The log: on disk at once, whole after any kill, a full disk told in time; and what is shown meanwhile."""

import io
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fewbit.errors import CapacityError, CheckpointError
from fewbit.workflows.report_data import gathered
from fewbit.workflows.run_log import RunLog, read_log
from fewbit.workflows.run_view import EVERY, Lines, peak_memory


@contextmanager
def full_beyond(nbytes: int) -> Iterator[None]:
    """Files of this process cannot grow beyond so many bytes: what a write finds on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_every_event_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    with RunLog(path, layers=2, stream=io.StringIO()) as log:
        log.start(model=Path("m"), seed=3)
        log.module("a.0.q", error=0.25, damp=math.nan)
        log.layer("a.0", seconds=1.5, error=0.1)
        log.warning("careful", module="a.0.q")
        events = read_log(path)
        log.done(bytes=7)
    assert [e["event"] for e in events] == ["start", "module", "layer", "warning"]
    assert events[0]["model"] == "m" and events[0]["time"].endswith("Z") and events[1]["damp"] is None
    assert events[2]["memory"] > 1 << 20
    assert read_log(path)[-1]["event"] == "done"
    assert gathered(read_log(path))["layers"][0]["seconds"] == 1.5


@pytest.mark.parametrize("torn", [b"", b'{"time": "x", "ev', b'{"event": "layer", "name": "a.9"}'])
def test_goes_on_after_a_kill(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "log.jsonl"
    with RunLog(path, layers=3, stream=io.StringIO()) as log:
        log.start()
        log.layer("a.0", memory=1)
    with open(path, "ab") as file:
        file.write(torn)
    assert len(read_log(path)) == 2
    with RunLog(path, layers=3, stream=io.StringIO()) as log:
        log.start(seed=1)
        assert log.left() is None
        log.layer("a.1", memory=1)
        assert log.left() is not None
    events = read_log(path)
    assert [e["event"] for e in events] == ["start", "layer", "resumed", "layer"]
    assert events[2]["layers_done"] == 1 and events[2]["seed"] == 1
    assert path.read_bytes().endswith(b"}\n")


def test_killed_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with RunLog(path, stream=io.StringIO()) as log:
        log.start(word="ä\n\u2028")
        log.layer("a.0")
        log.layer("a.1")
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        assert len(read_log(path)) == data[:cut].count(b"\n")


def test_real_kill(tmp_path: Path) -> None:
    script = (
        "import os, sys; from fewbit.workflows.run_log import RunLog; log = RunLog(sys.argv[1]); log.start();"
        "log.layer('a.0'); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "log.jsonl"], stderr=subprocess.DEVNULL)
    assert done.returncode == -9
    assert [e["event"] for e in read_log(tmp_path / "log.jsonl")] == ["start", "layer"]


@pytest.mark.parametrize(("line", "says"), [(b"not json\n", "line 2"), (b"[1]\n", "line 2 is not an event")])
def test_damage_elsewhere_is_an_error(tmp_path: Path, line: bytes, says: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"event": "start"}\n' + line + b'{"event": "done"}\n')
    with pytest.raises(CheckpointError, match=says):
        RunLog(path)
    with pytest.raises(CheckpointError, match="cannot read"):
        read_log(tmp_path / "none")


def test_full_disk_is_told_until_the_result_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with RunLog(path, stream=io.StringIO()) as log:
        log.start()
        size = path.stat().st_size
        with full_beyond(size + 20):
            with pytest.raises(CapacityError, match=r"log\.jsonl: cannot write"):
                log.layer("a.0")
            assert path.stat().st_size == size  # no half line stays
            log.done()
            log.event("evaluated")
        log.event("uploaded")
    assert [e["event"] for e in read_log(path)] == ["start", "uploaded"]


def test_plain_lines_come_now_and_then() -> None:
    now = [0.0]
    stream = io.StringIO()
    view = Lines(100, stream, clock=lambda: now[0])
    view.show({"event": "start", "time": "t", "model": "m\x1b[2J", "recipe": "long\n" * 99}, None)
    for i in range(100):
        view.show({"event": "module", "name": f"a.{i}.q"}, None)
        view.show({"event": "layer", "name": f"a.{i}", "loss": 0.01234, "memory": 3 << 30, "seconds": 2.0}, 75.0)
        now[0] += EVERY / 10
    view.show({"event": "warning", "message": "careful"}, None)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "fewbit: start, model m?[2J" and lines[-1] == "fewbit: warning: careful"
    assert len(lines) == 13 and "layer 100/100 a.99" in lines[-2]
    said = lines[1].replace("\N{NO-BREAK SPACE}", " ")
    assert said == "fewbit: layer 1/100 a.0  loss 0.01234  3.00 GiB  2.0 s, 75 s left"


def test_bars_on_a_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    with RunLog(tmp_path / "log.jsonl", layers=2, live=True, stream=stream) as log:
        log.start()
        for n in range(2):
            for name in ("q", "[red]k"):
                log.module(f"a.{n}.{name}", loss=0.5)
            log.layer(f"a.{n}", loss=0.25, seconds=3.0, memory=None)
        log.warning("careful")
        log.done()
    shown = stream.getvalue()
    for words in ("a.1", "loss 0.25", "warning: careful", "layers", "2/2"):
        assert words in shown, words


def test_a_stream_that_is_no_terminal_gets_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    with RunLog(tmp_path / "log.jsonl", layers=1, stream=stream) as log:
        log.layer("a.0")
    assert stream.getvalue().startswith("fewbit: layer 1/1 a.0") and "\x1b" not in stream.getvalue()


def test_peak_memory_is_of_this_process() -> None:
    assert 10 << 20 < peak_memory() < 1 << 40
    assert os.sysconf("SC_PAGE_SIZE") and isinstance(json.dumps(peak_memory()), str)
