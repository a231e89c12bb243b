"""Load on any server that speaks the OpenAI API: requests at random times, and what each of them met with.

Prompts are token ids, drawn by a seed, so that two servers are asked the very same. Completions are streamed; a token's
time is when its chunk came. Plain asyncio streams: the client must not be what is measured.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from fewbit.errors import RequestError


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked. rate: requests a second on average, Poisson; inf = all at once."""

    url: str
    model: str
    count: int = 64
    input_len: int = 128
    output_len: int = 64
    rate: float = float("inf")
    seed: int = 0
    vocab: int = 1000  # ids are drawn from 10 up to this
    key: str | None = None


@dataclass(slots=True)
class Met:
    """One request's fate: when its chunks came, in seconds from its sending."""

    times: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """Milliseconds; ttft: to the first token, tpot: for each later one, itl: between chunks."""

    url: str
    completed: int
    failed: int
    seconds: float
    request_rate: float
    output_rate: float
    total_rate: float
    ttft: dict[str, float]
    tpot: dict[str, float]
    itl: dict[str, float]
    errors: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


async def run(load: Load) -> Figures:
    """All requests, and the figures."""
    draw = random.Random(load.seed)
    bodies = [{"model": load.model, "prompt": [draw.randrange(10, load.vocab) for _ in range(load.input_len)],
               "max_tokens": load.output_len, "temperature": 0, "ignore_eos": True, "stream": True,
               "stream_options": {"include_usage": True}} for _ in range(load.count)]  # fmt: skip
    gaps = [0.0 if load.rate == float("inf") else draw.expovariate(load.rate) for _ in bodies]
    begun, tasks = time.perf_counter(), []
    for body, gap in zip(bodies, gaps, strict=True):
        await asyncio.sleep(gap)
        tasks.append(asyncio.create_task(one(load, body)))
    found = await asyncio.gather(*tasks)
    return figures(load, found, time.perf_counter() - begun)


async def one(load: Load, body: dict[str, Any]) -> Met:
    """Send a completion and read its stream to the end."""
    met, begun = Met(), time.perf_counter()
    try:
        async for event in events(load.url, "/v1/completions", body, load.key):
            if event.get("choices"):
                met.times.append(time.perf_counter() - begun)
            met.tokens = (event.get("usage") or {}).get("completion_tokens", met.tokens)
    except (OSError, ValueError, RequestError, asyncio.IncompleteReadError) as error:
        met.error = f"{type(error).__name__}: {error}"
    return met


async def events(url: str, path: str, body: dict[str, Any], key: str | None) -> Any:
    """The JSON of each server-sent event."""
    parts = plain(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80, limit=1 << 24)
    try:
        data = json.dumps(body).encode()
        head = [f"POST {parts.path.rstrip('/').removesuffix('/v1')}{path} HTTP/1.1", f"Host: {parts.netloc}",
                "Content-Type: application/json", f"Content-Length: {len(data)}", "Connection: close"]  # fmt: skip
        head += [f"Authorization: Bearer {key}"] if key else []
        writer.write("\r\n".join([*head, "", ""]).encode() + data)
        await writer.drain()
        status = (await reader.readline()).split()
        while (await reader.readline()).strip():
            pass
        if len(status) < 2 or status[1] != b"200":
            raise RequestError(f"{url}: answered {b' '.join(status[1:]).decode()}: {(await reader.read(300)).decode()}")
        while line := await reader.readline():
            if line.startswith(b"data:") and line.strip() != b"data: [DONE]":
                yield json.loads(line[5:])
    finally:
        writer.close()


def models(url: str, key: str | None = None) -> str:
    """The first model that a server lists."""
    plain(url)
    request = Request(f"{url.rstrip('/').removesuffix('/v1')}/v1/models")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=10) as answer:  # as the load itself: no proxy
            return str(json.load(answer)["data"][0]["id"])
    except HTTPError as error:
        hint = ": give it a key that it takes (--api-key)" if error.code == 401 else ": is that an OpenAI server?"
        raise RequestError(f"{url}: no list of models: {error}{hint}") from None
    except (OSError, ValueError, LookupError) as error:
        said = error.reason if isinstance(error, URLError) else error
        raise RequestError(f"{url}: no list of models: {said}") from None


def plain(url: str) -> SplitResult:
    """The parts of a URL that a load can be put on."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise RequestError(f"{url}: want http://host:port")
    return parts


def figures(load: Load, found: Sequence[Met], seconds: float) -> Figures:
    good = [met for met in found if met.error is None and met.times]
    made = sum(met.tokens or len(met.times) for met in good)
    later = [(met.times[-1] - met.times[0]) / max(1, (met.tokens or len(met.times)) - 1) for met in good]
    gaps = [b - a for met in good for a, b in zip(met.times, met.times[1:], strict=False)]
    return Figures(
        load.url, len(good), len(found) - len(good), seconds, len(good) / seconds, made / seconds,
        (made + len(good) * load.input_len) / seconds, spread([met.times[0] for met in good]), spread(later),
        spread(gaps), tuple(sorted({met.error for met in found if met.error}))[:5],
    )  # fmt: skip


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Mean, median and tails, in milliseconds."""
    if not seconds:
        return {}
    ordered = sorted(s * 1000 for s in seconds)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {"mean": statistics.fmean(ordered), "p50": at(0.5), "p90": at(0.9), "p99": at(0.99)}
