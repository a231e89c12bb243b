"""Tensor parallel with processes: the same texts as one rank gives, and an end when a rank ends."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fewbit
from fewbit.engine import parallel
from fewbit.engine.batch import Flight, wanted
from fewbit.engine.config import EngineConfig
from fewbit.engine.engine import Engine
from fewbit.engine.guided_source import StructuredOutputs
from fewbit.engine.parallel import Team
from fewbit.engine.parallel_wire import COMMAND, STEP, Receiver, Sender, Wire
from fewbit.engine.params import SamplingParams
from fewbit.engine.request import PENDING, Delta, Request, Stream
from fewbit.engine.scheduler import Work
from fewbit.engine.tables import Tables
from fewbit.errors import FewbitError, UnsupportedError
from fewbit.models import kv_file
from tests.engine.test_engine import AHEAD, tokens
from tests.engine.tokenizers import byte_fallback
from tests.models import saved
from tests.tiny import llama
from tests.yardstick import within

GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("parallel") / "model", num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=32, max_position_embeddings=512)  # fmt: skip


def engine(path: Path, size: int, **options: Any) -> Engine:
    return Engine(EngineConfig.of(model=str(path), dtype="float32", tensor_parallel_size=size, **options))


class Recording:
    """A Team of one other rank, which says `said` of its graphs after `wait` seconds."""

    def __init__(self, said: str, wait: float = 0.1):
        self.team, self.group, self.aborted = Team.__new__(Team), SimpleNamespace(aborted=False), threading.Event()
        self.group.abort = self.abort
        self.wires = [Wire(end) for end in socket.socketpair()]
        one: Any = SimpleNamespace(number=1, wire=self.wires[0], last_words=lambda: "")
        self.team.ranks, self.team.group, self.team.size = [one], self.group, 2  # type: ignore[assignment]
        self.team.first, self.team._failed = None, threading.Event()
        self.told: list[str] = []
        self.free = threading.Event()
        self.other = threading.Thread(target=self.rank, args=(said, wait))

    def __enter__(self) -> "Recording":
        self.other.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.free.set()
        self.wires[0].end.shutdown(socket.SHUT_RDWR)
        self.other.join()
        for wire in self.wires:
            wire.close()

    def abort(self) -> None:
        self.group.aborted = True
        self.aborted.set()

    def rank(self, said: str, wait: float) -> None:
        wire = self.wires[1]
        with suppress(EOFError, OSError):
            self.told.append(json.loads(wire.receive()[1])["command"])
            self.free.wait(wait)
            wire.tell(failed=said)
            self.told.append(json.loads(wire.receive()[1])["command"])


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed call is asked early whether a rank died."""
    monkeypatch.setattr(parallel, "NOTICE", 0.2)


def fails() -> None:
    raise RuntimeError("out of memory\nand more")


@pytest.mark.usefixtures("soon")
def test_all_record_graphs_or_none() -> None:
    with Recording("") as recording:
        recording.team.capture(lambda: None, True)
    for said, mine, why in (("no room", lambda: None, "no room"), ("", fails, "out of memory"), ("x", fails, "out of")):
        with Recording(said) as recording:
            with pytest.raises(UnsupportedError, match=why):
                recording.team.capture(mine, True)
            recording.other.join()
        assert recording.told == ["capture", "forget"] and not recording.group.aborted


@pytest.mark.usefixtures("soon")
def test_who_fails_to_record_alone_ends_the_engine() -> None:
    """The others wait within a kernel for what it no longer sends: rank 0, or another."""
    with Recording("no room") as recording, pytest.raises(FewbitError, match=r"one rank alone .*: no room; --enforce"):
        recording.team.capture(lambda: recording.aborted.wait(20) and None, True)
    assert recording.aborted.is_set()
    with Recording("", 20) as recording, pytest.raises(FewbitError, match=r"one rank alone .*: out of memory; --enf"):
        recording.team.capture(fails, True)


