"""Plain completions against the model's own logits and against one another."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from tests.server.served import Running

PATH = "/v1/completions"
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def table(folder: Path) -> Iterator[Any]:
    """ids -> log-probabilities of what follows each, of the model run plainly."""
    net = fewbit.load(folder)

    def rows(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return net(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    yield rows


def answer(served: Running, **body: Any) -> dict[str, Any]:
    found = served.post(PATH, {**GREEDY, **body})
    assert found.status_code == 200, found.text
    return found.json()


def events(served: Running, path: str = PATH, **body: Any) -> list[dict[str, Any]]:
    with served.http.stream("POST", path, json={**body, "stream": True}) as found:
        assert found.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in found.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


PROMPTS: list[Any] = ["hello", ["hello"], ["hello", "bye"], [10, 11, 12], [[10, 11, 12], [13, 14]]]


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
def test_shapes_of_prompts(served: Running, prompt: Any) -> None:
    found = answer(served, prompt=prompt)
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    assert [c["index"] for c in found["choices"]] == list(range(len(prompt) if several else 1))
    assert all(c["finish_reason"] == "length" for c in found["choices"])
    assert found["usage"]["completion_tokens"] == 6 * len(found["choices"])
    assert found["object"] == "text_completion" and found["model"] == "tiny"


def test_texts_and_their_tokens_answer_alike(served: Running) -> None:
    ids = served.post("/tokenize", {"prompt": "hello"}).json()["tokens"]
    assert answer(served, prompt="hello")["choices"] == answer(served, prompt=ids)["choices"]


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_echo_with_logprobs_is_what_the_model_says(served: Running, table: Any, tokens: int) -> None:
    """What lm-eval asks for; 0 tokens scores the prompt alone."""
    prompts = [[10, 20, 30, 40, 50], [60, 70]]
    found = answer(served, prompt=prompts, echo=True, logprobs=2, max_tokens=tokens, return_token_ids=True)
    for ids, choice in zip(prompts, found["choices"], strict=True):
        made = choice["token_ids"] if tokens else []
        rows, said = table(ids + made), choice["logprobs"]
        assert len(said["tokens"]) == len(said["text_offset"]) == len(said["top_logprobs"]) == len(ids) + tokens
        assert said["token_logprobs"][0] is said["top_logprobs"][0] is None
        for i, token in enumerate((ids + made)[1:], 1):
            assert said["token_logprobs"][i] == pytest.approx(float(rows[i - 1, token]), abs=0.05)
            assert max(said["top_logprobs"][i].values()) == pytest.approx(float(rows[i - 1].max()), abs=0.05)
            greedy = said["token_logprobs"][i] == max(said["top_logprobs"][i].values())
            assert not (i >= len(ids)) or greedy  # at temperature 0 each token is the likeliest
        assert said["text_offset"] == sorted(said["text_offset"])


def test_echo_shows_the_prompt(served: Running) -> None:
    plain = answer(served, prompt="hello")["choices"][0]["text"]
    assert answer(served, prompt="hello", echo=True)["choices"][0]["text"] == "hello" + plain
    assert answer(served, prompt="hello", echo=True, max_tokens=0)["choices"][0]["text"] == "hello"


@pytest.mark.parametrize("more", [{}, {"n": 3, "temperature": 1, "seed": 5}, {"prompt": ["a", "b"], "echo": True},
                                  {"logprobs": 1, "echo": True}], ids=str)  # fmt: skip
def test_streams_say_what_whole_answers_say(served: Running, more: dict[str, Any]) -> None:
    body = {"prompt": "hello", **GREEDY, **more}
    whole = answer(served, **body)
    found = events(served, **body, stream_options={"include_usage": True})
    texts, finish, tokens = {}, {}, {}
    for choice in (c for event in found for c in event["choices"]):
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        finish[choice["index"]] = choice["finish_reason"]
        if choice["logprobs"]:
            tokens[choice["index"]] = tokens.get(choice["index"], []) + choice["logprobs"]["tokens"]
    for choice in whole["choices"]:
        assert (texts[choice["index"]], finish[choice["index"]]) == (choice["text"], choice["finish_reason"])
        if choice["logprobs"]:
            assert tokens[choice["index"]] == choice["logprobs"]["tokens"]
    assert found[-1]["choices"] == [] and all(event["usage"] is None for event in found[:-1])
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [found[-1]["usage"][name] for name in counts] == [whole["usage"][name] for name in counts]


def test_same_seed_same_text(served: Running) -> None:
    body = {"prompt": "hello", "temperature": 1.0, "seed": 7, "n": 2}
    first, again = (answer(served, **body)["choices"] for _ in range(2))
    assert first == again and first[0]["text"] != first[1]["text"]


@pytest.mark.parametrize(("more", "pattern"), [
    ({"guided_choice": ["yes", "no"]}, "yes|no"), ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
    ({"structured_outputs": {"regex": "a{2}"}}, "aa"), ({"guided_grammar": 'start: "x" "y"'}, "xy"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": [17]}}}}, "17"),
    ({"guided_json": {"const": "k"}}, '"k"'),
])  # fmt: skip
def test_structured(served: Running, more: dict[str, Any], pattern: str) -> None:

    assert re.fullmatch(
        pattern, answer(served, prompt="hello", temperature=1, max_tokens=20, **more)["choices"][0]["text"]
    )


def test_sampling_fields_of_vllm(served: Running) -> None:
    fields = {
        "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1, "stop_token_ids": [9], "priority": 1,
        "logit_bias": {"20": 100}, "skip_special_tokens": False, "length_penalty": 1.0, "user": "me",
    }  # fmt: skip
    assert answer(served, prompt="hello", **fields)["choices"][0]["text"]


def test_stop_reason(served: Running) -> None:
    found = answer(served, prompt="hello", logit_bias={"70": 100}, stop=["bbb"])["choices"][0]
    assert (found["finish_reason"], found["stop_reason"], found["text"]) == ("stop", "bbb", "")


def test_lengths(served: Running) -> None:
    """Too long is refused; what fits runs to the end of the context."""
    assert answer(served, prompt=[10] * 510, max_tokens=100)["usage"]["completion_tokens"] == 2
    assert served.post(PATH, {"prompt": [10] * 10, "max_tokens": 513}).status_code == 400


def test_priority_and_default_model(served: Running) -> None:
    assert answer(served, prompt="a", model="tiny")["model"] == "tiny"
    assert served.post(PATH, {"prompt": "a", "model": "gpt"}).json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(("body", "words"), [
    ({"prompt": "a", "max_token": 1}, "did you mean max_tokens"), ({}, "prompt: this field is needed"),
    ({"prompt": "a", "guided_regex": "a+", "guided_whitespace_pattern": " ?"}, "disable_any_whitespace"),
    ({"prompt": "a", "stream_options": {"x": 1}}, "stream_options.x: there is no such field"),
])  # fmt: skip
def test_mistakes_are_told_in_words(served: Running, body: dict[str, Any], words: str) -> None:
    found = served.post(PATH, body)
    assert found.status_code == 400 and words in found.json()["error"]["message"]
