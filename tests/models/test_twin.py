"""The twin tells right from wrong, quickly, and changes nothing but sizes."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit.errors import UnsupportedError
from fewbit.models import hf, twin
from fewbit.models.shrink import shrink
from fewbit.modules import attention
from fewbit.modules.linear import Linear
from tests.yardstick import within

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256, "rms_norm_eps": 3e-5,
    "eos_token_id": [128001, 128009], "bos_token_id": 128000,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def forget() -> Any:
    twin.forget()
    yield
    twin.forget()


def test_exact_and_quick() -> None:
    config = hf.read_config(LLAMA)
    start = time.process_time()
    assert twin.require(config) == attention.NAME
    assert within(time.process_time() - start, 1.5)


def test_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    twin.require(hf.read_config(LLAMA))
    monkeypatch.setattr(twin, "check", None)
    assert twin.require(hf.read_config(LLAMA | {"num_hidden_layers": 30})) == attention.NAME


def test_a_wrong_layer_is_refused_with_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x: right(self, x) * 1.003)
    with pytest.raises(UnsupportedError, match=r"'llama' does not compute .*\n.*logits 0\.0\d+, allowed 1e-04"):
        twin.require(hf.read_config(LLAMA))


def test_wrong_attention_falls_back_to_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: Any, q: Tensor, *rest: Any, **named: Any) -> Any:
        return attention.forward(module, q * 1.1, *rest, **named)

    monkeypatch.setitem(hf.AttentionInterface._global_mapping, hf.OURS, wrong)
    verdict = twin.check(hf.read_config(LLAMA))
    assert verdict.exact and verdict.attention == "eager"


def test_what_cannot_be_built_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: Any) -> Any:
        raise ValueError("no such thing")

    monkeypatch.setattr(hf, "random_model", broken)
    with pytest.raises(UnsupportedError, match="no twin: ValueError: no such thing"):
        twin.require(hf.read_config(LLAMA))


def test_the_state_of_the_generator_is_left_alone() -> None:
    torch.manual_seed(7)
    want = torch.rand(1)
    torch.manual_seed(7)
    twin.check(hf.read_config(LLAMA))
    assert torch.equal(torch.rand(1), want)


def test_only_sizes_change() -> None:
    config = hf.read_config(LLAMA)
    before, after = config.to_dict(), shrink(config).to_dict()
    changed = {name: after[name] for name in before if before[name] != after[name]}
    assert changed == {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96,
        "num_hidden_layers": 2, "vocab_size": 160, "eos_token_id": changed["eos_token_id"],
        "bos_token_id": changed["bos_token_id"],
    }  # fmt: skip
    assert all(100 <= token < 160 for token in changed["eos_token_id"])
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("model_type", "values", "want"),
    [
        ("gemma3_text", {}, {"num_hidden_layers": 6, "sliding_window": 8, "query_pre_attn_scalar": 256}),
        ("qwen2", {"num_key_value_heads": 32, "num_attention_heads": 32}, {"num_key_value_heads": 4}),
        ("qwen2", {"num_key_value_heads": 1, "num_attention_heads": 32}, {"num_key_value_heads": 1}),
        ("deepseek_v3", {}, {"num_hidden_layers": 3, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}),
        (
            "granite",
            {"logits_scaling": 7.0, "residual_multiplier": 0.3},
            {"logits_scaling": 7.0, "residual_multiplier": 0.3},
        ),
        ("llama", {"hidden_size": 48, "num_attention_heads": 6, "head_dim": 8}, {"hidden_size": 48, "head_dim": 8}),
    ],
)
def test_shrunk(model_type: str, values: dict[str, Any], want: dict[str, Any]) -> None:
    small = shrink(hf.read_config({"model_type": model_type, **values}))
    assert {name: getattr(small, name) for name in want} == want


def test_long_rope_factors_are_cut_to_the_small_head() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096}
    factors = {"short_factor": [1.0 + i for i in range(48)], "long_factor": [2.0 + i for i in range(48)]}
    config = hf.read_config({"model_type": "phi3", "hidden_size": 3072, "rope_parameters": rope | factors})
    assert shrink(config).rope_parameters["short_factor"] == factors["short_factor"][:8]
    assert twin.check(config).exact
