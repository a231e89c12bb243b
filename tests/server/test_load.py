"""Under load: bursts, slow readers, clients that leave, an engine that dies, a server that is told to end."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from fewbit.engine.loop import Loop
from fewbit.engine.params import SamplingParams
from fewbit.engine.request import Request
from fewbit.errors import CapacityError, FewbitError, RequestError
from tests.server.echo_engine import EchoEngine
from tests.server.served import Running, engine, running, until
from tests.yardstick import within


def body(tokens: int = 4, **more: Any) -> dict[str, Any]:
    return {"prompt": [1, 2, 3], "max_tokens": tokens, **more}


def raw(served: Running, sent: dict[str, Any]) -> socket.socket:
    """A request on a connection that the test holds."""
    data = json.dumps(sent).encode()
    host, port = served.url.removeprefix("http://").split(":")
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.connect((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    made.sendall(head.encode() + b"\r\n\r\n" + data)
    return made


def test_burst_of_ten_times_capacity() -> None:
    """All get an answer: as many as there is room for run, the others are told to come again."""
    echo = EchoEngine(seconds=0.01, most=4, queue=4)
    with running(lambda: echo) as served, ThreadPoolExecutor(80) as pool:

        def one(_: int) -> httpx.Response:
            return httpx.post(served.url + "/v1/completions", json=body(20), timeout=60, trust_env=False)

        found = list(pool.map(one, range(80)))
        codes = [answer.status_code for answer in found]
        assert set(codes) == {200, 429} and codes.count(200) >= 8
        assert all(a.headers["retry-after"] == "1" for a in found if a.status_code == 429)
        assert all(a.json()["error"]["type"] == "rate_limit_error" for a in found if a.status_code == 429)
        served.idle()
        assert served.post("/v1/completions", body()).status_code == 200


def test_more_than_there_ever_is_room_for() -> None:
    with running(lambda: EchoEngine(most=4, queue=4)) as served:
        assert served.post("/v1/completions", body(n=9)).status_code == 400
        assert served.post("/v1/completions", body(n=8)).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_client_that_leaves_frees_its_place(stream: bool, ahead: int) -> None:
    """While it runs, and while it waits behind another."""
    echo = EchoEngine(seconds=0.01, most=1, queue=4)
    with running(lambda: echo) as served:
        held = [raw(served, body(50_000, stream=True)) for _ in range(ahead)]
        until(lambda: len(echo.rows) == ahead)
        leaving = raw(served, body(50_000, stream=stream))
        until(lambda: len(echo.rows) == ahead + 1)
        steps = echo.counts.generated_tokens
        leaving.close()
        until(lambda: len(echo.rows) == ahead, 2)
        assert echo.counts.generated_tokens - steps < 100
        until(lambda: served.loop.rows == ahead)
        for one in held:
            one.close()
        served.idle()


def test_a_reader_that_stalls_is_cut_off() -> None:
    """It takes nothing: its request ends when it is too far behind, its connection soon after."""
    echo = EchoEngine(most=2)
    echo.text = "y" * 2000
    with running(lambda: echo, buffer=100, send_seconds=0.5) as served:
        stalled = raw(served, body(90_000, stream=True))
        until(lambda: echo.counts.generated_tokens > 100)
        assert served.post("/v1/completions", body()).status_code == 200  # others are not held up
        until(lambda: not echo.rows)
        assert echo.counts.generated_tokens < 60_000
        connections = served.server.server_state.connections
        until(lambda: all(one.cycle is None or one.cycle.response_complete for one in connections))
        stalled.close()
        served.idle()


def test_a_row_that_is_not_finite_ends_alone() -> None:
    with running(lambda: EchoEngine(seconds=0.01)) as served, ThreadPoolExecutor(2) as pool:
        good = pool.submit(served.post, "/v1/completions", body(20))
        bad = served.post("/v1/completions", {"prompt": [7, 255], "max_tokens": 20}).json()["choices"][0]
        assert (bad["finish_reason"], good.result().json()["choices"][0]["finish_reason"]) == ("error", "length")


@pytest.mark.parametrize("stream", [True, False])
def test_a_dead_engine(stream: bool) -> None:
    """Those who wait are told, /health says 503, and the server ends by itself."""
    echo = EchoEngine(seconds=0.02)
    with running(lambda: echo, death_seconds=0.5) as served, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(served.post, "/v1/completions", body(5000, stream=stream))
        until(lambda: echo.rows)
        start = time.monotonic()
        echo.failure = MemoryError("the card is gone")
        found = waiting.result()
        assert "the card is gone" in found.text and found.status_code == (200 if stream else 503)
        assert served.http.get("/health").status_code == 503
        assert served.post("/v1/completions", body()).status_code == 503
        until(lambda: served.server.should_exit, 5)
        assert within(time.monotonic() - start, 5) and echo.closed


def test_draining_finishes_and_refuses() -> None:
    echo = EchoEngine(seconds=0.02)
    with running(lambda: echo) as served, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(served.post, "/v1/completions", body(40))
        until(lambda: echo.rows)
        loop = engine_loop(served)
        loop.call_soon_threadsafe(served.server.told)
        until(lambda: served.state.draining)
        refused = httpx.post(served.url + "/v1/completions", json=body(), trust_env=False)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert httpx.get(served.url + "/health", trust_env=False).status_code == 503
        assert waiting.result().json()["usage"]["completion_tokens"] == 40
        until(lambda: served.server.should_exit)


def engine_loop(served: Running) -> asyncio.AbstractEventLoop:
    return next(iter(served.server.servers)).get_loop()


def test_one_thread_calls_the_engine() -> None:
    echo = EchoEngine(seconds=0.001)
    with running(lambda: echo) as served, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: served.post("/v1/completions", body()).status_code, range(32)))
        assert len(echo.threads) == 1 and echo.threads != {threading.get_ident()}


def test_nothing_is_left_behind() -> None:
    """Threads and connections are at base after a mixed load."""
    echo = EchoEngine(seconds=0.001, most=4, queue=100)
    before = threading.active_count()
    with running(lambda: echo) as served, ThreadPoolExecutor(8) as pool:

        def one(i: int) -> None:
            if i % 3:
                served.post("/v1/completions", body(20, stream=bool(i % 2)))
            else:
                raw(served, body(2000, stream=True)).close()

        list(pool.map(one, range(60)))
        served.idle()
        assert served.loop.stats.pages_used == 0 and not served.loop._live
        assert served.state.bodies.held == 0
    until(lambda: threading.active_count() <= before)


@pytest.mark.parametrize("when", ["queue", "prefill", "decode"])
def test_pages_are_back_when_a_client_leaves(folder: Path, when: str) -> None:
    """The real engine: whatever a client is in the middle of, its pages are free one step after it left."""
    make = engine(folder, max_num_seqs=1, max_num_batched_tokens=4, enable_prefix_caching=False)
    with running(make) as served:
        pool, scheduler = served.loop.engine.pool, served.loop.engine.scheduler
        long = {"prompt": [9] * 400, "max_tokens": 100, "ignore_eos": True}
        first = raw(served, long if when != "decode" else {**long, "prompt": [9], "max_tokens": 500})
        until(lambda: pool.used > 1)
        leaving = [first]
        if when == "queue":
            leaving.append(raw(served, long))
            until(lambda: scheduler.waiting)
        for one in leaving:
            one.close()
        served.idle()
        assert pool.used == 0
        assert served.good()


# ---- the loop alone


def request(tokens: int = 3, n: int = 1) -> Request:
    return Request(f"r{time.monotonic_ns()}", [1, 2], SamplingParams(max_tokens=tokens, n=n))


def looped(engine: EchoEngine, work: Any, buffer: int = 1024) -> Any:
    loop = Loop(lambda: engine, buffer)
    loop.start()
    try:
        return asyncio.run(work(loop))
    finally:
        assert loop.stop()


def test_feed_gives_every_delta_in_order() -> None:
    async def work(loop: Loop) -> list[tuple[int, list[int]]]:
        feed = await loop.submit([request(4, n=2)])
        found = []
        while batch := await feed.next():
            found += [(delta.index, delta.tokens) for delta in batch]
        feed.close()
        assert loop.rows == 0
        return found

    found = looped(EchoEngine(), work)
    for index in range(2):
        assert [tokens for i, tokens in found if i == index] == [[1], [2], [1], [2]]


def test_feed_falls_behind() -> None:
    async def work(loop: Loop) -> None:
        feed = await loop.submit([request(10_000)])
        await asyncio.sleep(0.3)
        with pytest.raises(CapacityError, match="behind"):
            while await feed.next():
                await asyncio.sleep(0)
        assert loop.rows == 0

    echo = EchoEngine(seconds=0.0005)
    looped(echo, work, buffer=10)
    assert not echo.rows


def test_a_refused_request_takes_its_group_along() -> None:
    async def work(loop: Loop) -> None:
        bad = Request("bad", [], SamplingParams())
        with pytest.raises(RequestError, match="empty"):
            await loop.submit([request(10_000), bad])
        assert loop.rows == 0

    echo = EchoEngine(seconds=0.001)
    looped(echo, work)
    assert not echo.rows


def test_stopping_ends_those_who_wait() -> None:
    async def work(loop: Loop) -> None:
        feed = await loop.submit([request(10_000)])
        loop._stopping = True
        with pytest.raises(FewbitError, match="stopped"):
            while await feed.next():
                pass

    looped(EchoEngine(seconds=0.001), work)


def test_an_engine_that_does_not_start_says_why() -> None:
    def make() -> Any:
        raise RequestError("no such model")

    with pytest.raises(RequestError, match="no such model"):
        Loop(make).start()
