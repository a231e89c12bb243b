"""Chat: the model's own template, streams, tools, other clients."""

import json
from pathlib import Path
from typing import Any

import pytest

from fewbit.models.text import tokenizer
from fewbit.server.text import Text
from tests.server.served import TEMPLATE, Running, engine, model, running
from tests.server.test_completions import events

PATH = "/v1/chat/completions"
HI = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
FLAT = {"type": "object", "properties": {"city": {"enum": ["Ulm", "Bonn"]}}, "required": ["city"],
        "additionalProperties": False}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": FLAT}}


def answer(served: Running, **body: Any) -> dict[str, Any]:
    found = served.post(PATH, {"messages": HI, "temperature": 0, "max_tokens": 6, "ignore_eos": True, **body})
    assert found.status_code == 200, found.text
    return found.json()


def test_prompt_is_what_transformers_makes(served: Running, folder: Path) -> None:
    oracle = tokenizer(folder)
    for more in ({}, {"add_generation_prompt": False}, {"tools": [TOOL]}):
        kept = {"add_generation_prompt": True, **more}
        ids = served.post("/tokenize", {"messages": HI, **more}).json()["tokens"]
        text = oracle.apply_chat_template(HI, tokenize=False, **kept)
        assert ids == oracle.encode(text, add_special_tokens=False)


def test_chat_is_the_completion_of_its_prompt(served: Running) -> None:
    ids = served.post("/tokenize", {"messages": HI}).json()["tokens"]
    body = {"prompt": ids, "temperature": 0, "max_tokens": 6, "ignore_eos": True}
    plain = served.post("/v1/completions", body).json()["choices"][0]["text"]
    assert answer(served)["choices"][0]["message"]["content"] == plain


def test_streams_say_what_whole_answers_say(served: Running) -> None:
    body = {"messages": HI, "temperature": 1, "seed": 3, "max_tokens": 12, "n": 2, "logprobs": True, "top_logprobs": 1,
            "ignore_eos": True}  # fmt: skip
    whole = answer(served, **body)
    found = events(served, PATH, **body, stream_options={"include_usage": True})
    assert [c["delta"] for c in found[0]["choices"] + found[1]["choices"]] == [{"role": "assistant", "content": ""}] * 2
    for choice in whole["choices"]:
        mine = [c for event in found for c in event["choices"] if c["index"] == choice["index"]]
        assert "".join(c["delta"].get("content") or "" for c in mine) == choice["message"]["content"]
        rows = [row for c in mine for row in (c["logprobs"] or {}).get("content", [])]
        assert rows == choice["logprobs"]["content"] and len(rows) == 12
        assert mine[-1]["finish_reason"] == choice["finish_reason"] == "length"
    assert found[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 24


def test_parts_of_text_and_continued_messages(served: Running) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert served.post("/tokenize", {"messages": parts}).json() == served.post(
        "/tokenize", {"messages": [{"role": "user", "content": "a\nb"}]}).json()  # fmt: skip
    begun = [*HI, {"role": "assistant", "content": "I am "}]
    found = served.post("/tokenize", {"messages": begun, "continue_final_message": True}).json()["tokens"]
    said = served.post("/detokenize", {"tokens": found}).json()["prompt"]
    assert said.endswith("assistant\nI am ")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_forced_tools(served: Running, choice: Any, stream: bool) -> None:
    body = {"messages": HI, "tools": [TOOL], "tool_choice": choice, "max_tokens": 200, "temperature": 0}
    if stream:
        found = [c["choices"][0] for c in events(served, PATH, **body)]
        parts = [call for c in found for call in c["delta"].get("tool_calls", ())]
        name, finish = parts[0]["function"]["name"], found[-1]["finish_reason"]
        arguments = "".join(part["function"]["arguments"] for part in parts)
    else:
        one = answer(served, **body, ignore_eos=False)["choices"][0]
        finish, function = one["finish_reason"], one["message"]["tool_calls"][0]["function"]
        name, arguments = function["name"], function["arguments"]
    assert (name, finish) == ("weather", "tool_calls")
    assert json.loads(arguments)["city"] in ("Ulm", "Bonn")


def test_tool_conversation_is_rendered(served: Running) -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}]
    talk = [*HI, {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "1", "content": "sun"}]  # fmt: skip
    assert answer(served, messages=talk, tools=[TOOL])["choices"][0]["message"]["role"] == "assistant"
    calls[0]["function"]["arguments"] = "{"
    assert served.post(PATH, {"messages": talk}).status_code == 400


