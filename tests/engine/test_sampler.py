import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fewbit.engine import sampler_draw
from fewbit.engine.params import SamplingParams
from fewbit.engine.sampler import Sampled, Sampler, prompt_logprobs
from fewbit.engine.sampler_draw import draw, uniform
from fewbit.engine.sampler_edits import edit
from fewbit.engine.sampler_row import Row

V = 1003  # no multiple of 32, nor of a vector
torch.set_num_threads(1)


def logits(rows: int, seed: int = 0, spread: float = 3.0, vocab: int = V) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def row(output: list[int] | None = None, seed: int = 0, prompt: list[int] | None = None, **given: Any) -> Row:
    more = {name: given.pop(name) for name in ("allowed", "ends") if name in given}
    return Row(SamplingParams(**given), prompt or [1, 2], output or [], seed, **more)


def sample(values: Tensor, rows: list[Row]) -> Sampled:
    return Sampler(values.shape[1], "cpu").sample(values, rows)


def changed(values: Tensor, one: Row) -> Tensor:
    out = values.clone()
    edit(out, [one] * len(out))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_is_argmax_with_the_lowest_id_on_ties(dtype: torch.dtype) -> None:
    values = logits(5).to(dtype)
    values[1, [17, 900]] = 30.0
    found = sample(values, [row(temperature=0) for _ in range(5)])
    assert found.tokens == [int((one == one.max()).nonzero()[0]) for one in values]
    assert found.tokens[1] == 17
    assert (found.logprobs, found.bad) == ([None] * 5, [False] * 5)
    values[3, [40, 50]] = torch.nan
    found = sample(values.T.contiguous().T, [row(temperature=0) for _ in range(5)])
    assert (found.tokens[3], found.bad) == (40, [False, False, False, True, False])


def test_nothing_changes_the_logits_given() -> None:
    values = logits(4)
    before = values.clone()
    sample(values, [row(top_k=5, logit_bias={1: 5}), row(temperature=0, repetition_penalty=2), row(min_p=0.5), row()])
    assert torch.equal(values, before)


WARPERS = [
    ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    ({"top_k": 1}, [TopKLogitsWarper(1)]),
    ({"top_k": 20}, [TopKLogitsWarper(20)]),
    ({"top_k": 10**15}, []),
    ({"top_p": 0.9}, [TopPLogitsWarper(0.9)]),
    ({"top_p": 0.3}, [TopPLogitsWarper(0.3)]),
    ({"top_p": 1e-9}, [TopPLogitsWarper(1e-9)]),
    ({"min_p": 0.05}, [MinPLogitsWarper(0.05)]),
    ({"min_p": 1.0}, [MinPLogitsWarper(1.0)]),
    (
        {"temperature": 1.5, "min_p": 0.01, "top_k": 40, "top_p": 0.8},
        [TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.01), TopKLogitsWarper(40), TopPLogitsWarper(0.8)],
    ),
]


@pytest.mark.parametrize("cut", ["_cut", "_cut_each"])
@pytest.mark.parametrize(("given", "warpers"), WARPERS, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_draws_from_the_warpers_distribution(
    given: dict[str, Any], warpers: list[Any], cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of a grid of chances over [0, 1) must meet the oracle's inverse distribution."""
    monkeypatch.setattr(sampler_draw, "_cut_each", getattr(sampler_draw, cut))
    values = logits(1, spread=2.0)
    want = values.double()
    for warper in warpers:
        want = warper(None, want)
    ends = want.softmax(-1).cumsum(-1)[0]
    chances = [(i + 0.5) / 400 for i in range(400)]
    monkeypatch.setattr(sampler_draw, "uniform", lambda seed, step: chances[step])
    rows = [row(output=[0] * i, **given) for i in range(400)]
    tokens = draw(values.expand(400, -1).clone(), rows)
    assert torch.isfinite(want[0, tokens]).all()
    before = torch.where(tokens > 0, ends[tokens - 1], 0.0)
    assert (before <= torch.tensor(chances) + 1e-5).all() and (ends[tokens] >= torch.tensor(chances) - 1e-5).all()


def test_frequencies_fit_by_chi_square() -> None:
    values = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0, 0.5, 1.5, -0.5]])
    count = 20_000
    found = sample(values.expand(count, -1), [row(output=[0] * 3, seed=i) for i in range(count)])
    seen = Counter(found.tokens)
    want = (values[0].double().softmax(-1) * count).tolist()
    chi = sum((seen[i] - expected) ** 2 / expected for i, expected in enumerate(want))
    assert chi < 24.3  # 7 degrees of freedom, 0.1%


