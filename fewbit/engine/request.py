"""Request and Delta: what goes into an engine and what comes out; Stream: one continuation of a request within it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

from fewbit.engine.params import SamplingParams

Finish = Literal["stop", "length", "error"]
PENDING = -1  # in place of a token that is drawn and has not come to the host yet


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


class Tail(Sequence[int]):
    """A list from some place on, without a copy of it."""

    __slots__ = ("held", "start")

    def __init__(self, held: list[int], start: int):
        self.held, self.start = held, start

    def __len__(self) -> int:
        return len(self.held) - self.start

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self.held[self.start :][index]


@dataclass(slots=True, eq=False)
class Stream:
    """tokens: prompt and output; computed: how many of them have keys and values in `pages`, or will by the next step.

    The last token is PENDING while a step that draws it is in flight.
    """

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
    ended: bool = False

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def output(self) -> Tail:
        return Tail(self.tokens, self.prompt_length)

    @property
    def known(self) -> int:
        """Tokens that are on the host."""
        return len(self.tokens) - (self.tokens[-1] == PENDING)

    @property
    def full(self) -> bool:
        """It has all the tokens that it may have, one in flight counted."""
        most = self.request.params.max_tokens
        return most is not None and len(self.tokens) - self.prompt_length >= most

    @property
    def rank(self) -> tuple[int, float, int]:
        """Who comes first."""
        return self.request.priority, self.request.arrival, self.index
