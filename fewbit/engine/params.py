"""How to sample: SamplingParams with vLLM's keyword names, every value checked when it is made.

A value that constructs is one the engine can afford: each field is bounded by what it costs. What depends on the model
(ids in the vocabulary, room in the context) is settled by `checked`, once, into a second value.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fewbit.engine import guided_source
from fewbit.engine import params_fields as check
from fewbit.engine.guided_source import StructuredOutputs
from fewbit.engine.params_names import named
from fewbit.errors import RequestError

GREEDY = 1e-5  # a temperature below this takes the likeliest token
MOST_TOKENS = (1 << 31) - 1
MOST_N = 128
MOST_LOGPROBS = 20

_REFUSED = {
    "bad_words": "banning words needs a look-ahead over tokens; use logit_bias for single tokens",
    "logits_processors": "code in a request is not run; use logit_bias, allowed_token_ids or structured_outputs",
    "truncate_prompt_tokens": "a prompt is never cut silently; cut it before it is sent",
    "use_beam_search": "there is no beam search; use n with a temperature",
    "length_penalty": "there is no beam search",
    "early_stopping": "there is no beam search",
    "extra_args": "there are no plug-ins that would read them",
    "prompt_adapter_request": "prompt adapters are not served",
    "thinking_token_budget": "thinking is not told from other text; use max_tokens",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | tuple[str, ...] | None = None
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | tuple[int, ...] | None = None
    structured_outputs: StructuredOutputs | None = None
    output_kind: Any = None

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            object.__setattr__(self, name, rule(getattr(self, name)))
        _together(self)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY

    def checked(self, vocab: int, max_len: int, prompt: int) -> "SamplingParams":
        """The same for a model of `vocab` logits and a context of `max_len`, after `prompt` tokens."""
        if prompt < 1:
            raise RequestError("the prompt is empty; it needs at least one token")
        if prompt >= max_len:
            raise RequestError(f"the prompt has {prompt} tokens; the context of {max_len} holds {max_len - 1} and one")
        _known(self, vocab)
        room = max_len - prompt
        most = min(self.max_tokens or room, room)
        return replace(self, max_tokens=most, min_tokens=min(self.min_tokens, most))


def _known(params: SamplingParams, vocab: int) -> None:
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
        worst = max(getattr(params, name) or (0,))
        if worst >= vocab:
            raise RequestError(f"{name} names token {worst}; the vocabulary has {vocab} tokens, 0 to {vocab - 1}")


def _together(params: SamplingParams) -> None:
    if params.best_of is not None and params.best_of != params.n:
        raise RequestError(f"best_of is {check.shown(params.best_of)} and n is {params.n}: answers are not ranked, so "
                           "all n are returned; leave best_of out")  # fmt: skip
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise RequestError(f"min_tokens is {params.min_tokens}, more than max_tokens, {params.max_tokens}")
    if params.stop and not params.detokenize:
        raise RequestError("stop strings are found in text: they need detokenize=True; stop_token_ids do not")


def _optional(rule: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else rule(value)


def _integer(name: str, low: int, high: int) -> Callable[[Any], int]:
    return lambda value: check.integer(name, value, low, high)


def _real(name: str, low: float, high: float) -> Callable[[Any], float]:
    return lambda value: check.real(name, value, low, high)


def _flag(name: str) -> Callable[[Any], bool]:
    return lambda value: check.flag(name, value)


def _temperature(value: Any) -> float:
    return check.real("temperature", value, 0, 1e6)


def _top_p(value: Any) -> float:
    found = check.real("top_p", value, 0, 1)
    if not found:
        raise RequestError("top_p is 0, which leaves no token; it takes a number above 0 and up to 1")
    return found


def _top_k(value: Any) -> int:
    return max(0, check.integer("top_k", value, -1, check.INT64 - 1))


def _seed(value: Any) -> int | None:
    found = check.integer("seed", value, -check.INT64, 2 * check.INT64 - 1)
    return None if found == -1 else found


def _allowed(value: Any) -> tuple[int, ...]:
    found = check.token_ids("allowed_token_ids", value, check.ALLOWED_IDS)
    if not found:
        raise RequestError("allowed_token_ids is empty, which leaves no token; leave it out to allow all")
    return found


def _output_kind(value: Any) -> None:
    kind = getattr(value, "value", value)  # of an enumeration
    if kind is not None and not (isinstance(kind, int) and kind == 0):
        raise RequestError(f"output_kind is {check.shown(value)}; only the default is supported")


_RULES: dict[str, Callable[[Any], Any]] = {
    "n": _integer("n", 1, MOST_N),
    "best_of": _optional(_integer("best_of", 1, MOST_N)),
    "presence_penalty": _real("presence_penalty", -2, 2),
    "frequency_penalty": _real("frequency_penalty", -2, 2),
    "repetition_penalty": _real("repetition_penalty", 0.01, 100),
    "temperature": _temperature,
    "top_p": _top_p,
    "top_k": _top_k,
    "min_p": _real("min_p", 0, 1),
    "seed": _optional(_seed),
    "stop": check.stops,
    "stop_token_ids": lambda value: () if value is None else check.token_ids("stop_token_ids", value),
    "include_stop_str_in_output": _flag("include_stop_str_in_output"),
    "ignore_eos": _flag("ignore_eos"),
    "max_tokens": _optional(_integer("max_tokens", 1, MOST_TOKENS)),
    "min_tokens": _integer("min_tokens", 0, MOST_TOKENS),
    "logprobs": _optional(_integer("logprobs", 0, MOST_LOGPROBS)),
    "prompt_logprobs": _optional(_integer("prompt_logprobs", 0, MOST_LOGPROBS)),
    "detokenize": _flag("detokenize"),
    "skip_special_tokens": _flag("skip_special_tokens"),
    "spaces_between_special_tokens": _flag("spaces_between_special_tokens"),
    "logit_bias": _optional(check.biases),
    "allowed_token_ids": _optional(_allowed),
    "structured_outputs": _optional(guided_source.given),
    "output_kind": _output_kind,
}


named(SamplingParams, {"guided_decoding": "structured_outputs"}, _REFUSED)
