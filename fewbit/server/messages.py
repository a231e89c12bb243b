"""From the messages of a chat to the tokens of a prompt."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fewbit.server.failures import Refusal
from fewbit.server.protocol import ChatBody, Message, TokenizeBody, Tool
from fewbit.server.state import State
from fewbit.server.text import special_tokens

TEXTS = ("text", "input_text", "output_text")
OURS = ("messages", "tools", "documents", "add_generation_prompt")
END = "\x00end of the last message\x00"


async def prompt_of(state: State, body: ChatBody | TokenizeBody, tools: Sequence[Tool] = ()) -> tuple[str, list[int]]:
    """The rendered text and its tokens."""
    if body.add_generation_prompt and body.continue_final_message:
        if "add_generation_prompt" in body.model_fields_set:
            raise Refusal(
                400, "add_generation_prompt and continue_final_message: one of them", "continue_final_message"
            )
        body = body.model_copy(update={"add_generation_prompt": False})
    messages = [plain(message, state.text.template) for message in body.messages or ()]
    text = await state.text.render(context_of(state, body, messages, tools))
    if body.continue_final_message:
        text = up_to_end(text)
    return text, await state.text.encode(text, bool(body.add_special_tokens))


def context_of(state: State, body: Any, messages: list[dict[str, Any]], tools: Sequence[Tool]) -> dict[str, Any]:
    extra = body.chat_template_kwargs or {}
    if found := [name for name in OURS if name in extra]:
        raise Refusal(400, f"chat_template_kwargs: {found[0]} is a field of its own", "chat_template_kwargs")
    if body.continue_final_message:
        messages[-1]["content"] = str(messages[-1].get("content") or "") + END
    if effort := getattr(body, "reasoning_effort", None):
        extra = {"reasoning_effort": effort, **extra}
    return {
        **special_tokens(state.text.tokenizer), **extra, "messages": messages,
        "tools": [tool.model_dump(exclude_none=True) for tool in tools] or None,
        "documents": getattr(body, "documents", None), "add_generation_prompt": body.add_generation_prompt,
    }  # fmt: skip


def up_to_end(text: str) -> str:
    before, mark, _ = text.partition(END.strip())
    if not mark:
        raise Refusal(400, "this chat template does not show the last message as it is: it cannot be continued",
                      "continue_final_message")  # fmt: skip
    return before


def plain(message: Message, template: str | None = None) -> dict[str, Any]:
    """A message as templates read it: text for content, objects for the arguments of calls."""
    found = message.model_dump(exclude_none=True)
    found["content"] = content_of(message.content)
    if message.role == "developer" and "developer" not in (template or ""):
        found["role"] = "system"
    if message.tool_calls:
        found["tool_calls"] = [_call(call) for call in message.tool_calls]
    return found


def content_of(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        kind = part.get("type")
        text = part.get("refusal" if kind == "refusal" else "text")
        if kind not in (*TEXTS, "refusal") or not isinstance(text, str):
            raise Refusal(400, f"content: a part of type {str(kind)[:64]!r}; the models served read text parts alone",
                          "messages")  # fmt: skip
        texts.append(text)
    return "\n".join(texts)


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refusal(400, "tool_calls: each wants a function with a name", "messages")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise Refusal(400, f"tool_calls: the arguments of {function['name'][:64]!r} are not JSON",
                          "messages") from None  # fmt: skip
    return {**call, "function": {**function, "arguments": arguments}}
