"""POST /v1/completions: a text, several, token ids, several lists of them; echo and log-probabilities of both parts."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fewbit.engine.loop import Feed
from fewbit.engine.request import Delta, Request
from fewbit.server.answer import Answer, Choice
from fewbit.server.failures import Refusal, encoded
from fewbit.server.logprobs import Lists, prompt_rows
from fewbit.server.protocol import CompletionBody
from fewbit.server.sampling import params_of
from fewbit.server.state import State
from fewbit.server.stream import DONE, Events, event, watched, with_errors

MOST_PROMPTS = 1024


async def completions(http: HttpRequest) -> Any:
    state: State = http.app.state.fewbit
    state.open()
    body = await state.read(http, CompletionBody)
    if body.suffix:
        raise Refusal(400, "suffix is not supported: the models served continue a text, they do not fill it in",
                      "suffix")  # fmt: skip
    shape = Shape(state, body, await requests_of(state, body))
    feed = await state.submit(shape.requests)
    if body.stream:
        return Events(feed, with_errors(shape.events(feed)), state.config.send_seconds, shape.answer.end)
    async with watched(feed, http.receive):
        choices = await shape.answer.gather(feed)
    return Response(encoded(shape.whole(choices)), media_type="application/json")


async def requests_of(state: State, body: CompletionBody) -> list[Request]:
    prompts = await prompts_of(state, body)
    scoring = bool(body.echo) and body.max_tokens == 0  # only the prompt is wanted; the engine must make one token
    extra = {"logprobs": body.logprobs, "prompt_logprobs": body.logprobs if body.echo else None}
    if scoring:
        body = body.model_copy(update={"max_tokens": 1})
    params = params_of(body, state.config.sampling_defaults, state.max_len, **extra)
    name = f"cmpl-{uuid.uuid4().hex}"
    return [Request(f"{name}-{i}", ids, params, body.priority, text=text) for i, (text, ids) in enumerate(prompts)]


async def prompts_of(state: State, body: CompletionBody) -> list[tuple[str | None, list[int]]]:
    given = body.prompt
    if isinstance(given, str):
        given = [given]
    if not given:
        raise Refusal(400, "prompt is empty: at least one token is needed", "prompt")
    if isinstance(given[0], int):
        return [(None, given)]
    if len(given) > MOST_PROMPTS:
        raise Refusal(400, f"{len(given)} prompts in one request: at most {MOST_PROMPTS} are taken", "prompt")
    if isinstance(given[0], list):
        return [(None, ids) for ids in given]
    special = body.add_special_tokens is not False
    ids = await state.text.encode_all(given, special)
    return list(zip(given, ids, strict=True))


class Shape:
    """How the answer to one body is written."""

    def __init__(self, state: State, body: CompletionBody, requests: list[Request]):
        self.state, self.body, self.requests = state, body, requests
        self.answer = Answer(requests, state.metrics)
        self.scoring = bool(body.echo) and body.max_tokens == 0
        self.top = body.logprobs
        as_ids = bool(body.return_tokens_as_token_ids)
        self.lists = [Lists(state.text.token, as_ids) for _ in self.answer.choices]
        self.head = {
            "id": requests[0].id.rsplit("-", 1)[0], "object": "text_completion", "created": int(time.time()),
            "model": state.known(body.model),
        }  # fmt: skip

    def prompt(self, choice: Choice) -> str:
        if choice.request.text is None and self.state.text.tokenizer is not None:
            choice.request.text = self.state.text.tokenizer.decode(choice.request.prompt)
        return choice.request.text or ""

    def part(self, choice: Choice, delta: Delta | Choice, first: bool) -> dict[str, Any]:
        """A choice, of a whole answer or of one event; `first`: the prompt goes before it."""
        echo = bool(self.body.echo) and first
        text = "" if self.scoring else delta.text
        found: dict[str, Any] = {"index": choice.index, "text": self.prompt(choice) + text if echo else text}
        found["logprobs"] = self.probabilities(choice, delta, echo)
        found["finish_reason"], found["stop_reason"] = delta.finish, delta.stop_reason
        if self.body.return_token_ids:
            found["token_ids"] = list(delta.tokens)
            found["prompt_token_ids"] = choice.request.prompt if first else None
        if self.body.prompt_logprobs is not None and delta.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_rows(delta.prompt_logprobs, self.state.text.token)
        return found

    def probabilities(self, choice: Choice, delta: Delta | Choice, echo: bool) -> dict[str, list[Any]] | None:
        if self.top is None:
            return None
        tokens, rows = list(delta.tokens), list(delta.logprobs or [])
        if self.scoring:
            tokens, rows = [], []
        if echo and delta.prompt_logprobs:
            tokens, rows = choice.request.prompt + tokens, delta.prompt_logprobs + rows
        return self.lists[choice.index].of(tokens[: len(rows)], rows, self.top)

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        shared = [self._with_prompt(choice) for choice in choices]
        return {**self.head, "choices": [self.part(c, c, True) for c in shared], "usage": self.answer.usage()}

    def _with_prompt(self, choice: Choice) -> Choice:
        """All continuations of a request show its prompt's figures, whichever of them carried those."""
        if choice.prompt_logprobs is None:
            same = (c for c in self.answer.choices if c.request is choice.request and c.prompt_logprobs is not None)
            choice.prompt_logprobs = next((c.prompt_logprobs for c in same), None)
        return choice

    async def events(self, feed: Feed) -> AsyncIterator[bytes]:
        seen: set[int] = set()
        by_token = self.top is not None or self.body.return_token_ids
        options = self.body.stream_options
        usage = bool(options and options.include_usage)
        tail = {"usage": None} if usage else {}
        async for pairs in self.answer.deltas(feed):
            pieces = []
            for choice, delta in pairs:
                first = choice.index not in seen
                if delta.text or delta.finish or (delta.tokens and (by_token or (first and self.body.echo))):
                    seen.add(choice.index)
                    part = self.part(choice, delta, first)
                    pieces.append(event(encoded({**self.head, "choices": [part], **tail})))
            if pieces:
                yield b"".join(pieces)
        if usage:
            yield event(encoded({**self.head, "choices": [], "usage": self.answer.usage()}))
        yield DONE
