"""Chat's answer as events."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fewbit.engine.loop import Feed
from fewbit.engine.request import Delta
from fewbit.server.answer import Answer, Choice
from fewbit.server.logprobs import objects
from fewbit.server.protocol import ChatBody
from fewbit.server.state import State
from fewbit.server.stream import DONE
from fewbit.server.tool_stream import Calls, Part
from fewbit.server.tools import Choosing


def said(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class ChatEvents:
    """The pieces of one request's stream; everything but the delta is written once."""

    def __init__(self, state: State, body: ChatBody, tools: Choosing, answer: Answer):
        self.state, self.body, self.answer = state, body, answer
        options = body.stream_options
        self.usage = bool(options and options.include_usage)
        self.counted = bool(options and options.continuous_usage_stats)
        self.calls = [Calls(tools.form) for _ in answer.choices] if tools.form != "none" else None
        head = {"id": answer.requests[0].id, "object": "chat.completion.chunk", "created": int(time.time()),
                "model": state.known(body.model)}  # fmt: skip
        self.head = f"data: {said(head)[:-1]},"
        self.tail = ',"usage":null}\n\n' if self.usage else "}\n\n"

    async def pieces(self, feed: Feed) -> AsyncIterator[bytes]:
        first = {"role": self.state.config.response_role, "content": ""}
        yield self._bytes([self._line(i, said(first)) for i in range(len(self.answer.choices))])
        async for pairs in self.answer.deltas(feed):
            lines = [line for choice, delta in pairs for line in self.lines(choice, delta)]
            if lines:
                yield self._bytes(lines)
        if self.usage:
            yield f'{self.head}"choices":[],"usage":{said(self.answer.usage())}}}\n\n'.encode()
        yield DONE

    @staticmethod
    def _bytes(lines: list[str]) -> bytes:
        return "".join(lines).encode("utf-8", "replace")

    def lines(self, choice: Choice, delta: Delta) -> list[str]:
        if self.calls is None:
            return self.plain(choice, delta)
        calls = self.calls[choice.index]
        lines = [self._line(choice.index, said(part_of(part))) for part in calls.push(delta.text, bool(delta.finish))]
        if delta.finish:
            finish = "tool_calls" if calls.count and delta.finish == "stop" else delta.finish
            lines.append(self._line(choice.index, "{}", finish, delta.stop_reason))
        return lines

    def plain(self, choice: Choice, delta: Delta) -> list[str]:
        probabilities = self.probabilities(delta)
        if not (delta.text or delta.finish or probabilities or self.body.return_token_ids):
            return []
        content = f'{{"content":{said(delta.text)}}}' if delta.text or probabilities else "{}"
        ids = f',"token_ids":{said(delta.tokens)}' if self.body.return_token_ids else ""
        return [self._line(choice.index, content, delta.finish, delta.stop_reason, probabilities, ids)]

    def probabilities(self, delta: Delta) -> str:
        if not self.body.logprobs or not delta.logprobs:
            return ""
        rows = objects(delta.tokens, delta.logprobs, self.body.top_logprobs or 0, self.state.text.token,
                       bool(self.body.return_tokens_as_token_ids))  # fmt: skip
        return said({"content": rows, "refusal": None})

    def _line(self, index: int, delta: str, finish: str | None = None, reason: int | str | None = None,
              probabilities: str = "", more: str = "") -> str:  # fmt: skip
        end = f',"stop_reason":{said(reason)}' if finish else ""
        tail = f',"usage":{said(self.answer.usage())}}}\n\n' if self.counted else self.tail
        return (f'{self.head}"choices":[{{"index":{index},"delta":{delta},"logprobs":{probabilities or "null"}'
                f',"finish_reason":{said(finish)}{end}{more}}}]{tail}')  # fmt: skip


def part_of(part: Part) -> dict[str, Any]:
    kind, *rest = part
    if kind == "text":
        return {"content": rest[0]}
    number, value = rest
    if kind == "call":
        function = {"name": value, "arguments": ""}
        return {"tool_calls": [{"index": number, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
                                "function": function}]}  # fmt: skip
    return {"tool_calls": [{"index": number, "function": {"arguments": value}}]}
