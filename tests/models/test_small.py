"""Configs that are tiny already: shrink leaves them whole, and load computes what transformers computes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit.models import hf, twin
from fewbit.models.build import load
from tests.models import saved

MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}  # fmt: skip
TYPES: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {"head_dim": 8}, "qwen2": {}, "qwen3": {"head_dim": 16}, "gemma3_text": {"head_dim": 16},
    "phi3": {"pad_token_id": 0}, "opt": {"ffn_dim": 96}, "gpt_oss": {**MOE, "num_local_experts": 4, "head_dim": 16},
    "mixtral": {**MOE, "num_local_experts": 4}, "qwen3_moe": {**MOE, "num_experts": 4, "head_dim": 16},
    "deepseek_v3": {**MOE, **MLA}, "glm4": {"head_dim": 16}, "gemma2": {"head_dim": 16}, "olmo2": {}, "granite": {},
    "cohere2": {}, "deepseek_v2": {**MOE, **MLA},
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def config(model_type: str, hidden: int, **more: Any) -> Any:
    sizes = {
        "hidden_size": hidden, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96, "vocab_size": 256, "word_embed_proj_dim": hidden,
    }  # fmt: skip
    return hf.read_config({"model_type": model_type, **sizes, **TOKENS, **TYPES[model_type], **more})


@pytest.mark.parametrize("hidden", [32, 96, 256])
@pytest.mark.parametrize("model_type", TYPES)
def test_equals_transformers(model_type: str, hidden: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = hf.random_model(config(model_type, hidden))
    twin.randomize(theirs)
    ours = load(saved.save(theirs, tmp_path))
    assert twin.relative(saved.logits(ours), saved.logits(theirs)) <= 1e-5


@pytest.mark.parametrize(("heads", "kv"), [(3, 3), (3, 1), (6, 3), (1, 1), (12, 4)])
@pytest.mark.parametrize("hidden", [48, 192])
def test_odd_numbers_of_heads(heads: int, kv: int, hidden: int) -> None:
    change = {"num_attention_heads": heads, "num_key_value_heads": kv}
    assert twin.check(config("llama", hidden, **change)).exact
