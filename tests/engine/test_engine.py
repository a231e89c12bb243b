"""The engine against transformers' own generate: token for token, however texts are packed, cut or taken back."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.engine.config import EngineConfig
from fewbit.engine.engine import Engine
from fewbit.engine.params import SamplingParams
from fewbit.engine.request import Delta, Request
from fewbit.engine.runner import Logits, rounder
from fewbit.engine.start import online
from fewbit.errors import CapacityError, RequestError, SpecError, UnsupportedError
from fewbit.kernels.packed import slow
from fewbit.quant.formats import FORMATS
from tests.tiny import llama

GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("engine") / "model", num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=32, max_position_embeddings=512)  # fmt: skip


@pytest.fixture(scope="module")
def truth(folder: Path) -> Any:
    return fewbit.load(folder, dtype=torch.float32)


@pytest.fixture
def make(folder: Path) -> Iterator[Any]:
    made: list[Engine] = []

    def engine(**options: Any) -> Engine:
        made.append(Engine(EngineConfig.of(model=str(folder), **{"dtype": "float32", **options})))
        return made[-1]

    yield engine
    for one in made:
        one.shutdown()


def prompts(count: int, longest: int = 60, shared: int = 0, seed: int = 0) -> list[list[int]]:
    """Ragged; half of them begin alike where `shared` says so."""
    draw = random.Random(seed)
    common = [draw.randrange(3, 256) for _ in range(shared)]
    return [(common if i % 2 else []) + [draw.randrange(3, 256) for _ in range(draw.randrange(1, longest))]
            for i in range(count)]  # fmt: skip


def expected(model: Any, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                         eos_token_id=None, pad_token_id=0)  # fmt: skip
    return out[0, len(prompt) :].tolist()


def drain(engine: Engine, requests: list[Request], seed: int = 1) -> dict[str, list[Delta]]:
    """All of them, coming in at random times."""
    draw, coming = random.Random(seed), list(requests)
    found: dict[str, list[Delta]] = {r.id: [] for r in requests}
    while coming or engine.has_work():
        while coming and draw.random() < 0.4:
            engine.add(coming.pop(0))
        for delta in engine.step():
            found[delta.request_id].append(delta)
    return found


def tokens(deltas: list[Delta], index: int = 0) -> list[int]:
    return [t for d in deltas if d.index == index for t in d.tokens]


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"max_num_batched_tokens": 7, "max_num_seqs": 5},
    "tiny cache": {"kv_cache_memory_bytes": 3 * 2 * 2 * 32 * 4 * 160, "max_model_len": 120},
    "small pages": {"block_size": 4},
    "no prefix cache": {"enable_prefix_caching": False},
}


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_greedy_is_generate(make: Any, truth: Any, way: str, ahead: bool) -> None:
    """ahead: as on a GPU, a step is begun before the tokens of the one before it are known."""
    engine = make(**WAYS[way])
    engine.ahead = ahead
    asked = prompts(64, shared=37)
    requests = [Request(str(i), p, SamplingParams(max_tokens=2 + i % 12, **GREEDY)) for i, p in enumerate(asked)]
    found = drain(engine, requests)
    for i, prompt in enumerate(asked):
        assert tokens(found[str(i)]) == expected(truth, prompt, 2 + i % 12), (way, i)
        assert found[str(i)][-1].finish == "length"
    stats = engine.stats()
    assert (stats.preemptions > 0) == (way == "tiny cache")
    assert (stats.prefix_hits > 0) == (way != "no prefix cache")
    assert stats.pages_used == 0 and not engine.has_work()


def test_a_request_does_not_know_its_company(make: Any) -> None:
    """Sampled with a seed, alone and among others, cut and uncut: the same tokens and logprobs."""
    params = SamplingParams(max_tokens=10, temperature=1.0, top_p=0.9, seed=7, logprobs=3, ignore_eos=True)
    prompt = prompts(1, seed=5)[0]
    alone = drain(make(), [Request("a", prompt, params)])["a"]
    crowd = [Request(str(i), p, SamplingParams(max_tokens=12, **GREEDY)) for i, p in enumerate(prompts(20))]
    among = drain(make(max_num_batched_tokens=9, max_num_seqs=8), [*crowd, Request("a", prompt, params)])["a"]
    assert tokens(alone) == tokens(among)
    for one, other in zip(alone, among, strict=True):
        a, b = one.logprobs[0], other.logprobs[0]
        assert a.keys() == b.keys() and all(abs(a[t].logprob - b[t].logprob) < 1e-4 for t in a)


AHEAD: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 1.0, "top_p": 0.9, "seed": 3, "logprobs": 2},
    "penalty": {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    "least": {"temperature": 0.0, "min_tokens": 5, "stop_token_ids": list(range(3, 200))},
    "stops": {"temperature": 1.0, "seed": 5, "stop_token_ids": list(range(3, 60))},
    "several": {"temperature": 1.0, "seed": 6, "n": 3},
    "prompt": {"temperature": 0.0, "prompt_logprobs": 1},
}


def test_a_step_ahead_gives_what_a_step_at_a_time_gives(make: Any) -> None:
    """Rows that need to know their tokens among rows that do not, pages running out, requests given up in between."""
    options = {"kv_cache_memory_bytes": 3 * 2 * 2 * 32 * 4 * 200, "max_model_len": 120, "max_num_batched_tokens": 24}
    asked = prompts(42, longest=40, shared=20, seed=4)
    kinds = [list(AHEAD)[i % len(AHEAD)] for i in range(len(asked))]
    found = []
    for ahead in (False, True):
        engine = make(**options)
        engine.ahead = ahead
        requests = [Request(f"{i} {kind}", prompt, SamplingParams(max_tokens=4 + i % 9, ignore_eos=True, **AHEAD[kind]))
                    for i, (prompt, kind) in enumerate(zip(asked, kinds, strict=True))]  # fmt: skip
        given = drain(engine, requests)
        found.append({key: [(tokens(d, i), d[-1].finish) for i in range(3)] for key, d in given.items()})
        assert engine.stats().pages_used == 0 and engine.stats().preemptions > 0
    assert found[0] == found[1]
    assert all(each[0][1] in ("length", "stop") for each in found[0].values())


def test_giving_up_while_a_step_is_in_flight(make: Any, truth: Any) -> None:
    engine = make()
    engine.ahead = True
    asked = prompts(4, seed=8)
    for i, prompt in enumerate(asked):
        engine.add(Request(str(i), prompt, SamplingParams(max_tokens=6, **GREEDY)))
    assert engine.step() == []
    first = {d.request_id: d.tokens for d in engine.step()}
    engine.abort("1")
    engine.add(Request("1", asked[1][::-1], SamplingParams(max_tokens=6, **GREEDY)))
    rest: dict[str, list[int]] = {}
    while engine.has_work():
        for delta in engine.step():
            rest.setdefault(delta.request_id, []).extend(delta.tokens)
    assert rest["1"] == expected(truth, asked[1][::-1], 6)
    for i in (0, 2, 3):
        assert first[str(i)] + rest[str(i)] == expected(truth, asked[i], 6)
    assert engine.stats().pages_used == 0


def test_continuations_share_the_prompt(make: Any) -> None:
    engine = make()
    prompt = prompts(1, longest=60, seed=3)[0] * 3
    params = SamplingParams(n=4, max_tokens=6, temperature=1.0, seed=11, ignore_eos=True)
    found = drain(engine, [Request("r", prompt, params)])["r"]
    each = [tokens(found, i) for i in range(4)]
    assert len({tuple(e) for e in each}) > 1 and all(len(e) == 6 for e in each)
    one = drain(make(), [Request("r", prompt, SamplingParams(max_tokens=6, temperature=1.0, seed=13, ignore_eos=True))])
    assert tokens(one["r"]) == each[2], "continuation i has the seed plus i"
    assert engine.stats().prefix_hits >= 3 * (len(prompt) // 16 * 16 - 16)


def test_prompt_logprobs(make: Any, truth: Any) -> None:
    prompt = prompts(1, longest=50, seed=9)[0] * 2
    asked = SamplingParams(max_tokens=1, prompt_logprobs=2, **GREEDY)
    with torch.no_grad():
        want = truth(torch.tensor([prompt])).logits[0].log_softmax(-1)
    for options in ({}, {"max_num_batched_tokens": 5, "max_num_seqs": 1}):
        (delta,) = drain(make(**options), [Request("r", prompt, asked)])["r"]
        assert delta.prompt_logprobs is not None and delta.prompt_logprobs[0] is None
        assert len(delta.prompt_logprobs) == len(prompt)
        for i, entry in enumerate(delta.prompt_logprobs[1:]):
            assert abs(entry[prompt[i + 1]].logprob - float(want[i, prompt[i + 1]])) < 1e-4


def test_aborting_frees_pages_at_once(make: Any) -> None:
    engine = make(max_num_seqs=2, max_num_batched_tokens=16)
    for i, prompt in enumerate([prompts(1, seed=i)[0] * 2 for i in range(4)]):
        engine.add(Request(str(i), prompt, SamplingParams(max_tokens=50, **GREEDY)))
    engine.step()
    assert engine.stats().pages_used > 0
    for i in range(4):  # in prefill, in decode, and waiting
        engine.abort(str(i))
    assert engine.stats().pages_used == 0
    assert engine.step() == [] and not engine.has_work()
    engine.abort("never seen")


def test_who_waits_begins_as_soon_as_there_is_room(make: Any, truth: Any) -> None:
    engine = make(max_num_seqs=4)
    asked = prompts(9, seed=11)
    for i, prompt in enumerate(asked):
        engine.add(Request(str(i), prompt, SamplingParams(max_tokens=3 + 2 * (i % 4), **GREEDY)))
    found: dict[str, list[int]] = {}
    while engine.has_work():
        waiting, running = len(engine.scheduler.waiting), len(engine.scheduler.running)
        for delta in engine.step():
            found.setdefault(delta.request_id, []).extend(delta.tokens)
        assert len(engine.scheduler.waiting) == max(0, waiting - (4 - running))
    assert [found[str(i)] for i in range(9)] == [expected(truth, p, 3 + 2 * (i % 4)) for i, p in enumerate(asked)]


def test_priority_comes_first(make: Any) -> None:
    engine = make(max_num_seqs=1)
    engine.add(Request("running", [5, 6], SamplingParams(max_tokens=3, **GREEDY)))
    engine.step()
    engine.add(Request("late", [7, 8], SamplingParams(max_tokens=1, **GREEDY), priority=5))
    engine.add(Request("urgent", [9, 8], SamplingParams(max_tokens=1, **GREEDY), priority=-1))
    ended = []
    while engine.has_work():
        ended += [d.request_id for d in engine.step() if d.finish]
    assert ended == ["running", "urgent", "late"]


def test_a_row_of_nan_ends_alone(make: Any) -> None:
    engine = make()
    good, bad = [5, 6, 7], [9, 9, 9]
    want = tokens(drain(engine, [Request("g", good, SamplingParams(max_tokens=4, **GREEDY))])["g"])
    run = engine.runner.run

    def poisoned(works: Any, flight: Any = None) -> Any:
        found = run(works, flight)
        each = [logits * float("nan") if w.stream.request.id == "bad" else logits
                for w, logits in zip(works, found.each(), strict=True)]  # fmt: skip
        return Logits(torch.cat(each), found.counts)

    engine.runner.run = poisoned
    requests = [Request("bad", bad, SamplingParams(max_tokens=4, **GREEDY)),
                Request("g", good, SamplingParams(max_tokens=4, **GREEDY))]  # fmt: skip
    found = drain(engine, requests)
    assert [d.finish for d in found["bad"]] == ["error"] and tokens(found["g"]) == want
    assert engine.stats().nan_rows == 1 and engine.stats().pages_used == 0


BAD: list[tuple[list[Any], dict[str, Any], str]] = [
    ([], {}, "empty"),
    ([256], {}, "no token id"),
    ([-1], {}, "no token id"),
    ([True], {}, "no token id"),
    ([3] * 512, {}, "511 fit"),
    ([3], {"stop_token_ids": [999]}, "999"),
    ([3], {"logit_bias": {999: 1.0}}, "999"),
]


@pytest.mark.parametrize(("prompt", "options", "words"), BAD)
def test_what_can_never_run_is_refused(make: Any, prompt: list[Any], options: dict[str, Any], words: str) -> None:
    engine = make()
    with pytest.raises(RequestError, match=words):
        engine.add(Request("r", prompt, SamplingParams(**options)))
    assert not engine.has_work()


def test_ids_are_unique_and_the_queue_is_bounded(make: Any) -> None:
    engine = make(max_queue=2)
    engine.add(Request("a", [3], SamplingParams()))
    with pytest.raises(RequestError, match="in use"):
        engine.add(Request("a", [3], SamplingParams()))
    engine.add(Request("b", [3], SamplingParams()))
    with pytest.raises(CapacityError, match="waiting"):
        engine.add(Request("c", [3], SamplingParams()))
    engine.abort("a")
    engine.add(Request("c", [3], SamplingParams()))


CONFIGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_model_len": 100_000}, RequestError, "positions reach 512"),
    ({"max_model_len": 512, "kv_cache_memory_bytes": 4096}, CapacityError, "smaller max_model_len"),
    ({"kv_cache_dtype": "int3"}, RequestError, "known are auto"),
    ({"quantization": "awq"}, RequestError, "is not quantized"),
    ({"gpu_memory_utilization": 1.5}, RequestError, "want a share"),
    ({"max_num_seq": 5}, RequestError, "max_num_seqs"),
    ({"block_size": 0}, RequestError, "at least 1"),
    ({"kernels": "marlin"}, SpecError, "known: auto"),
]


@pytest.mark.parametrize(("options", "error", "words"), CONFIGS)
def test_configs_are_checked(make: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(**options)


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_e5m2", "int8", "nvfp4"])
def test_a_narrower_cache(make: Any, truth: Any, dtype: str) -> None:
    """Rounded keys and values move the logits a little; the text of a random model may differ, its start does not."""
    prompt = prompts(1, seed=2)[0]
    asked = SamplingParams(max_tokens=1, logprobs=1, **GREEDY)
    (delta,) = drain(make(kv_cache_dtype=dtype), [Request("r", prompt, asked)])["r"]
    with torch.no_grad():
        want = truth(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    token = delta.tokens[0]
    assert abs(delta.logprobs[0][token].logprob - float(want[token])) < 0.3


def test_online_quantization(make: Any) -> None:
    engine = make(quantization="fp8")
    kinds = {
        p.quantized.weight.spec.element.name for m in engine.loaded.model.modules() for p in getattr(m, "parts", ())
    }
    assert kinds == {"e4m3"}
    assert len(tokens(drain(engine, [Request("r", [3, 4], SamplingParams(max_tokens=3, **GREEDY))])["r"])) == 3


def test_activations_that_the_hardware_lacks(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    """FP8 inputs on a CPU: weights alone, said so; refused; or rounded in software. int8 inputs are what it has."""

    def acts(**options: Any) -> set[str | None]:
        parts = [p for m in make(**options).loaded.model.modules() for p in getattr(m, "parts", ())]
        return {p.quantized.format.act.element.name if p.quantized.format.act else None for p in parts}

    assert acts(quantization="fp8") == {None} and "no processor multiplies e4m3" in caplog.text
    assert acts(quantization="fp8", emulate_activations=True) == {"e4m3"}
    assert acts(quantization="int8") == {"int8"}
    with pytest.raises(UnsupportedError, match="no processor multiplies e4m3"):
        make(quantization="fp8", strict_activations=True)
    with pytest.raises(RequestError, match="not both"):
        make(strict_activations=True, emulate_activations=True)


def test_activations_fast(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Weights alone with int8 inputs: only when asked, only where it is faster, and said so either way."""

    def acts(**options: Any) -> set[str | None]:
        parts = [p for m in make(**options).loaded.model.modules() for p in getattr(m, "parts", ())]
        return {p.quantized.format.act.element.name if p.quantized.format.act else None for p in parts}

    fast = {None} if slow(FORMATS["int8-channel"].weight) else {"int8"}
    assert acts(quantization="int8-channel", dtype="bfloat16") == {None} and "fast" not in caplog.text
    assert acts(quantization="int8-channel", dtype="bfloat16", activations="fast") == fast
    assert "activations of int8-channel are " in caplog.text
    assert acts(quantization="int8-channel", dtype="float32", activations="fast") == {None}
    assert "in bfloat16" in caplog.text
    assert acts(quantization="int4-g32", dtype="bfloat16", activations="fast") == fast
    assert acts(quantization="fp8", dtype="bfloat16", activations="fast") == {None}
    with pytest.raises(RequestError, match="activations='quick': known are declared, hardware, fast, off"):
        make(activations="quick")


