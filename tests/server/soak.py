"""A mixed load for a while: memory, descriptors, threads and pages must end where they began.

python -m tests.server.soak --seconds 600
"""

import argparse
import gc
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.server.served import Running, engine, model, running

HI = [{"role": "user", "content": "hi"}]


def memory() -> int:
    """Resident bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def standing(served: Running) -> dict[str, int]:
    served.idle()
    gc.collect()
    return {
        "memory": memory(), "descriptors": len(os.listdir("/proc/self/fd")), "threads": threading.active_count(),
        "pages": served.loop.stats.pages_used, "rows": served.loop.rows, "bodies": served.state.bodies.held,
    }  # fmt: skip


def one(url: str, choice: random.Random, codes: Counter[int]) -> None:
    tokens = choice.randrange(1, 60)
    plain: dict[str, Any] = {"prompt": "a" * choice.randrange(1, 100), "max_tokens": tokens, "ignore_eos": True}
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        kind = choice.randrange(7)
        if kind == 0:
            codes[http.post("/v1/completions", json={**plain, "n": choice.randrange(1, 5)}).status_code] += 1
        elif kind == 1:  # leaves early
            with http.stream("POST", "/v1/completions", json={**plain, "stream": True}) as found:
                next(found.iter_raw(), b"")
        elif kind == 2:
            chat = {"messages": HI, "max_tokens": tokens, "stream": True, "logprobs": True}
            with http.stream("POST", "/v1/chat/completions", json=chat) as found:
                codes[found.status_code] += len(list(found.iter_lines())) > 0
        elif kind == 3:
            codes[http.post("/v1/completions", json={**plain, "max_tokens": -1}).status_code] += 1
        elif kind == 4:
            shaped = {**plain, "guided_regex": f"[a-z]{{1,{tokens}}}"}
            codes[http.post("/v1/completions", json=shaped).status_code] += 1
        elif kind == 5:
            codes[http.post("/v1/completions", content=b"[" * 1000).status_code] += 1
        else:
            scored = {**plain, "echo": True, "logprobs": 2, "max_tokens": 1}
            codes[http.post("/v1/completions", json=scored).status_code] += 1


def load(url: str, seconds: float, seed: int, codes: Counter[int]) -> None:
    choice, end = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        one(url, choice, codes)


def loaded(url: str, seconds: float, workers: int, codes: Counter[int]) -> None:
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(load, url, seconds, seed, codes) for seed in range(workers)]:
            done.result()


def soak(seconds: float, workers: int) -> int:
    codes: Counter[int] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        made = engine(model(Path(folder) / "model"), max_num_seqs=8, max_queue=16)
        with running(made) as served:
            loaded(served.url, min(seconds, 90), workers, codes)  # caches fill, pages are touched for the first time
            before = standing(served)
            loaded(served.url, seconds, workers, codes)
            after = standing(served)
    print(f"before {before}\nafter  {after}\nanswers {dict(codes)}")
    worse = [name for name in before if name != "memory" and after[name] > before[name]]
    if after["memory"] > before["memory"] * 1.1 + (16 << 20):
        worse.append("memory")
    if any(code >= 500 for code in codes):
        worse.append("answers")
    print("worse: " + ", ".join(worse) if worse else "all at base")
    return 1 if worse else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--workers", type=int, default=8)
    given = parser.parse_args()
    sys.exit(soak(given.seconds, given.workers))
