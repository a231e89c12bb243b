import dataclasses
import enum
import inspect
import math
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewbit.engine.params import SamplingParams
from fewbit.engine.params_fields import ALLOWED_IDS
from fewbit.errors import RequestError
from tests.yardstick import within

NAMES = [field.name for field in dataclasses.fields(SamplingParams)]


class Kind(enum.Enum):
    CUMULATIVE = 0
    DELTA = 1


def test_defaults() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.max_tokens) == (1, 1.0, 1.0, 0, 16)
    assert (params.stop, params.stop_token_ids, params.logprobs, params.seed) == ((), (), None, None)
    assert not params.greedy and SamplingParams(temperature=0).greedy


@pytest.mark.parametrize(("given", "name", "value"), [
    ({"stop": "x"}, "stop", ("x",)),
    ({"stop": ["x", "y"]}, "stop", ("x", "y")),
    ({"stop": []}, "stop", ()),
    ({"stop_token_ids": [1, 2]}, "stop_token_ids", (1, 2)),
    ({"top_k": -1}, "top_k", 0),
    ({"seed": -1}, "seed", None),
    ({"seed": 2**64 - 1}, "seed", 2**64 - 1),
    ({"temperature": 1}, "temperature", 1.0),
    ({"max_tokens": None}, "max_tokens", None),
    ({"logit_bias": {"5": 1, 6: -100}}, "logit_bias", {5: 1.0, 6: -100.0}),
    ({"best_of": 2, "n": 2}, "best_of", 2),
    ({"output_kind": Kind.CUMULATIVE}, "output_kind", Kind.CUMULATIVE),
    ({"bad_words": []}, "n", 1),
    ({"truncate_prompt_tokens": None}, "n", 1),
])  # fmt: skip
def test_taken(given: dict[str, Any], name: str, value: Any) -> None:
    found = getattr(SamplingParams(**given), name)
    assert found == value or name == "output_kind"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n is 0"), ({"n": 10**6}, "1000000"), ({"n": True}, "True"), ({"n": 1.0}, "1.0"), ({"n": "1"}, "'1'"),
    ({"best_of": 3}, "best_of"), ({"best_of": 10**6, "n": 1}, "best_of"),
    ({"temperature": math.nan}, "nan"), ({"temperature": math.inf}, "inf"), ({"temperature": -0.1}, "-0.1"),
    ({"temperature": 10**400}, "bits"), ({"temperature": None}, "None"), ({"temperature": True}, "True"),
    ({"temperature": 1j}, "1j"), ({"temperature": "1"}, "'1'"),
    ({"top_p": 0}, "no token"), ({"top_p": 1.1}, "1.1"), ({"top_k": -2}, "-2"), ({"top_k": 0.5}, "0.5"),
    ({"min_p": -1}, "-1"), ({"min_p": 1.5}, "1.5"),
    ({"presence_penalty": 2.1}, "2.1"), ({"frequency_penalty": -3}, "-3"), ({"repetition_penalty": 0}, "0"),
    ({"repetition_penalty": math.nan}, "nan"),
    ({"seed": 2**64}, "seed"), ({"seed": 1.5}, "seed"), ({"seed": 10**5000}, "bits"),
    ({"max_tokens": 0}, "max_tokens is 0"), ({"max_tokens": -1}, "-1"), ({"max_tokens": 2**63}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"), ({"min_tokens": 17}, "more than max_tokens"),
    ({"logprobs": 21}, "21"), ({"logprobs": -1}, "-1"), ({"logprobs": True}, "True"), ({"prompt_logprobs": -1}, "-1"),
    ({"stop": [""]}, "stop"), ({"stop": ["a"] * 500_000}, "500000"), ({"stop": "a" * 5000}, "4096"),
    ({"stop": 5}, "stop"), ({"stop": [5]}, "stop"), ({"stop": {"a"}}, "stop"), ({"stop": b"x"}, "stop"),
    ({"stop": "x", "detokenize": False}, "detokenize"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"), ({"stop_token_ids": [True]}, "stop_token_ids"),
    ({"stop_token_ids": [0] * 5000}, "5000"), ({"stop_token_ids": [2**63]}, "stop_token_ids"),
    ({"logit_bias": {1: 101}}, "101"), ({"logit_bias": {"x": 1}}, "'x'"), ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": dict.fromkeys(range(5000), 0)}, "5000"), ({"logit_bias": {1: math.nan}}, "nan"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"), ({"logit_bias": {"²": 1}}, "logit_bias"),
    ({"allowed_token_ids": []}, "empty"), ({"allowed_token_ids": [0] * (ALLOWED_IDS + 1)}, "allowed_token_ids"),
    ({"ignore_eos": 1}, "ignore_eos"), ({"skip_special_tokens": None}, "skip_special_tokens"),
    ({"bad_words": ["x"]}, "logit_bias"), ({"logits_processors": [print]}, "not supported"),
    ({"output_kind": Kind.DELTA}, "output_kind"),
    ({"temprature": 1}, "did you mean temperature"), ({"self": 1}, "no 'self'"), ({"": 1}, "no ''"),
    ({"x" * 10**6: 1}, "SamplingParams has no"),
    ({"structured_outputs": {}}, "exactly one"), ({"structured_outputs": "json"}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a"}, "guided_decoding": {"regex": "b"}}, "another name"),
    ({"structured_outputs": {"rgex": "a"}}, "did you mean regex"), ({"structured_outputs": {1: "a"}}, "takes one of"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "says"), WRONG, ids=[f"{i} {min(one)[:20]}" for i, (one, _) in enumerate(WRONG)])
def test_refused(given: dict[str, Any], says: str) -> None:
    start = time.process_time()
    with pytest.raises(RequestError) as error:
        SamplingParams(**given)
    assert within(time.process_time() - start, 0.2)
    assert says in str(error.value) and len(str(error.value)) < 1000


class Rude:
    """Raises whatever it is asked."""

    def __repr__(self) -> str:
        raise KeyError("repr")

    def __eq__(self, other: object) -> bool:
        raise KeyError("eq")

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        raise KeyError("len")

    def __bool__(self) -> bool:
        raise KeyError("bool")


SIMPLE = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(), max_size=20), st.binary(max_size=5),
    st.complex_numbers(), st.sampled_from([2**31, 2**63, 2**64, 10**400, 1e308, "1", "\ud800", Kind.DELTA]),
    st.builds(lambda: -(10**5000)),
    st.builds(Rude), st.decimals(), st.fractions(),
)  # fmt: skip
ANY = st.recursive(SIMPLE, lambda inner: st.one_of(
    st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.text(max_size=5), st.integers()), inner, max_size=4),
    st.tuples(inner)), max_leaves=6)  # fmt: skip
