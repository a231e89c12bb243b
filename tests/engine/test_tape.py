"""A step from a tape gives the bits of the model itself, or there is no tape."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewbit.engine.config import EngineConfig
from fewbit.engine.engine import Engine
from fewbit.engine.params import SamplingParams
from fewbit.engine.request import Request
from fewbit.engine.tape import Tape
from fewbit.engine.tapes import PROOFS, Tapes
from fewbit.errors import UnsupportedError
from fewbit.kernels import fused, saturation
from fewbit.modules.glu import Gating, act_mul
from fewbit.modules.norm import Norm, NormForm, normed
from fewbit.modules.residual import Later, later
from tests.engine.test_engine import GREEDY, drain, prompts, tokens
from tests.models import saved
from tests.tiny import llama

W = torch.linspace(-1, 1, 64)
NORM = Norm(nn.Parameter(W, requires_grad=False), None, NormForm(1e-6))
CODE: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: (x + 2) * x - x / 3 + torch.where(x > 0, x, -x),
    "sums in 16 bits": lambda x: x.bfloat16() + x.flip(0).bfloat16() + (1e38 * x).bfloat16() * 1e9,
    "in place": lambda x: x.clone().add_(1).mul_(x),
    "zeros that are added to": lambda x: torch.zeros_like(x).add_(x) + x.new_zeros(64).index_add_(
        0, torch.tensor([1, 5]), x[0, :2]),
    "views and copies": lambda x: x.view(8, -1).t().reshape(-1)[::2].contiguous().unsqueeze(0).expand(3, -1) * 1.0,
    "several at once": lambda x: torch.cat([*x.split(16, -1), *torch.topk(x, 4)[:1]], -1),
    "looked up": lambda x: functional.embedding(x.abs().long() % 7, W.view(8, 8)),
    "written in places": lambda x: torch.zeros(9, 64).index_put_((torch.arange(4),), x),
    "other types": lambda x: x.bfloat16().float() + x.double().to(torch.float16).float(),
    "a product and a softmax": lambda x: (x @ x.T).softmax(-1) @ x,
    "sums": lambda x: x.sum(-1, keepdim=True).rsqrt().nan_to_num() + x.mean() + x.argmax(-1, keepdim=True),
    "made of numbers": lambda x: x + torch.arange(64) + torch.tensor([1.0]) + torch.ones(64),
    "kernels": lambda x: act_mul(normed(x, W, None, NormForm(1e-6)), x, Gating("silu")),
    "added by norms": lambda x: NORM(Later(x) + x.flip(0)) + later(NORM, x),
    "no dropout": lambda x: functional.dropout(x, 0.5, training=False) + 1,
    "several results": lambda x: [x + 1, torch.sort(x)[0]],
}  # fmt: skip
REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda x: x * float(x.sum()),
    "a question": lambda x: x if bool(x.sum() > 0) else -x,
    "numbers": lambda x: x * len(x.tolist()),
    "a shape": lambda x: x[x > 0],
    "distinct ones": lambda x: x.unique(),
    "chance": lambda x: functional.dropout(x, 0.5, training=True),
}


@pytest.mark.parametrize("name", CODE)
def test_again(name: str) -> None:
    """With other contents where they lay."""
    run, x, tape = CODE[name], torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), Tape()
    with torch.inference_mode(), tape.recording():
        found = run(x)
    for seed in (1, 2):
        x.copy_(torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)))
        tape.replay()
        wanted = run(x)
        pairs = zip(found, wanted, strict=True) if isinstance(found, list) else [(found, wanted)]
        for got, want in pairs:
            assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("name", REFUSED)
def test_what_looks_at_values_is_refused(name: str) -> None:
    with pytest.raises((UnsupportedError, RuntimeError)), torch.inference_mode(), Tape().recording():
        REFUSED[name](torch.randn(4, 64))


def test_kernels_are_on_the_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    if fused._native() is None:
        pytest.skip("no kernels in C++ here")
    x, tape = torch.randn(4, 64), Tape()
    with torch.inference_mode(), tape.recording():
        y = fused.norm(x, W, None, 1e-6, "wide", False)
    monkeypatch.setattr(fused, "norm", lambda *_: pytest.fail("Python was called"))
    with torch.inference_mode():
        y.zero_()
    tape.replay()
    assert bool((y != 0).any())


MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": lambda folder: llama(folder, num_attention_heads=4, num_key_value_heads=2, head_dim=32),
    **{name: (lambda folder, name=name: saved.save(saved.model(name), folder))  # type: ignore[misc]
       for name in ("gemma2", "gemma3_text", "qwen3", "phi3", "olmo2", "cohere2", "glm4")},
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int4": {"dtype": "bfloat16", "quantization": "int4-g32"},
    "fp8 with its cache": {
        "dtype": "bfloat16",
        "quantization": "fp8-channel",
        "kv_cache_dtype": "fp8",
        "kv_scale": 1.0,
    },
    "cache by token": {"dtype": "bfloat16", "kv_cache_dtype": "fp8_per_token_head"},
    "inputs rounded": {"dtype": "bfloat16", "quantization": "mxfp4"},
    "pages few": {"dtype": "float32", "kv_cache_memory_bytes": 300_000, "max_num_seqs": 4},
}


@pytest.fixture
def make() -> Iterator[Any]:
    made: list[Engine] = []

    def engine(folder: Path, **options: Any) -> Engine:
        made.append(Engine(EngineConfig.of(model=str(folder), device="cpu", max_model_len=128, **options)))
        return made[-1]

    yield engine
    for one in made:
        one.shutdown()


def answered(engine: Engine) -> list[list[int]]:
    """Of texts that come and go, so that steps have all sizes."""
    draw = random.Random(0)
    params = [SamplingParams(max_tokens=draw.randrange(4, 40), logprobs=1, **GREEDY) for _ in range(9)]
    texts = [[t % 150 for t in prompt] for prompt in prompts(9, 40)]
    asked = [Request(str(i), *both) for i, both in enumerate(zip(texts, params, strict=True))]
    found = drain(engine, asked)
    return [tokens(found[r.id]) for r in asked]


def tapes(engine: Engine) -> Tapes:
    found = engine.runner.tapes
    assert isinstance(found, Tapes)
    return found


@pytest.mark.parametrize("model, options", [(m, "float32") for m in MODELS] + [("llama", o) for o in OPTIONS])
def test_same_tokens(model: str, options: str, make: Any, tmp_path: Path) -> None:
    folder = MODELS[model](tmp_path)
    plain, taped = (make(folder, enforce_eager=eager, **OPTIONS[options]) for eager in (True, False))
    before = saturation.total()
    wanted = answered(plain)
    middle = saturation.total()
    assert answered(taped) == wanted
    assert saturation.total() - middle == middle - before
    assert plain.runner.tapes is None
    held = tapes(taped)
    assert not held._refused and any(one.proofs == PROOFS for one in held._tapes.values())


def test_experts_that_a_host_counts_have_no_tape(make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved.save(saved.model("qwen3_moe"), tmp_path)
    plain, taped = (make(folder, enforce_eager=eager, dtype="float32") for eager in (True, False))
    with caplog.at_level("INFO", "fewbit.engine"):
        assert answered(taped) == answered(plain)
    assert tapes(taped)._refused and not tapes(taped)._tapes
    assert "run without a tape" in caplog.text


def test_a_tape_that_is_wrong_is_left(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = MODELS["llama"](tmp_path)
    plain, taped = (make(folder, enforce_eager=eager, dtype="float32") for eager in (True, False))
    wanted = answered(plain)
    monkeypatch.setattr(Tape, "replay", lambda self: self._held[-1][0].fill_(7.0))
    assert answered(taped) == wanted
    assert tapes(taped)._refused and not any(one.proofs for one in tapes(taped)._tapes.values())


def test_memory_goes_with_the_engine(make: Any, tmp_path: Path) -> None:
    engine = make(MODELS["llama"](tmp_path), dtype="float32")
    answered(engine)
    assert tapes(engine)._tapes
    engine.runner.free()
    assert engine.runner.tapes is None
