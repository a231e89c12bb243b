"""Prometheus text: the engine's figures and the server's own, each under our name and, where it has one, vLLM's."""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

STATS = (  # field of the engine's Stats, kind, our name, vLLM's, what it is
    ("running", "gauge", "requests_running", "num_requests_running", "Continuations in the batch."),
    ("waiting", "gauge", "requests_waiting", "num_requests_waiting", "Continuations that wait for a place."),
    ("pages_used", "gauge", "cache_pages_used", "", "Pages of KV cache in use."),
    ("pages_total", "gauge", "cache_pages", "", "Pages of KV cache."),
    ("preemptions", "counter", "preemptions_total", "num_preemptions_total", "Requests sent back to wait."),
    ("prompt_tokens", "counter", "prompt_tokens_total", "prompt_tokens_total", "Tokens of prompts."),
    ("generated_tokens", "counter", "generated_tokens_total", "generation_tokens_total", "Tokens generated."),
    ("prefix_queries", "counter", "prefix_queries_total", "prefix_cache_queries_total", "Lookups of the prefix cache."),
    ("prefix_hits", "counter", "prefix_hits_total", "prefix_cache_hits_total", "Hits of the prefix cache."),
    ("nan_rows", "counter", "nan_rows_total", "", "Rows of logits that were not finite; their requests ended."),
    ("saturated", "counter", "saturated_total", "", "Activations that a static scale cut off."),
    ("steps", "counter", "steps_total", "", "Steps of the engine."),
)  # fmt: skip


class Histogram:
    def __init__(self, bounds: Iterable[float]):
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str, labels: Mapping[str, str]) -> list[str]:
        found, total = [], 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            found.append(line(f"{name}_bucket", {**labels, "le": f"{bound}"}, total))
        return [*found, line(f"{name}_sum", labels, self.sum), line(f"{name}_count", labels, total)]


class Metrics:
    """facts: the checkpoint's, for the kernels chosen and where the scales of the KV cache come from."""

    def __init__(self, model: str, facts: Mapping[str, Any]):
        self.model, self.facts = model, facts
        self.finished: Counter[str] = Counter()
        self.answers: Counter[int] = Counter()
        self.histograms = {
            "first_token_seconds": (Histogram(SECONDS), "time_to_first_token_seconds", "Until the first token."),
            "token_seconds": (Histogram(SECONDS), "inter_token_latency_seconds", "Mean time of a token after it."),
            "request_seconds": (Histogram(SECONDS), "e2e_request_latency_seconds", "A whole request."),
            "request_prompt_tokens": (Histogram(TOKENS), "request_prompt_tokens", "Tokens of a prompt."),
            "request_generated_tokens": (
                Histogram(TOKENS),
                "request_generation_tokens",
                "Tokens generated for a request.",
            ),
        }

    def ended(self, clock: "Clock", prompt: int, made: int, reasons: Iterable[str | None]) -> None:
        """A request has ended; reasons: how each of its continuations did."""
        now = time.monotonic()
        self.finished.update(reason or "abort" for reason in reasons)
        self._add("request_seconds", now - clock.start)
        self._add("request_prompt_tokens", prompt)
        self._add("request_generated_tokens", made)
        if clock.first is not None:
            self._add("first_token_seconds", clock.first - clock.start)
            if made > 1:
                self._add("token_seconds", (now - clock.first) / (made - 1))

    def _add(self, name: str, value: float) -> None:
        self.histograms[name][0].add(value)

    def text(self, stats: Any) -> str:
        labels = {"model_name": self.model}
        found: list[str] = []
        for field, kind, ours, theirs, about in STATS:
            value = getattr(stats, field, None)
            if value is not None:
                _pair(found, kind, ours, theirs, about, lambda name, v=value: [line(name, labels, v)])
        used = getattr(stats, "pages_used", 0) / max(getattr(stats, "pages_total", 0), 1)
        _pair(found, "gauge", "cache_usage", "kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.",
              lambda name: [line(name, labels, used)])  # fmt: skip
        reasons, statuses = sorted(self.finished.items()), sorted(self.answers.items())
        _pair(found, "counter", "requests_total", "request_success_total", "Continuations ended, by how.",
              lambda name: [line(name, {**labels, "finished_reason": why}, n) for why, n in reasons])  # fmt: skip
        _pair(found, "counter", "http_responses_total", "", "Responses by status.",
              lambda name: [line(name, {"status": str(status)}, n) for status, n in statuses])  # fmt: skip
        for ours, (histogram, theirs, about) in self.histograms.items():
            _pair(found, "histogram", ours, theirs, about, lambda name, h=histogram: h.lines(name, labels))
        found += self._chosen()
        return "\n".join(found) + "\n"

    def _chosen(self) -> list[str]:
        found: list[str] = []
        rows = [line("fewbit_kernel_modules", row, n) for *_, row, n in self._kernels()]
        _head(found, "fewbit_kernel_modules", "gauge", "Modules by the kernel that runs them.", rows)
        kv = {"kv": str(self.facts.get("kv", "auto")), "scales": str(self.facts.get("kv_scales", "none")),
              "held": str(self.facts.get("kv_held", "values"))}  # fmt: skip
        _head(found, "fewbit_cache_info", "gauge", "Type of the KV cache and where its scales come from.",
              [line("fewbit_cache_info", kv, 1)])  # fmt: skip
        return found

    def _kernels(self) -> list[tuple[dict[str, str], int]]:
        rows = self.facts.get("kernels", ())
        return [({"kernel": str(r["kernel"]), "format": str(r["format"])}, int(r["modules"])) for r in rows]


class Clock:
    """When a request began and when its first token came."""

    __slots__ = ("first", "start")

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.first: float | None = None

    def token(self) -> None:
        if self.first is None:
            self.first = time.monotonic()


def _pair(found: list[str], kind: str, ours: str, theirs: str, about: str, rows: Any) -> None:
    """The same figure under our name and vLLM's."""
    for name in (f"fewbit_{ours}", f"vllm:{theirs}" if theirs else ""):
        if name:
            _head(found, name, kind, about, rows(name))


def _head(found: list[str], name: str, kind: str, about: str, rows: list[str]) -> None:
    if rows:
        found += [f"# HELP {name} {about}", f"# TYPE {name} {kind}", *rows]


def line(name: str, labels: Mapping[str, str], value: float) -> str:
    said = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"{name}{{{said}}} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
