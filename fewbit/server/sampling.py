"""From a request's fields to SamplingParams."""

import re
from collections.abc import Mapping
from typing import Any

from fewbit.engine.params import SamplingParams
from fewbit.errors import RequestError
from fewbit.server.failures import Refusal
from fewbit.server.protocol import Sampling

SAME = (  # fields that SamplingParams has under the same name, or refuses itself
    "n", "best_of", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "seed", "stop", "stop_token_ids", "include_stop_str_in_output",
    "ignore_eos", "prompt_logprobs", "skip_special_tokens", "spaces_between_special_tokens", "logit_bias",
    "allowed_token_ids", "bad_words", "logits_processors", "truncate_prompt_tokens", "use_beam_search",
    "length_penalty", "early_stopping",
)  # fmt: skip
GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
NAMED = re.compile(r"[a-z_]+(?:\[\d+\])?(?= |:|=|$)")


def params_of(body: Sampling, defaults: Mapping[str, Any], max_len: int, **extra: Any) -> SamplingParams:
    """extra: fields that chat and completions name differently; they win."""
    given = dict(defaults)
    for name in SAME:
        value = getattr(body, name)
        if value is not None:
            given[name] = value
    given |= {name: value for name, value in extra.items() if value is not None}
    if given.get("length_penalty") == 1:  # what clients send for none
        del given["length_penalty"]
    if (most := given.get("max_tokens")) is not None and most > max_len:
        raise Refusal(400, f"max_tokens is {min(most, 1 << 63)}: the context holds {max_len} tokens", "max_tokens")
    structured = extra.get("structured_outputs") or structured_of(body)
    if structured:
        given["structured_outputs"] = structured
    return made(given)


def made(given: Mapping[str, Any]) -> SamplingParams:
    """The error of a field, with the field beside it."""
    try:
        return SamplingParams(**given)
    except RequestError as error:
        found = NAMED.match(str(error))
        raise Refusal(400, str(error), found.group() if found and found.group() in given else None) from error


def structured_of(body: Sampling) -> dict[str, Any] | None:
    """What a response must look like, by whichever field says it."""
    if body.guided_whitespace_pattern is not None:
        raise Refusal(400, "guided_whitespace_pattern is not supported: structured_outputs has disable_any_whitespace",
                      "guided_whitespace_pattern")  # fmt: skip
    found = {GUIDED[name]: value for name in GUIDED if (value := getattr(body, name)) is not None}
    said = [found] if found else []
    if body.structured_outputs:
        said.append(body.structured_outputs)
    if body.response_format and (shape := format_of(body.response_format)):
        said.append(shape)
    if len(said) > 1:
        raise Refusal(400, "structured_outputs, response_format and guided_... say it twice: give one of them")
    return said[0] if said else None


def format_of(shape: Mapping[str, Any], param: str = "response_format") -> dict[str, Any] | None:
    """OpenAI's response_format; the Responses API writes a json_schema without the inner object."""
    kind = shape.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        inner = shape.get("json_schema", shape)
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if not isinstance(schema, dict):
            raise Refusal(400, f"{param}: json_schema wants a schema, an object", param)
        return {"json": schema}
    raise Refusal(400, f"{param}: type {str(kind)[:64]!r}; text, json_object and json_schema are known", param)
