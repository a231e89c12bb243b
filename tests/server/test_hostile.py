"""Requests that must cost nothing: each a 4xx in under a second, and the next good request succeeds."""

import json
import socket
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.served import Running
from tests.yardstick import within

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

FIELDS: list[dict[str, Any]] = [
    {"n": 10**6}, {"n": 0}, {"n": -1}, {"n": 1.5}, {"n": True}, {"best_of": 5},
    {"logprobs": 21}, {"logprobs": -1}, {"logprobs": 10**30}, {"prompt_logprobs": 10**6},
    {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 2**63}, {"max_tokens": 10**400}, {"min_tokens": 2**63},
    {"temperature": -1}, {"temperature": 1e400}, {"temperature": "hot"}, {"top_p": 0}, {"top_p": 2}, {"top_k": -2},
    {"min_p": 5}, {"seed": 2**70}, {"repetition_penalty": 0}, {"presence_penalty": 3}, {"frequency_penalty": -9},
    {"stop": ["x"] * 500_000}, {"stop": [1] * 500_000}, {"stop": ""}, {"stop": "x" * 10**6},
    {"stop_token_ids": [10**9]}, {"stop_token_ids": [-1]}, {"allowed_token_ids": []}, {"allowed_token_ids": [264]},
    {"logit_bias": {"999999": 1}}, {"logit_bias": {"x": 1}}, {"logit_bias": {"1": 1e9}},
    {"logit_bias": {str(i): 1 for i in range(100_000)}},
    {"guided_regex": "(" * 5000}, {"guided_regex": "("},
    {"guided_json": {"type": "nonsense"}}, {"guided_json": "{"}, {"guided_choice": []},
    {"guided_grammar": "start: start start"}, {"guided_regex": "a", "guided_choice": ["b"]},
    {"response_format": {"type": "json_schema"}}, {"response_format": {"type": "xml"}},
    {"structured_outputs": {"regex": "a", "choice": ["b"]}}, {"structured_outputs": {"nonsense": 1}},
    {"nonsense": 1}, {"suffix": "x"}, {"use_beam_search": True}, {"truncate_prompt_tokens": 5}, {"priority": 2**40},
    {"stream_options": 5}, {"stream": "yes"}, {"model": "other"}, {"model": "x" * 10**6},
    {"prompt": []}, {"prompt": [[]]}, {"prompt": ""}, {"prompt": [10**9]}, {"prompt": [-1]}, {"prompt": [2**70]},
    {"prompt": [1] * 512}, {"prompt": [1] * 500_000}, {"prompt": "x" * 10**6}, {"prompt": [[1]] * 100_000},
    {"prompt": None}, {"prompt": [1, "a"]}, {"prompt": {"a": 1}},
]  # fmt: skip

CHATS: list[dict[str, Any]] = [
    {"messages": []}, {"messages": None}, {"messages": [{}]}, {"messages": [{"role": 5}]}, {"messages": HI * 5000},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
    {"messages": [{"role": "user", "content": "x" * 10**6}]}, {"messages": [{"role": "user", "content": {}}]},
    {"top_logprobs": 5}, {"logprobs": True, "top_logprobs": 10**6}, {"logprobs": 5},
    {"tool_choice": "required"}, {"tools": [FUNCTION], "tool_choice": "sometimes"}, {"tools": [{}]},
    {"tools": [FUNCTION] * 10_000},
    {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [FUNCTION]},
    {"functions": []}, {"audio": {}}, {"modalities": ["audio"]}, {"chat_template": "{{ 1 }}"},
    {"chat_template_kwargs": {"messages": []}}, {"max_tokens": 5, "max_completion_tokens": 5},
    {"continue_final_message": True, "add_generation_prompt": True},
]  # fmt: skip


EXPLOSIVE: list[dict[str, Any]] = [
    {"guided_regex": "((a{1,100}){1,100}){1,100}" * 20},
    {"guided_regex": "(a|aa|aaa)*" * 200 + "b{1,5000}"},
    {"guided_json": {"type": "object", "properties": {
        f"k{i}": {"anyOf": [{"type": "string", "pattern": "(a|b){1,1000}"}] * 50} for i in range(50)}}},
    {"guided_json": {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 9}}, "$ref": "#/$defs/a"}},
]  # fmt: skip


def clock() -> float:
    """Seconds that this process, server and client in one, was at work, whatever else the machine does."""
    return time.process_time()


def shown(value: Any) -> str:
    return json.dumps(value)[:40]


def refused(served: Running, path: str, content: bytes, **headers: str) -> None:
    start = clock()
    found = served.http.post(path, content=content, headers={"content-type": "application/json", **headers})
    seconds = clock() - start
    assert 400 <= found.status_code < 500, found.text[:500]
    assert within(seconds, 1), f"took {seconds:.2f} s"
    error = found.json()["error"]
    assert error["message"] and error["type"] and len(found.content) < 10_000
    assert served.good()


@pytest.mark.parametrize("fields", FIELDS, ids=shown)
def test_completions(served: Running, fields: dict[str, Any]) -> None:
    refused(served, TEXT, json.dumps({"prompt": "hi", "max_tokens": 4, **fields}).encode())


@pytest.mark.parametrize("fields", CHATS, ids=shown)
def test_chats(served: Running, fields: dict[str, Any]) -> None:
    refused(served, CHAT, json.dumps({"messages": HI, "max_tokens": 4, **fields}).encode())


