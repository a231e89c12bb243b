"""Speed of an engine in this process: latency of a batch, throughput of many requests. Prompts are random ids."""

import random
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from fewbit.engine.engine import Engine
from fewbit.engine.params import SamplingParams
from fewbit.engine.request import Request


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds are the median of the repetitions. step: of one token for the whole batch, prefill apart."""

    requests: int
    input_tokens: int
    output_tokens: int
    seconds: float
    first: float  # until every prompt has its first token
    step: float
    prefill_rate: float  # prompt tokens a second
    decode_rate: float  # tokens a second after the first ones
    total_rate: float  # output tokens a second over everything

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def requests(engine: Engine, count: int, input_len: int, output_len: int, seed: int) -> list[Request]:
    """Random texts of one length, each its own, none of which ends early."""
    draw = random.Random(seed)
    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True, detokenize=False)
    return [Request(f"bench-{seed}-{i}", [draw.randrange(engine.vocab) for _ in range(input_len)], params)
            for i in range(count)]  # fmt: skip


def once(engine: Engine, asked: Iterable[Request]) -> tuple[float, float, int]:
    """Run them all. -> seconds in all, seconds until each had a token, tokens made."""
    asked = list(asked)
    begun = time.perf_counter()
    for request in asked:
        engine.add(request)
    waiting, first, made = {r.id for r in asked}, 0.0, 0
    while engine.has_work():
        for delta in engine.step():
            made += len(delta.tokens)
            waiting.discard(delta.request_id)
        if not waiting and not first:
            first = time.perf_counter() - begun
    return time.perf_counter() - begun, first, made


def measure(engine: Engine, count: int, input_len: int, output_len: int, repeat: int = 3, warm: int = 1) -> Speed:
    """Each repetition has texts of its own, so that none finds its prefix in the cache."""
    for i in range(warm):
        once(engine, requests(engine, count, input_len, min(output_len, 4), -1 - i))
    runs = [once(engine, requests(engine, count, input_len, output_len, i)) for i in range(repeat)]
    seconds, first = (statistics.median(run[i] for run in runs) for i in range(2))
    steps = max(1, output_len - 1)
    later = max(seconds - first, 1e-9)
    return Speed(count, input_len, output_len, seconds, first, later / steps, count * input_len / first,
                 count * (output_len - 1) / later, count * output_len / seconds)  # fmt: skip
