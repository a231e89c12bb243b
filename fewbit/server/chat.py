"""POST /v1/chat/completions: messages through the model's own template, tools, formats, log-probabilities."""

import time
import uuid
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fewbit.engine.request import Request
from fewbit.server.answer import Answer, Choice
from fewbit.server.chat_stream import ChatEvents
from fewbit.server.failures import Refusal, encoded
from fewbit.server.logprobs import objects, prompt_rows
from fewbit.server.messages import prompt_of
from fewbit.server.protocol import ChatBody
from fewbit.server.sampling import params_of, structured_of
from fewbit.server.state import State
from fewbit.server.stream import Events, watched, with_errors
from fewbit.server.tools import Choosing, calls_in, choosing, parser_for

NOT_SERVED = {
    "functions": "use tools", "function_call": "use tool_choice", "audio": "text is what is generated",
    "web_search_options": "there is no search", "chat_template": "a template from a request is not run; --chat-template"
    " gives one to the server",
}  # fmt: skip


async def chat(http: HttpRequest) -> Any:
    state: State = http.app.state.fewbit
    state.open()
    body = await state.read(http, ChatBody)
    refuse(body)
    tools = choosing(body.tools, body.tool_choice, state.config.tool_call_parser or parser_for(state.text.template))
    request = await request_of(state, body, tools)
    feed = await state.submit([request])
    answer = Answer([request], state.metrics)
    if body.stream:
        events = ChatEvents(state, body, tools, answer)
        return Events(feed, with_errors(events.pieces(feed)), state.config.send_seconds, answer.end)
    async with watched(feed, http.receive):
        choices = await answer.gather(feed)
    return Response(encoded(whole(state, body, tools, answer, choices)), media_type="application/json")


def refuse(body: ChatBody) -> None:
    for name, why in NOT_SERVED.items():
        if getattr(body, name) is not None:
            raise Refusal(400, f"{name} is not supported: {why}", name)
    if body.modalities and body.modalities != ["text"]:
        raise Refusal(400, "modalities: text is what is generated", "modalities")
    if body.top_logprobs is not None and not body.logprobs:
        raise Refusal(400, "top_logprobs needs logprobs: true", "top_logprobs")


async def request_of(state: State, body: ChatBody, tools: Choosing) -> Request:
    if body.max_completion_tokens is not None and body.max_tokens is not None:
        raise Refusal(400, "max_tokens and max_completion_tokens: one of them", "max_completion_tokens")
    extra: dict[str, Any] = {"max_tokens": body.max_completion_tokens}
    if body.logprobs:
        extra["logprobs"] = body.top_logprobs or 0
    if schema := tools.schema():
        if structured_of(body):
            raise Refusal(400, "tool_choice forces a call, so nothing else can shape the answer", "tool_choice")
        extra["structured_outputs"] = {"json": schema, "disable_any_whitespace": True}  # or a weak model writes no end
    defaults = {"max_tokens": None, **state.config.sampling_defaults}
    params = params_of(body, defaults, state.max_len, **extra)
    text, ids = await prompt_of(state, body, [] if tools.form == "none" and body.tool_choice == "none" else tools.tools)
    return Request(f"chatcmpl-{uuid.uuid4().hex}", ids, params, body.priority, text=text)


def whole(state: State, body: ChatBody, tools: Choosing, answer: Answer, choices: list[Choice]) -> dict[str, Any]:
    request = answer.requests[0]
    found: dict[str, Any] = {
        "id": request.id, "object": "chat.completion", "created": int(time.time()), "model": state.known(body.model),
        "choices": [_choice(state, body, tools, choice) for choice in choices], "usage": answer.usage(),
    }  # fmt: skip
    rows = next((c.prompt_logprobs for c in choices if c.prompt_logprobs is not None), None)
    if rows is not None:
        found["prompt_logprobs"] = prompt_rows(rows, state.text.token)
    if body.return_token_ids:
        found["prompt_token_ids"] = request.prompt
    return found


def _choice(state: State, body: ChatBody, tools: Choosing, choice: Choice) -> dict[str, Any]:
    text, calls = (choice.text, []) if tools.form == "none" else calls_in(choice.text, tools.form)
    message: dict[str, Any] = {"role": state.config.response_role, "content": text if text or not calls else None}
    message["refusal"] = None
    if body.echo and body.messages[-1].role == message["role"] and isinstance(body.messages[-1].content, str):
        message["content"] = body.messages[-1].content + text
    if calls:
        message["tool_calls"] = [call.object() for call in calls]
    found = {"index": choice.index, "message": message, "logprobs": None, "stop_reason": choice.stop_reason,
             "finish_reason": finish_of(choice.finish, bool(calls), tools)}  # fmt: skip
    if body.logprobs:
        rows = objects(choice.tokens[: len(choice.logprobs or ())], choice.logprobs or (), body.top_logprobs or 0,
                       state.text.token, bool(body.return_tokens_as_token_ids))  # fmt: skip
        found["logprobs"] = {"content": rows, "refusal": None}
    if body.return_token_ids:
        found["token_ids"] = choice.tokens
    return found


def finish_of(finish: str | None, called: bool, tools: Choosing) -> str | None:
    """A call that the model chose to make is a reason of its own; one that was cut short is not."""
    return "tool_calls" if called and finish == "stop" else finish
