"""Request and Delta: what goes into an engine and what comes out; Stream: one continuation of a request within it."""

import time
from dataclasses import dataclass, field
from typing import Any, Literal

from fewbit.engine.params import SamplingParams

Finish = Literal["stop", "length", "error"]


@dataclass(slots=True)
class Request:
    """A prompt and how to go on from it. A smaller priority comes first."""

    id: str
    prompt: list[int]
    params: SamplingParams
    priority: int = 0
    arrival: float = field(default_factory=time.monotonic)
    text: str | None = None


@dataclass(slots=True)
class Delta:
    """What one step gave one continuation."""

    request_id: str
    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] | None = None
    finish: Finish | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[Any] | None = None  # with the first delta, where asked for
    cached: int = 0  # tokens of the prompt that the prefix cache had


@dataclass(slots=True, eq=False)
class Stream:
    """tokens: prompt and output; computed: how many of them have keys and values in `pages`."""

    request: Request
    index: int
    seed: int
    tokens: list[int]
    detokenizer: Any = None
    matcher: Any = None
    computed: int = 0
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of the full pages, in order
    prompt_logprobs: list[Any] | None = None
    told: bool = False  # the first delta has gone out
    state: Any = None  # what a runner without pages keeps: (tokens it holds, transformers' cache)

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def made(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def rank(self) -> tuple[int, float, int]:
        """Who comes first."""
        return self.request.priority, self.request.arrival, self.index