@pytest.mark.usefixtures("soon")
def test_all_run_a_few_tokens_or_none() -> None:
    with Recording("") as recording:
        assert recording.team.logits(lambda: torch.ones(1), ["glu"], False) == 1
    with Recording("x") as recording, pytest.raises(UnsupportedError, match="out of memory"):
        recording.team.logits(fails, [], False)
    for said, mine in (("no room", lambda: torch.ones(1)), ("", fails)):
        with Recording(said) as recording:
            with pytest.raises(FewbitError, match=r"one rank alone could not run a few tokens: .*; --fusion") as found:
                recording.team.logits(mine, [], True)
            assert not isinstance(found.value, UnsupportedError)
            with pytest.raises(FewbitError, match="one rank alone"):  # who goes on hears it again
                recording.team.command("measure")


def pids(of: Engine) -> list[int]:
    assert of.loaded.team is not None
    return [rank.process.pid for rank in of.loaded.team.ranks]


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process ends in time; one that nobody has waited for has ended too."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except (OSError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def texts(of: Engine, count: int = 16, vocab: int = 150) -> dict[str, list[Delta]]:
    """Ragged prompts that come in while others run; some want logprobs of their prompts."""
    draw = random.Random(0)
    coming = []
    for i in range(count):
        prompt = [5, 6, 7, 8] * (i % 3) + [draw.randrange(3, vocab) for _ in range(draw.randrange(1, 40))]
        more = {"prompt_logprobs": 1} if i % 5 == 0 else {"logprobs": 2}
        coming.append(Request(str(i), prompt, SamplingParams(max_tokens=2 + i % 9, **GREEDY, **more)))
    found: dict[str, list[Delta]] = {r.id: [] for r in coming}
    while coming or of.has_work():
        while coming and draw.random() < 0.5:
            of.add(coming.pop(0))
        for delta in of.step():
            found[delta.request_id].append(delta)
    return found


def same(one: dict[str, list[Delta]], two: dict[str, list[Delta]], bound: float = 1e-4) -> None:
    for name, deltas in one.items():
        assert [d.tokens for d in deltas] == [d.tokens for d in two[name]], name
        for a, b in zip(deltas, two[name], strict=True):
            for x, y in zip(a.logprobs or [], b.logprobs or [], strict=True):
                assert all(abs(x[t].logprob - y[t].logprob) < bound for t in x)
            for x, y in zip((a.prompt_logprobs or [])[1:], (b.prompt_logprobs or [])[1:], strict=True):
                assert all(abs(x[t].logprob - y[t].logprob) < bound for t in x)


TINY_CACHE = {"kv_cache_memory_bytes": 3 * 2 * 2 * 32 * 4 * 80, "max_model_len": 64, "max_num_batched_tokens": 7,
              "max_num_seqs": 5}  # fmt: skip