def test_few_counts_of_rows() -> None:
    """Libraries keep something for every count that they have met."""
    counts = {rounder(n) for n in range(1, 2049)}
    assert all(n <= rounder(n) <= n + n // 8 + 15 for n in range(1, 2049)) and len(counts) < 64


def test_rows_of_no_request_change_nothing(make: Any, truth: Any) -> None:
    prompt = prompts(1, seed=4)[0] * 3
    for length in (17, 31, 33, len(prompt)):
        (delta,) = drain(make(), [Request("r", prompt[:length], SamplingParams(max_tokens=1, **GREEDY))])["r"]
        assert delta.tokens == expected(truth, prompt[:length], 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_device_that_is_not_here(make: Any) -> None:
    with pytest.raises(RequestError, match="no CUDA device"):
        make(device="cuda")


def test_the_dialect_may_be_named_as_vllm_does(folder: Path, tmp_path: Path) -> None:
    fewbit.quantize(folder, tmp_path / "out", "nvfp4-a16", algo="rtn", to="modelopt", report=False)
    for name in ("modelopt", "modelopt_fp4"):
        config = EngineConfig.of(model=str(tmp_path / "out"), quantization=name)
        assert online(config) is None
    with pytest.raises(RequestError, match="is modelopt"):
        online(EngineConfig.of(model=str(tmp_path / "out"), quantization="awq"))
    for name in ("q4_k", "int4-g128", "int4_g128"):
        assert online(EngineConfig.of(model=str(folder), quantization=name)) in ("q4_k", "int4-g128")


@pytest.mark.parametrize(("declared", "asked", "found"), [
    ("bfloat16", "auto", torch.bfloat16), ("float32", "auto", torch.bfloat16), ("float16", "auto", torch.bfloat16),
    ("float32", "float32", torch.float32), ("bfloat16", "float", torch.float32), ("bfloat16", "half", torch.float16),
])  # fmt: skip
def test_what_it_computes_in(tmp_path: Path, declared: str, asked: str, found: torch.dtype) -> None:
    engine = Engine(EngineConfig.of(model=str(llama(tmp_path / "m", dtype=declared)), dtype=asked, device="cpu"))
    assert engine.loaded.model.dtype == found
    engine.shutdown()
