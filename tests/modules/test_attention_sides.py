"""What attention rounds besides what its cache does: against arithmetic written out here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit.engine.config import EngineConfig
from fewbit.engine.engine import Engine
from fewbit.engine.params import SamplingParams
from fewbit.engine.request import Request
from fewbit.errors import RequestError, UnsupportedError
from fewbit.modules.attention_sides import CAST, Side, Sides, hadamard, mapped, weighed
from fewbit.quant.elements import E2M1, E4M3, F32
from fewbit.quant.spec import QuantSpec, Scale, spec
from tests.tiny import llama

NVFP4 = QuantSpec(E2M1, (Scale(E4M3, (1, 16), dynamic=True), Scale(F32, (0, 0))))
FP8 = spec(E4M3, (F32, 0, 0))


def cast(x: Tensor) -> Tensor:
    """As hardware does it, saturating."""
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn).float()


def by_hand(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """q, k, v: [H, T, D], causal."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return cast(weights * p) / p @ v / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("p", [1.0, 448.0])
def test_probabilities(p: float) -> None:
    q, k, v = (torch.randn(2, 9, 16) for _ in range(3))
    scores = q @ k.mT * 0.25
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(weighed(scores, v, p), by_hand(q, k, v, p), rtol=1e-5, atol=1e-6)
    sink = torch.cat([scores, torch.full((2, 9, 1), 0.5)], -1)
    wide = torch.cat([v, torch.zeros(2, 1, 16)], 1)
    torch.testing.assert_close(weighed(sink, v, p, 1), weighed(sink, wide, p), rtol=1e-5, atol=1e-6)


def test_sides_are_rounded_apart() -> None:
    x = torch.randn(1, 2, 5, 16)
    amax = x.abs().amax().view(1, 1)
    bias = torch.randn(2, 1, 16)
    plain = Side(FP8, {"scale0": amax / 448})
    torch.testing.assert_close(plain(x), cast(x / (amax / 448)) * (amax / 448))
    assert torch.equal(Side(CAST)(x), cast(x))
    torch.testing.assert_close(Side(CAST, bias=bias)(x), cast(x - bias) + bias)
    turn = hadamard(16, x.device, x.dtype)
    torch.testing.assert_close(turn @ turn, torch.eye(16))
    torch.testing.assert_close(Side(CAST, turned=True)(x), cast(x @ turn) @ turn)
    q, k, v = Sides(q=Side(CAST), v=plain)(x, x, x)
    assert torch.equal(q, cast(x)) and k is x and torch.equal(v, plain(x))
    halves = mapped(Sides(k=Side(CAST, bias=bias)), lambda t: t[:1])
    assert halves.k is not None and halves.k.bias is not None and halves.k.bias.shape == (1, 1, 16)
    with pytest.raises(UnsupportedError, match="Hadamard"):
        hadamard(24, x.device, x.dtype)


def engine(path: Path, **options: Any) -> Engine:
    return Engine(EngineConfig.of(model=str(path), dtype="float32", **options))


def test_fp8_arithmetic_in_an_engine(tmp_path: Path) -> None:
    """A layer's attention in transformers' own model, queries, keys, values and probabilities cast by hand."""
    from transformers import AutoModelForCausalLM

    from fewbit.models import hf

    path = llama(tmp_path, num_key_value_heads=2)
    of = engine(path, kv_cache_dtype="fp8", kv_attn_math="fp8", max_num_batched_tokens=512)
    assert of.facts()["kv_scales"] == "1.0, locked"
    ids = [5, 9, 33, 70, 12, 8, 41]
    of.add(Request("a", ids, SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=3)))
    tokens: list[int] = []
    found: list[Any] = []
    while of.has_work():
        for delta in of.step():
            tokens += delta.tokens
            found += delta.logprobs or []
    of.shutdown()
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **more: Any) -> Any:
        q, k, v = (cast(t)[0] for t in (query, key, value))
        return by_hand(q, k, v, 1.0).transpose(0, 1)[None], None

    hf.register_attention("casts-by-hand", attend)
    theirs.config._attn_implementation = "casts-by-hand"
    with torch.no_grad():
        want = theirs(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    assert tokens == want.argmax(-1).tolist()
    for row, each in zip(want, found, strict=True):
        assert all(abs(float(row[t]) - each[t].logprob) < 1e-3 for t in each)


def test_what_is_refused(tmp_path: Path) -> None:
    path = llama(tmp_path)
    for dtype in ("auto", "fp8_e5m2", "int8"):
        with pytest.raises(RequestError, match="kv_attn_math=fp8 wants kv_cache_dtype=fp8, not"):
            engine(path, kv_attn_math="fp8", kv_cache_dtype=dtype)
    with pytest.raises(RequestError, match="known is fp8"):
        engine(path, kv_attn_math="fp4", kv_cache_dtype="fp8")