def test_two_ranks_are_one(folder: Path) -> None:
    """Chunks, preemption and prefix hits forced; rank 0 has half the heads, so the cache holds twice the tokens."""
    alone = engine(folder, 1)
    want = texts(alone)
    alone.shutdown()
    half = TINY_CACHE | {"kv_cache_memory_bytes": TINY_CACHE["kv_cache_memory_bytes"] // 2}
    both = engine(folder, 2, **half)
    (pid,) = pids(both)
    assert both.limits.pages == TINY_CACHE["kv_cache_memory_bytes"] // (3 * 2 * 2 * 32 * 4 * 16)
    same(want, texts(both))
    stats = both.stats()
    assert stats.preemptions and stats.prefix_hits and not stats.pages_used
    both.shutdown()
    assert gone(pid) and torch.get_num_threads() == 1
    both.shutdown()


FREE = ("greedy", "drawn", "stops", "several", "prompt")  # kinds of rows that need not know their tokens
KINDS = AHEAD | {"grammar": {"temperature": 1.0, "seed": 4, "structured_outputs": StructuredOutputs(regex="[ab]{3,9}")}}


def given(of: Engine, left: frozenset[int] = frozenset()) -> dict[str, list[tuple[list[int], str | None]]]:
    """Requests of every kind that come in while others run -> tokens of each continuation and how it ended.

    left: those that are given up when they have two tokens.
    """
    draw = random.Random(2)
    common, coming = [draw.randrange(3, 250) for _ in range(20)], []
    for i, kind in enumerate([*FREE * 4, *KINDS, *KINDS, *FREE * 2]):
        prompt = (common if i % 2 else []) + [draw.randrange(3, 250) for _ in range(draw.randrange(1, 30))]
        params = SamplingParams(**{"max_tokens": 5 + i % 9, "ignore_eos": True, **KINDS[kind]})
        coming.append(Request(f"{i} {kind}", prompt, params))
    found: dict[str, list[Delta]] = {r.id: [] for r in coming}
    while coming or of.has_work():
        while coming and draw.random() < 0.5:
            of.add(coming.pop(0))
        for delta in of.step():
            found[delta.request_id].append(delta)
            if len(found[delta.request_id]) == 2 and int(delta.request_id.split()[0]) in left:
                of.abort(delta.request_id)
    ends = {(name, d.index): d.finish for name, deltas in found.items() for d in deltas}
    return {name: [(tokens(deltas, i), ends.get((name, i))) for i in range(3)] for name, deltas in found.items()}


@pytest.mark.parametrize("way", ["roomy", "tight"])
def test_two_ranks_run_ahead(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs: tokens that rank 0's host does not know yet come to the others' forward all the same.

    tight: chunks, preemption and prefix hits forced.
    """
    path = llama(tmp_path / "model", num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                 vocab_size=320)  # fmt: skip
    byte_fallback().save_pretrained(path)
    options = {"kv_cache_memory_bytes": 3 * 2 * 32 * 4 * 160, "max_model_len": 80, "max_num_batched_tokens": 13}
    alone = engine(path, 1)
    want = given(alone)
    alone.shutdown()
    both = engine(path, 2, **(options if way == "tight" else {}))
    both.ahead = True
    assert both.loaded.team is not None and not both.runner.ahead
    group, counts = both.loaded.team.group, []
    broadcast = group.broadcast
    monkeypatch.setattr(group, "broadcast", lambda x: counts.append(len(x)) or broadcast(x))
    left = frozenset({3, 9, 14, 24, 31})
    try:
        found = given(both, left)
        for name, each in want.items():
            if int(name.split()[0]) not in left:
                assert found[name] == each, name
            else:
                assert all(a[: len(b)] == b for (a, _), (b, _) in zip(each, found[name], strict=True)), name
        stats = both.stats()
        assert not stats.pages_used and len(set(counts)) > 3 and 10 < len(counts) < stats.steps
        assert way == "roomy" or (stats.preemptions and stats.prefix_hits)
        both.add(Request("last", [3, 4, 5], SamplingParams(max_tokens=9, **GREEDY)))
        both.step()
    finally:
        (pid,) = pids(both)
        both.shutdown()  # with a step in flight
    assert gone(pid)


@pytest.mark.parametrize("name", ["fp8 by head", "fp8", "int8", "nvfp4, turned"])
def test_two_ranks_hold_one_cache(folder: Path, tmp_path: Path, name: str) -> None:
    """Scales are cut by heads as keys are: the values in a cache do not depend on how many ranks there are."""
    options: dict[str, Any] = {"kv_cache_dtype": "fp8", "kv_scale": 0.02}
    if name == "fp8 by head":
        draw = torch.Generator().manual_seed(0)
        scales = {f"model.layers.{i}.self_attn": {of: 0.001 + 0.02 * torch.rand(2, generator=draw) for of in "kv"}
                  for i in range(3)}  # fmt: skip
        config = fewbit.load(folder).config
        kv_file.write(tmp_path / "s.safetensors", kv_file.KvScales("fp8", True, kv_file.shapes_of(config), scales))
        options = {"kv_scales": str(tmp_path / "s.safetensors")}
    elif name != "fp8":
        options = {"kv_cache_dtype": name.removesuffix(", turned"), "kv_rotate": name.endswith("turned")}
    alone = engine(folder, 1, **options)
    want, token = texts(alone), alone.limits.token
    alone.shutdown()
    both = engine(folder, 2, **options, **(TINY_CACHE | {"kv_cache_memory_bytes": token * 40}))
    assert both.limits.token == token // 2 and both.limits.pages == 5
    same(want, texts(both), 0.02)  # sums in another order may round a key to the code beside
    assert both.stats().preemptions and both.stats().prefix_hits
    both.shutdown()


def moe(folder: Path) -> Path:
    return saved.save(saved.model("qwen3_moe"), folder)


def latents(folder: Path) -> Path:
    """One key for all heads, on every rank; each multiplies by its own heads' part of kv_b_proj."""
    return saved.save(saved.model("deepseek_v3"), folder)


def two_kinds(folder: Path) -> Path:
    """Layers whose state is not keys and values by position: each text runs by itself."""
    return saved.save(saved.model("qwen3_next"), folder)


MODELS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "experts in 4 bits": (moe, 2, {"quantization": "int4-g32"}),
    "latents": (latents, 2, {}),
    "latents in 4 bits": (latents, 2, {"quantization": "int4-g32"}),
    "texts alone": (two_kinds, 2, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_other_models(name: str, tmp_path: Path) -> None:
    make, size, options = MODELS[name]
    path = make(tmp_path / "model")
    alone = engine(path, 1, **options)
    want = texts(alone, 8, 90)
    alone.shutdown()
    several = engine(path, size, **options)
    try:
        same(want, texts(several, 8, 90))
        assert make is not latents or several.limits.token == alone.limits.token == 3 * (32 + 8) * 4
    finally:
        several.shutdown()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_dead_rank_ends_the_engine(folder: Path, ahead: bool) -> None:
    """In a step and between steps."""
    of = engine(folder, 2)
    of.ahead = ahead
    (pid,) = pids(of)
    of.add(Request("a", [3, 4, 5], SamplingParams(max_tokens=400, **GREEDY)))
    of.step()
    os.kill(pid, signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(FewbitError, match=rf"rank 1 of 2 \(process {pid}\) was killed by signal 9"):
        while True:
            of.step()
    assert within(time.monotonic() - begun, 5)
    with pytest.raises(FewbitError, match="rank 1 of 2"):
        of.has_work()
    of.shutdown()
    assert gone(pid)


SCRIPT = """
import sys, time, torch
torch.set_num_threads(1)
from fewbit import LLM, SamplingParams
llm = LLM(sys.argv[1], tensor_parallel_size=2, dtype="float32")  # no guard: ranks do not import this file
answer = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
print(llm.llm_engine.loaded.team.ranks[0].process.pid, len(answer[0].outputs[0].token_ids), flush=True)
time.sleep(60)
"""


def test_no_rank_outlives_the_engine(folder: Path) -> None:
    root = Path(fewbit.__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], stdout=subprocess.PIPE, text=True,
                          cwd=root) as main:  # fmt: skip
        assert main.stdout is not None
        pid, made = map(int, main.stdout.readline().split())
        main.kill()
    assert made == 3 and gone(pid)


def test_a_rank_that_fails_to_load_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.engine import parallel

    broken = "raise MemoryError('no room')"
    boot = parallel.BOOT.replace("from fewbit.engine.parallel_rank import main; main(told)",
                                 "import fewbit.engine.parallel_rank as r; "
                                 "r.load = lambda *_: exec(\"" + broken + "\"); r.main(told)")  # fmt: skip
    monkeypatch.setattr(parallel, "BOOT", boot)
    with pytest.raises(FewbitError, match=r"(?s)rank 1 of 2.*ended with code 1.*MemoryError: no room"):
        engine(folder, 2)


def test_numbers_on_the_wire() -> None:
    """What the others' runners see is what rank 0's sees, over a preemption and an end."""
    sender, receiver = Sender(), Receiver()
    prompts = ([3, 4, 5, 6, 7], [8, 9])
    streams = [
        Stream(Request(str(i), list(p), SamplingParams(prompt_logprobs=i or None)), 0, 0, list(p), pages=[4 + i])
        for i, p in enumerate(prompts)
    ]
    steps = [[(0, 0, 3)], [(0, 3, 5), (1, 0, 2)], [(0, 5, 6)], [(0, 0, 4)], [(0, 4, 6)], [(1, 2, 3)]]
    for number, step in enumerate(steps):
        if number in (2, 5):
            for stream in streams:
                stream.tokens.append(11)
        if number == 3:
            streams[0].pages = [9, 7]  # preempted, and back
        if number == 5:
            streams[0].pages = []
        works = [Work(streams[i], start, stop) for i, start, stop in step]
        theirs, count, rows = receiver.unpack(sender.pack(works))
        assert not count and not rows
        for work, there in zip(works, theirs, strict=True):
            assert (there.start, there.stop, there.samples) == (work.start, work.stop, work.samples)
            assert there.stream.tokens[there.start : there.stop] == work.stream.tokens[work.start : work.stop]
            assert there.stream.pages == work.stream.pages and wanted(there) == wanted(work)
            streams[0].pages += [20 + number]
    assert len(sender._known) == len(receiver._known) == 1


def test_tokens_in_flight_on_the_wire() -> None:
    """By row of the flight, whatever is preempted meanwhile; known ones by value, which each step is told anew."""
    sender, receiver = Sender(), Receiver()
    streams = [Stream(Request(str(i), [3, 4], SamplingParams()), 0, 0, [3, 4, PENDING], pages=[i]) for i in range(3)]
    flight = Flight(torch.zeros(5, dtype=torch.int64), {s: 4 - i for i, s in enumerate(streams)})

    def told(*works: Work) -> tuple[list[list[int]], int, list[int]]:
        flying = flight if any(work.pending for work in works) else None
        theirs, count, rows = receiver.unpack(sender.pack(works, flying))
        assert all(a.samples == b.samples and a.pending == b.pending for a, b in zip(theirs, works, strict=True))
        return [w.stream.tokens[w.start : w.stop] for w in theirs], count, [rows.get(w.stream, -1) for w in theirs]

    assert told(*(Work(s, 0, 2) for s in streams)) == ([[3, 4]] * 3, 0, [-1] * 3)
    assert told(*(Work(s, 2, 3) for s in streams[:2])) == ([[PENDING]] * 2, 5, [4, 3])
    streams[0].tokens[2:] = [7, PENDING]
    streams[1].tokens[2:], streams[1].pages = [8, PENDING], []
    assert told(Work(streams[0], 3, 4), Work(streams[2], 2, 3)) == ([[PENDING], [PENDING]], 5, [4, 2])
    streams[1].pages = [9]
    assert told(Work(streams[1], 0, 4), Work(streams[2], 0, 2)) == ([[3, 4, 8, PENDING], [3, 4]], 5, [3, -1])
    streams[1].tokens[3] = 6
    assert told(Work(streams[1], 3, 4)) == ([[6]], 0, [-1])


def test_rows_of_tables_come_back_on_the_other_side() -> None:
    """On a GPU pages lie in rows; many texts pass through two, at rank 0 and beside it."""
    sender, receiver = Sender(), Receiver()
    here, there = (Tables(2, 3, torch.device("cpu")) for _ in range(2))
    running: list[Stream] = []
    for number in range(7):
        running.append(Stream(Request(str(number), [3, 4], SamplingParams()), 0, 0, [3, 4], pages=[5 + number]))
        if len(running) > 2:
            running.pop(0).pages = []
        works = [Work(stream, 0, 2) for stream in running]
        theirs, _, _ = receiver.unpack(sender.pack(works))
        for tables, held in ((here, works), (there, theirs)):
            rows = tables.rows([work.stream for work in held])
            assert tables.pages[rows, 0].tolist() == [work.stream.pages[0] for work in works]


def test_messages_are_framed() -> None:
    a, b = (Wire(end) for end in socket.socketpair())
    a.tell(command="x", pages=3)
    a.send(STEP, b"12345678")
    assert b.receive() == (COMMAND, b'{"command": "x", "pages": 3}') and b.receive() == (STEP, b"12345678")
    a.close()
    with pytest.raises(EOFError):
        b.receive()
    b.close()