KINDS = st.sampled_from(["json", "regex", "choice", "grammar", "json_object", "disable_any_whitespace", "x"])
KEYS = st.one_of(st.sampled_from([*NAMES, "guided_decoding", "bad_words"]), st.text(max_size=6))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KEYS, st.one_of(ANY, st.dictionaries(KINDS, ANY, max_size=2)), max_size=4))
def test_any_keywords_construct_or_are_refused(keywords: dict[str, Any]) -> None:
    start = time.process_time()
    try:
        params = SamplingParams(**keywords)
    except RequestError as error:
        assert len(str(error)) < 1000
    else:
        params.checked(10**20, 100, 5)
    assert within(time.process_time() - start, 0.25)


def test_signature_and_value() -> None:
    assert list(inspect.signature(SamplingParams).parameters) == NAMES
    params = SamplingParams(temperature=0.5, stop="x")
    assert dataclasses.replace(params, n=3) == SamplingParams(temperature=0.5, stop="x", n=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]
    assert SamplingParams(guided_decoding={"regex": "a"}) == SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[call-arg, arg-type]


def test_checked_settles_the_lengths() -> None:
    assert SamplingParams(max_tokens=None).checked(100, 50, 20).max_tokens == 30
    assert SamplingParams(max_tokens=1000).checked(100, 50, 20).max_tokens == 30
    assert SamplingParams(max_tokens=7).checked(100, 50, 20).max_tokens == 7
    assert SamplingParams(max_tokens=1000, min_tokens=40).checked(100, 50, 20).min_tokens == 30
    assert SamplingParams(max_tokens=1).checked(100, 50, 49).max_tokens == 1


@pytest.mark.parametrize(("given", "prompt", "says"), [
    ({}, 50, "50 tokens"), ({}, 0, "empty"), ({"stop_token_ids": [99, 100]}, 5, "stop_token_ids names token 100"),
    ({"logit_bias": {100: 1}}, 5, "logit_bias names token 100"), ({"allowed_token_ids": [3, 10**9]}, 5, "100 tokens"),
])  # fmt: skip
def test_checked_refuses(given: dict[str, Any], prompt: int, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        SamplingParams(**given).checked(100, 50, prompt)