def test_responses(served: Running) -> None:
    body = {"input": "hi", "instructions": "be kind", "max_output_tokens": 6, "temperature": 0, "ignore_eos": True}
    whole = served.post("/v1/responses", body).json()
    assert whole["output"][0]["content"][0]["text"] == answer(served)["choices"][0]["message"]["content"]
    assert whole["status"] == "incomplete" and whole["usage"]["output_tokens"] == 6
    with served.http.stream("POST", "/v1/responses", json={**body, "stream": True}) as found:
        said = [json.loads(line[6:]) for line in found.iter_lines() if line.startswith("data: ")]
    assert [one["sequence_number"] for one in said] == list(range(len(said)))
    deltas = "".join(one["delta"] for one in said if one["type"] == "response.output_text.delta")
    assert deltas == said[-1]["response"]["output"][0]["content"][0]["text"] == whole["output"][0]["content"][0]["text"]
    for refused in ({"previous_response_id": "x"}, {"tools": [TOOL]}, {"background": True}, {"input": [{"type": "x"}]}):
        assert served.post("/v1/responses", {"input": "hi", **refused}).status_code == 400


def test_openai_client(served: Running) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none") as client:
        ask = {"model": "tiny", "messages": HI, "max_tokens": 6, "temperature": 0}
        chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True},
                                                     extra_body={"top_k": 3}))  # fmt: skip
        assert chunks[-1].usage.completion_tokens >= 1 and chunks[0].choices[0].delta.role == "assistant"
        found = client.completions.create(model="tiny", prompt="a", max_tokens=2, logprobs=1, echo=True)
        assert len(found.choices[0].logprobs.tokens) == found.usage.total_tokens
        assert client.models.list().data[0].id == "tiny"
        assert client.responses.create(model="tiny", input="hi", max_output_tokens=4).output_text is not None
        with client.responses.stream(model="tiny", input="hi", max_output_tokens=20) as events_:
            assert [event.type for event in events_][-1] in ("response.completed", "response.incomplete")
        called = client.chat.completions.create(model="tiny", messages=HI, tools=[TOOL], tool_choice="required")
        assert json.loads(called.choices[0].message.tool_calls[0].function.arguments)
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(model="tiny", messages=HI, temperature=-1)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="gpt", messages=HI)
        with pytest.raises(openai.APIStatusError, match="embeddings"):
            client.embeddings.create(model="tiny", input="a")


# ---- templates that misbehave

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "endless": ENDLESS,
    "long": "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "memory": "{% set s = 'x' * 10 ** 10 %}{{ s }}",
    "number": "{% set n = 9 %}{{ n ** (n ** n) }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "mutation": "{{ messages.clear() }}",
    "refusal": "{{ raise_exception('no system messages') }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_templates_are_bounded(folder: Path, name: str) -> None:
    import asyncio

    from fewbit.errors import RequestError

    text = Text(tokenizer(folder), HOSTILE[name], 512, seconds=0.3)

    async def tried() -> None:
        for _ in range(2):  # and the next one finds a renderer again
            with pytest.raises(RequestError, match="chat template"):
                await text.render({"messages": list(HI)})

    asyncio.run(tried())
    text.close()


def test_a_template_that_never_ends_holds_up_no_one(folder: Path) -> None:
    with running(engine(folder), chat_template=ENDLESS, template_seconds=0.5) as served:
        found = served.post(PATH, {"messages": HI})
        assert found.status_code == 400 and "more than 0.5 s" in found.text
        assert served.good()


def test_a_model_without_a_template(tmp_path: Path) -> None:
    with running(engine(model(tmp_path / "m", template=None))) as served:
        found = served.post(PATH, {"messages": HI})
        assert found.status_code == 400 and "--chat-template" in found.text
    with running(engine(tmp_path / "m"), chat_template=TEMPLATE) as served:
        assert served.post(PATH, {"messages": HI, "max_tokens": 1}).status_code == 200