@pytest.mark.parametrize("fields", EXPLOSIVE, ids=shown)
def test_explosive(served: Running, fields: dict[str, Any]) -> None:
    """Refused, or served as cheaply as any other."""
    start = clock()
    found = served.post(TEXT, {"prompt": "hi", "max_tokens": 4, **fields})
    assert found.status_code in (200, 400) and within(clock() - start, 1)
    assert served.good()


BODIES: list[bytes] = [
    b"", b"{", b"null", b"[]", b'"x"', b"5", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100 + b"]" * 100,
    b'{"prompt": "hi", "temperature": NaN}', b'{"prompt": "hi", "temperature": Infinity}',
    b'{"prompt": "hi", "temperature": -Infinity}', b'{"prompt": "hi", "max_tokens": ' + b"9" * 10_000 + b"}",
    b'{"prompt": "\\ud800"}', b'{"prompt": "hi", "metadata": ' + b'{"a":' * 70 + b"1" + b"}" * 71,
    b'{' + b",".join(b'"k%d":1' % i for i in range(200_000)) + b"}", b'{"prompt": "' + b"x" * (5 << 20) + b'"}',
]  # fmt: skip


@pytest.mark.parametrize("content", BODIES, ids=lambda b: repr(b[:30]))
def test_bodies(served: Running, content: bytes) -> None:
    refused(served, TEXT, content)


def test_media_type(served: Running) -> None:
    """A form of another site's page can send text/plain without asking: it is not taken."""
    found = served.http.post(TEXT, content=b'{"prompt": "hi"}', headers={"content-type": "text/plain"})
    assert found.status_code == 415


def exchange(served: Running, *pieces: bytes) -> bytes:
    """What comes back for raw bytes."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 5) as made:
        try:
            for piece in pieces:
                made.sendall(piece)
            return made.recv(65536)
        except (ConnectionResetError, BrokenPipeError):
            return b"HTTP/1.1 400 (cut off)"


HEADS = {
    "giant header": b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"y" * (1 << 20) + b"\r\n\r\n",
    "many headers": b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 50_000 + b"\r\n",
    "giant path": b"GET /" + b"x" * (1 << 20) + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    "no protocol": b"hello\r\n\r\n",
    "two lengths": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
    "negative": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(served: Running, name: str) -> None:
    start = clock()
    assert exchange(served, HEADS[name])[9:10] == b"4"
    assert within(clock() - start, 1)
    assert served.good()


def chunked(data: bytes, size: int) -> bytes:
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def test_one_byte_chunks(served: Running) -> None:
    head = (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n")  # fmt: skip
    good = b'{"prompt": "ab", "max_tokens": 2}'
    start = clock()
    assert exchange(served, head, *(b"1\r\n%c\r\n" % byte for byte in good), b"0\r\n\r\n").startswith(b"HTTP/1.1 200")
    assert exchange(served, head + chunked(b'{"prompt": "ab", "max_tokens": 0}', 1)).startswith(b"HTTP/1.1 400")
    assert within(clock() - start, 1)
    assert exchange(served, head + chunked(b"x" * (5 << 20), 1 << 16)).startswith(b"HTTP/1.1 4")
    assert served.good()


def test_a_body_that_never_comes(served: Running) -> None:
    config = served.state.config
    object.__setattr__(config, "body_seconds", 0.3)
    try:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n"
        )
        assert exchange(served, head + b"{").startswith(b"HTTP/1.1 408")
    finally:
        object.__setattr__(config, "body_seconds", 30.0)
    assert served.good()


NAMES = st.sampled_from(["prompt", "messages", "max_tokens", "n", "stop", "stream", "logprobs", "echo", "temperature",
                         "tools", "tool_choice", "response_format", "logit_bias", "guided_json", "input", "tokens",
                         "stream_options", "role", "content", "type", "text", "name"])  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["auto", "user"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(max_size=4), inner, max_size=6),
    max_leaves=12,
)
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize")


@given(path=st.sampled_from(PATHS), body=JSON, prompt=st.sampled_from(["", "hi", None]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_leaves_it_able_to_answer(served: Running, path: str, body: Any, prompt: str | None) -> None:
    if isinstance(body, dict) and prompt is not None:
        body = {"prompt": prompt, "messages": HI, "max_tokens": 2, **body}
        body.pop("messages" if "completions" in path and "chat" not in path else "prompt")
    found = served.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert found.status_code < 500, found.text
    assert served.good()


def test_schemathesis(served: Running) -> None:
    """Bodies made from our own description: none of them is a server error."""
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_dict(served.http.get("/openapi.json").json())
    for operation in schema.get_all_operations():
        run = operation.ok()
        if run.method.upper() != "POST":
            continue
        described(served, run)
    assert served.good()


def described(served: Running, operation: Any) -> None:
    @given(case=operation.as_strategy())
    @settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def one(case: Any) -> None:
        body = case.body if isinstance(case.body, dict | list | str | int | float | None) else None
        if isinstance(body, dict) and "max_tokens" in body:
            body["max_tokens"] = 2
        content = json.dumps(body, default=str)
        found = served.http.post(operation.path, content=content, headers={"content-type": "application/json"})
        assert found.status_code < 500, found.text

    one()
