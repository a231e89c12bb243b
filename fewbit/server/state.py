"""State: what every route works with."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request as HttpRequest

from fewbit.engine.loop import Feed, Loop
from fewbit.engine.params import SamplingParams
from fewbit.engine.request import Request
from fewbit.server.body import Bodies
from fewbit.server.config import ServerConfig
from fewbit.server.failures import Refusal
from fewbit.server.metrics import Metrics
from fewbit.server.text import Text

B = TypeVar("B", bound=BaseModel)


@dataclass(slots=True)
class State:
    """facts: what the checkpoint is, for the page and /info. draining: no new work is taken."""

    config: ServerConfig
    loop: Loop
    text: Text
    names: Sequence[str]
    facts: dict[str, Any]
    bodies: Bodies
    metrics: Metrics
    started: float = field(default_factory=time.time)
    draining: bool = False

    @property
    def max_len(self) -> int:
        return int(self.loop.engine.limits.max_len)

    @property
    def vocab(self) -> int:
        return int(self.loop.engine.vocab)

    async def read(self, http: HttpRequest, kind: type[B]) -> B:
        """The body as one of the protocol's, for a model that is served."""
        found = checked(await self.bodies.read(http), kind)
        self.known(getattr(found, "model", None))
        return found

    def known(self, model: str | None) -> str:
        """The name to answer under."""
        if model is not None and model not in self.names:
            shown = model if len(model) < 200 else model[:200] + " ..."
            raise Refusal(404, f"the model {shown!r} is not served; {', '.join(self.names)} is", "model",
                          "model_not_found")  # fmt: skip
        return model if model is not None else self.names[0]

    def open(self) -> None:
        """Refuse while nothing new is taken."""
        if self.loop.dead:
            raise Refusal(503, "the engine has stopped; this server is about to end", code="engine_dead")
        if self.draining:
            raise Refusal(503, "the server is shutting down", code="shutting_down")

    def checked(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Refuse at once what the engine would refuse at its next step."""
        if prompt and (min(prompt) < 0 or max(prompt) >= self.vocab):
            worst = next(t for t in prompt if not 0 <= t < self.vocab)
            raise Refusal(400, f"prompt: {min(worst, 1 << 63)} is no token id; they go from 0 to {self.vocab - 1}",
                          "prompt")  # fmt: skip
        if len(prompt) >= self.max_len:
            raise Refusal(400, f"the prompt has {len(prompt)} tokens; with one to generate, {self.max_len - 1} fit",
                          "prompt", "context_length_exceeded")  # fmt: skip
        params.checked(self.vocab, self.max_len, len(prompt))

    async def submit(self, requests: Sequence[Request]) -> Feed:
        self.open()
        rows = sum(request.params.n for request in requests)
        if rows > self.loop.room:
            raise Refusal(400, f"{rows} completions in one request; this server holds {self.loop.room} at most", "n")
        for request in requests:
            self.checked(request.prompt, request.params)
        return await self.loop.submit(requests)


def checked(value: Any, kind: type[B]) -> B:
    """A body of the protocol; the first things that are wrong, without what was sent."""
    if not isinstance(value, dict):
        raise Refusal(400, f"the body is a JSON {type(value).__name__}; want an object")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        said = [f"{_place(one['loc'])}: {_wrong(one, kind)}" for one in found[:3]]
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise Refusal(400, "; ".join(said) + more, _place(found[0]["loc"][:1])) from None


def _wrong(error: Any, kind: type[BaseModel]) -> str:
    """What pydantic says, in the words of a body."""
    if error["type"] == "missing":
        return "this field is needed"
    if error["type"] != "extra_forbidden":
        return str(error["msg"])
    near = get_close_matches(str(error["loc"][0]), kind.model_fields, 1) if len(error["loc"]) == 1 else []
    return "there is no such field" + (f"; did you mean {near[0]}?" if near else "")


def _place(loc: Sequence[int | str]) -> str:
    return ".".join(str(part)[:64] for part in loc[:8])
