"""POST /v1/responses: the text part of OpenAI's newer API, whole and streaming. Nothing is stored."""

import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fewbit.engine.loop import Feed
from fewbit.engine.request import Request
from fewbit.server.answer import Answer, Choice
from fewbit.server.chat import request_of
from fewbit.server.failures import Refusal, encoded
from fewbit.server.protocol import ChatBody, ResponsesBody
from fewbit.server.sampling import format_of
from fewbit.server.state import State, checked
from fewbit.server.stream import Events, event, watched, with_errors
from fewbit.server.tools import Choosing

NOT_SERVED = {
    "previous_response_id": "nothing is stored; send the whole conversation as input",
    "conversation": "nothing is stored; send the whole conversation as input",
    "background": "a response is made while the connection is open",
    "prompt": "nothing is stored; send the text itself",
    "tools": "functions are called through /v1/chat/completions",
    "stream_options": "use /v1/chat/completions",
}
SAME = ("model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "ignore_eos", "user")


async def responses(http: HttpRequest) -> Any:
    state: State = http.app.state.fewbit
    state.open()
    body = await state.read(http, ResponsesBody)
    for name, why in NOT_SERVED.items():
        if getattr(body, name):
            raise Refusal(400, f"{name} is not supported: {why}", name)
    chat = chat_of(body)
    request = await request_of(state, chat, Choosing((), "none"))
    feed = await state.submit([request])
    made = Made(state, body, request)
    if body.stream:
        return Events(feed, with_errors(made.events(feed)), state.config.send_seconds, made.answer.end)
    async with watched(feed, http.receive):
        choices = await made.answer.gather(feed)
    return Response(encoded(made.object(choices[0])), media_type="application/json")


def chat_of(body: ResponsesBody) -> ChatBody:
    """The same question as a chat."""
    fields: dict[str, Any] = {name: getattr(body, name) for name in SAME}
    fields["messages"] = messages_of(body)
    fields["max_completion_tokens"] = body.max_output_tokens
    if effort := (body.reasoning or {}).get("effort"):
        fields["reasoning_effort"] = effort
    shape = (body.text or {}).get("format")
    if shape is not None:
        if not isinstance(shape, dict):
            raise Refusal(400, "text.format: want an object", "text")
        structured = format_of(shape, "text.format")
        fields["structured_outputs"] = structured
    return checked({name: value for name, value in fields.items() if value is not None}, ChatBody)


def messages_of(body: ResponsesBody) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if body.instructions:
        found.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*found, {"role": "user", "content": body.input}]
    for item in body.input:
        if item.get("type", "message") != "message" or "role" not in item:
            raise Refusal(400, f"input: an item of type {str(item.get('type'))[:64]!r}; messages are what is read",
                          "input")  # fmt: skip
        found.append({"role": item["role"], "content": item.get("content")})
    return found


class Made:
    """A response on its way."""

    def __init__(self, state: State, body: ResponsesBody, request: Request):
        self.state, self.body = state, body
        self.answer = Answer([request], state.metrics)
        self.id, self.item = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self.created, self.number = int(time.time()), 0
        self.params = request.params

    def object(self, choice: Choice | None = None) -> dict[str, Any]:
        done = choice is not None
        status = "in_progress" if not done else _status(choice.finish)  # type: ignore[union-attr]
        body = self.body
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
            "model": self.state.known(body.model), "output": [self.message(choice.text, status)] if choice else [],
            "parallel_tool_calls": False, "previous_response_id": None, "temperature": self.params.temperature,
            "top_p": self.params.top_p, "text": body.text or {"format": {"type": "text"}}, "tool_choice": "none",
            "tools": [], "truncation": "disabled", "store": False, "metadata": body.metadata or {}, "user": body.user,
            "reasoning": {"effort": None, "summary": None}, "usage": self.usage() if done else None,
        }  # fmt: skip

    def usage(self) -> dict[str, Any]:
        found = self.answer.usage()
        return {
            "input_tokens": found["prompt_tokens"], "input_tokens_details": found["prompt_tokens_details"],
            "output_tokens": found["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": found["total_tokens"],
        }  # fmt: skip

    def message(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": content}

    def event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self.number, **fields}
        self.number += 1
        return event(encoded(data), kind)

    async def events(self, feed: Feed) -> AsyncIterator[bytes]:
        place: Mapping[str, Any] = {"item_id": self.item, "output_index": 0, "content_index": 0}
        yield b"".join([
            self.event("response.created", response=self.object()),
            self.event("response.in_progress", response=self.object()),
            self.event("response.output_item.added", output_index=0, item=self.message(None, "in_progress")),
            self.event("response.content_part.added", **place, part=_part("")),
        ])  # fmt: skip
        texts: list[str] = []
        async for pairs in self.answer.deltas(feed):
            new = "".join(delta.text for _, delta in pairs)
            texts.append(new)
            if new:
                yield self.event("response.output_text.delta", **place, delta=new, logprobs=[])
        choice = self.answer.choices[0]
        choice.text = "".join(texts)
        status = _status(choice.finish)
        yield b"".join([
            self.event("response.output_text.done", **place, text=choice.text, logprobs=[]),
            self.event("response.content_part.done", **place, part=_part(choice.text)),
            self.event("response.output_item.done", output_index=0, item=self.message(choice.text, status)),
            self.event(f"response.{status}", response=self.object(choice)),
        ])  # fmt: skip


def _status(finish: str | None) -> str:
    return {"stop": "completed", "length": "incomplete"}.get(finish or "", "failed")


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
