"""An engine that repeats the prompt, token by token, as slowly or as badly as a test wants. No model: load alone."""

import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from fewbit.engine.params import SamplingParams
from fewbit.engine.request import Delta, Request
from fewbit.errors import CapacityError


@dataclass
class Stats:
    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 1000
    prompt_tokens: int = 0
    generated_tokens: int = 0


@dataclass
class Rows:
    request: Request
    left: dict[int, int] = field(default_factory=dict)  # continuation -> tokens made


class EchoEngine:
    """seconds: of a step. most: continuations that run at once; as many again may wait."""

    vocab = 256

    def facts(self) -> dict[str, Any]:
        return {}

    def __init__(self, seconds: float = 0.0, most: int = 8, queue: int = 8, max_len: int = 100_000):
        self.seconds, self.tokenizer, self.failure = seconds, None, None
        self.config = SimpleNamespace(served_names=("echo",), max_queue=queue)
        self.limits = SimpleNamespace(max_len=max_len, most_running=most)
        self.rows: dict[str, Rows] = {}
        self.counts = Stats()
        self.threads: set[int] = set()
        self.closed = False
        self.text = "x"

    def add(self, request: Request) -> None:
        self.threads.add(threading.get_ident())
        if sum(len(rows.left) for rows in self.rows.values()) >= self.limits.most_running + self.config.max_queue:
            raise CapacityError("full")
        request.params = request.params.checked(self.vocab, self.limits.max_len, len(request.prompt))
        self.rows[request.id] = Rows(request, dict.fromkeys(range(request.params.n), 0))
        self.counts.prompt_tokens += len(request.prompt)

    def prepare(self, params: SamplingParams) -> None:
        pass

    def abort(self, request_id: str) -> None:
        self.threads.add(threading.get_ident())
        self.rows.pop(request_id, None)

    def has_work(self) -> bool:
        return bool(self.rows)

    def step(self) -> list[Delta]:
        time.sleep(self.seconds)
        if self.failure:
            raise self.failure
        found = [self._one(rows, index) for rows in list(self.rows.values())[: self.limits.most_running]
                 for index in list(rows.left)]  # fmt: skip
        self.rows = {name: rows for name, rows in self.rows.items() if rows.left}
        return found

    def _one(self, rows: Rows, index: int) -> Delta:
        request = rows.request
        made = rows.left[index]
        token = request.prompt[made % len(request.prompt)]
        rows.left[index] += 1
        self.counts.generated_tokens += 1
        last = rows.left[index] >= request.params.max_tokens
        if last:
            del rows.left[index]
        if token == 255:  # the sign of a row that is not finite
            rows.left.pop(index, None)
            return Delta(request.id, index, finish="error")
        return Delta(request.id, index, self.text, [token], finish="length" if last else None)

    def stats(self) -> Any:
        running = list(self.rows.values())
        self.counts.running = min(len(running), self.limits.most_running)
        self.counts.waiting = max(0, len(running) - self.limits.most_running)
        self.counts.pages_used = len(running)
        return self.counts

    def shutdown(self) -> None:
        self.closed = True
