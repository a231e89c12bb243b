"""What a request's continuations come to: gathered from deltas, and counted."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fewbit.engine.loop import Feed
from fewbit.engine.request import Delta, Request
from fewbit.server.metrics import Clock, Metrics


@dataclass(slots=True)
class Choice:
    """One continuation, whole or as far as it has come."""

    index: int
    request: Request
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] | None = None
    prompt_logprobs: list[Any] | None = None
    finish: str | None = None
    stop_reason: int | str | None = None
    cached: int = 0


class Answer:
    """The choices of all requests that are answered together; choice number = request * n + continuation."""

    def __init__(self, requests: Sequence[Request], metrics: Metrics):
        self.requests, self.metrics, self.clock = requests, metrics, Clock()
        self.n = requests[0].params.n
        self.choices = [Choice(i, requests[i // self.n]) for i in range(len(requests) * self.n)]
        self._places = {request.id: i * self.n for i, request in enumerate(requests)}
        self._made, self._ended = 0, False
        self._texts: list[list[str]] = [[] for _ in self.choices]

    def choice(self, delta: Delta) -> Choice:
        return self.choices[self._places[delta.request_id] + delta.index]

    def note(self, delta: Delta) -> Choice:
        """Counts a delta without keeping its text."""
        choice = self.choice(delta)
        self._made += len(delta.tokens)
        if delta.cached:
            choice.cached = delta.cached
        if delta.finish is not None:
            choice.finish, choice.stop_reason = delta.finish, delta.stop_reason
        if delta.tokens:
            self.clock.token()
        return choice

    async def deltas(self, feed: Feed) -> AsyncIterator[list[tuple[Choice, Delta]]]:
        """What comes, as it comes."""
        while batch := await feed.next():
            yield [(self.note(delta), delta) for delta in batch]

    async def gather(self, feed: Feed) -> list[Choice]:
        """All of it."""
        async for pairs in self.deltas(feed):
            for choice, delta in pairs:
                self._keep(choice, delta)
        for choice, texts in zip(self.choices, self._texts, strict=True):
            choice.text = "".join(texts)
        self.end()
        return self.choices

    def _keep(self, choice: Choice, delta: Delta) -> None:
        self._texts[choice.index].append(delta.text)
        choice.tokens += delta.tokens
        if delta.logprobs is not None:
            choice.logprobs = choice.logprobs or []
            choice.logprobs += delta.logprobs
        if delta.prompt_logprobs is not None:
            choice.prompt_logprobs = delta.prompt_logprobs

    def end(self) -> None:
        """Into the metrics, once."""
        if not self._ended:
            self._ended = True
            prompt = sum(len(request.prompt) for request in self.requests)
            self.metrics.ended(self.clock, prompt, self._made, [choice.finish for choice in self.choices])

    def usage(self) -> dict[str, Any]:
        prompt = sum(len(request.prompt) for request in self.requests)
        cached = sum(max(c.cached for c in self.choices[i : i + self.n]) for i in range(0, len(self.choices), self.n))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._made,
            "total_tokens": prompt + self._made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