def test_uniform_is_uniform_and_new_each_step() -> None:
    drawn = [uniform(seed, step) for seed in range(100) for step in range(100)]
    assert len(set(drawn)) == len(drawn) and min(drawn) >= 0 and max(drawn) < 1
    tenths = Counter(int(value * 10) for value in drawn)
    assert sum((n - 1000) ** 2 / 1000 for n in tenths.values()) < 27.9  # 9 degrees of freedom, 0.1%
    assert abs(sum(drawn) / len(drawn) - 0.5) < 0.01


MIXED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 0.9, "logprobs": 5},
    {"top_k": 30, "frequency_penalty": 0.5},
    {"temperature": 2.0, "min_p": 0.02, "logit_bias": {5: 3.0}},
    {"repetition_penalty": 1.3, "top_p": 0.5, "top_k": 100},
    {"temperature": 0, "presence_penalty": 1.0, "logprobs": 20},
    {"temperature": 1.1, "allowed_token_ids": list(range(0, 1000, 3)), "logprobs": 0},
]


@pytest.mark.parametrize("held", [sampler_draw.HELD, 3 * V])
@pytest.mark.parametrize("vocab", [V, 32_001])
def test_a_row_alone_is_the_row_in_company(vocab: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are worked on at a time."""
    monkeypatch.setattr(sampler_draw, "HELD", held)
    values = logits(7, seed=3, vocab=vocab)
    for step in range(12):
        rows = [row(output=[7] * step, seed=i, **given) for i, given in enumerate(MIXED)]
        together = sample(values, rows)
        for i, one in enumerate(rows):
            alone = sample(values[i : i + 1], [one])
            assert alone.tokens[0] == together.tokens[i]
            assert alone.logprobs[0] == together.logprobs[i]  # bit for bit
    shuffled = random.Random(0).sample(range(7), 7)
    assert sample(values[shuffled], [rows[i] for i in shuffled]).tokens == [together.tokens[i] for i in shuffled]


def test_both_cuts_are_one() -> None:
    weights = (logits(6, seed=5).exp() * 1000).long()
    weights[3] = 7  # nothing but ties
    weights[4, 1:] = 0
    spare = (weights.sum(-1, keepdim=True).double() * 0.3).long()
    assert torch.equal(sampler_draw._cut(weights, spare), sampler_draw._cut_each(weights, spare))
    assert (sampler_draw._cut(weights, spare)[3] > 0).sum() == V - int(V * 0.3)


def penalized(values: Tensor, prompt: list[int], output: list[int], given: dict[str, float]) -> Tensor:
    """By the definition: OpenAI's for frequency and presence, CTRL's (Keskar et al. 2019) for repetition."""
    out = values.double().clone()
    repetition = given.get("repetition_penalty", 1.0)
    for token in set(prompt + output):
        out[0, token] = out[0, token] / repetition if out[0, token] > 0 else out[0, token] * repetition
    for token, count in Counter(output).items():
        out[0, token] -= given.get("frequency_penalty", 0) * count + given.get("presence_penalty", 0)
    return out


@pytest.mark.parametrize("given", [
    {"frequency_penalty": 0.7}, {"presence_penalty": -1.1}, {"repetition_penalty": 1.4}, {"repetition_penalty": 0.6},
    {"frequency_penalty": -0.3, "presence_penalty": 2.0, "repetition_penalty": 1.2},
])  # fmt: skip
def test_penalties(given: dict[str, float]) -> None:
    prompt, output = [5, 9, 9, 100], [9, 40, 40, 40, 999]
    found = changed(logits(1), row(prompt=prompt, output=output, **given))
    torch.testing.assert_close(found.double(), penalized(logits(1), prompt, output, given), rtol=1e-6, atol=1e-6)


def test_repetition_penalty_and_bias_are_those_of_transformers() -> None:
    prompt, output = [5, 9, 9, 100], [9, 40, 40, 40, 999]
    oracle = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), logits(1))
    assert torch.equal(changed(logits(1), row(prompt=prompt, output=output, repetition_penalty=1.7)), oracle)
    bias = {3: 10.0, 1002: -100.0, 40: 0.5}
    oracle = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    assert torch.equal(changed(logits(1), row(logit_bias=bias)), oracle(torch.tensor([prompt]), logits(1)))


def test_rows_without_penalties_stay_as_they_were() -> None:
    values = logits(3)
    out = values.clone()
    edit(out, [row(), row(output=[3], presence_penalty=1, logit_bias={4: 1}), row()])
    assert torch.equal(out[[0, 2]], values[[0, 2]])
    assert (out[1] != values[1]).nonzero().flatten().tolist() == [3, 4]


def words(ids: list[int], vocab: int = V) -> Tensor:
    bits = [sum(1 << (i % 32) for i in set(ids) if i // 32 == word) for word in range((vocab + 31) // 32)]
    return torch.tensor([b - (1 << 32) if b >> 31 else b for b in bits], dtype=torch.int32)


@pytest.mark.parametrize(("given", "left"), [
    ({"allowed_token_ids": [3, 31, 32, 1002]}, [3, 31, 32, 1002]),
    ({"allowed": words([0, 63, 95, 1002])}, [0, 63, 95, 1002]),
    ({"allowed": words([0, 63, 95]), "allowed_token_ids": [63, 64]}, [63]),
    ({"allowed": words([0, 63])[:1]}, [0]),
    ({"min_tokens": 3, "ends": [0, 2], "stop_token_ids": [5]}, [i for i in range(V) if i not in (0, 2, 5)]),
    ({"min_tokens": 2, "ends": [0, 2]}, list(range(V))),
    ({"min_tokens": 3, "ends": [2], "allowed": words([2])}, [2]),  # the grammar has ended
    ({"min_tokens": 3, "ends": [2], "allowed": words([2, 9])}, [9]),
])  # fmt: skip
def test_masks(given: dict[str, Any], left: list[int]) -> None:
    found = changed(logits(1), row(output=[8, 8], **given))
    assert torch.isfinite(found[0]).nonzero().flatten().tolist() == left
    assert torch.equal(found[0, left], logits(1)[0, left])


def test_logprobs_are_of_the_raw_logits() -> None:
    values = logits(3).bfloat16()
    rows = [row(temperature=0, logprobs=3, logit_bias={7: 100}), row(temperature=0.5), row(temperature=0, logprobs=0)]
    found = sample(values, rows)
    want = values.double().log_softmax(-1)
    assert found.tokens[0] == 7 and found.logprobs[1] is None
    first, last = found.logprobs[0], found.logprobs[2]
    assert first is not None and last is not None
    assert list(first) == [7, *want[0].topk(3).indices.tolist()]
    assert list(last) == [found.tokens[2]] and last[found.tokens[2]].rank == 1
    order = want[0].sort(descending=True).values
    for token, one in first.items():
        assert one.logprob == pytest.approx(float(want[0, token]), abs=1e-4)
        assert one.rank is not None and order[one.rank - 1] == want[0, token]
    assert first[7].decoded_token is None


def test_prompt_logprobs() -> None:
    values, ids = logits(4), [3, 77, 1002, 5]
    want = values.double().log_softmax(-1)
    found = prompt_logprobs(values, ids, 2)
    for at, (token, one) in enumerate(zip(ids, found, strict=True)):
        assert set(one) == {token, *want[at].topk(2).indices.tolist()}
        assert one[token].logprob == pytest.approx(float(want[at, token]), abs=1e-4)
        assert one[token].rank == int((want[at] > want[at, token]).sum()) + 1
    assert [list(one) for one in prompt_logprobs(values, ids, 0)] == [[token] for token in ids]
    assert prompt_logprobs(values[:0], [], 5) == []


@pytest.mark.parametrize("given", [
    {"temperature": 0}, {}, {"top_p": 0.5}, {"top_k": 5}, {"min_p": 0.1, "logprobs": 2}, {"logit_bias": {4: 1}},
    {"temperature": 0, "allowed_token_ids": [1]},
])  # fmt: skip
def test_bad_rows_are_told_and_alone(given: dict[str, Any]) -> None:
    values = logits(5)
    values[0, 50] = math.nan
    values[1] = -math.inf
    values[2, 60] = math.inf
    rows = [row(seed=i, **given) for i in range(5)]
    found = sample(values, rows)
    assert found.bad == [True, True, True, False, False]
    assert all(0 <= token < V for token in found.tokens)
    assert found.tokens[3:] == sample(logits(5), rows).tokens[3:]


def test_a_mask_that_leaves_nothing_is_bad() -> None:
    assert sample(logits(2), [row(allowed=words([])), row()]).bad == [True, False]


def test_some_tokens_at_minus_infinity_are_fine() -> None:
    values = torch.full((1, V), -math.inf)
    values[0, [4, 8]] = torch.tensor([1.0, 1.0])
    found = {tuple(sample(values, [row(seed=i, top_p=0.99)]).tokens) for i in range(50)}
    assert found == {(4,), (8,)}


def test_extremes() -> None:
    values = logits(1, spread=40.0)
    for given in ({"temperature": 1e-5}, {"temperature": 1e6}, {"top_p": 1e-300}, {"temperature": 0.01, "top_p": 0.1}):
        assert sample(values, [row(**given)]).bad == [False]
    assert sample(values, [row(temperature=1e-5)]).tokens == [int(values.argmax())]
