"""Scalings folded and streams rotated in whole models, not of the twin's sizes: the logits are what they were."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit import codecs
from fewbit.errors import SpecError, UnsupportedError
from fewbit.models import hf, twin
from fewbit.models.build import load
from fewbit.models.observe import observe
from fewbit.models.observe_roles import turned
from fewbit.models.observe_values import Group, Source
from fewbit.models.rewrite import Rotated, fold, tied
from tests.models import saved
from tests.real import gemma3

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 96, "intermediate_size": 136, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 6, "q_lora_rank": 24, "kv_lora_rank": 28, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 20, "head_dim": 8, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}  # fmt: skip
FOLDED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"head_dim": 16},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {"head_dim": 16},
    "granite": {"head_dim": 16, "residual_multiplier": 0.3, "embedding_multiplier": 3.0},
    "glm4": {},
    "olmo2": {"head_dim": 16},
    "cohere2": {},
    "opt": {"ffn_dim": 136, "word_embed_proj_dim": 96},
    "gpt_neox": {"head_dim": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, **EXPERTS},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {**EXPERTS, **LATENT},
}
ROTATED = ("llama", "qwen2", "qwen3", "gemma", "phi3", "granite", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")


def made(model_type: str, **changes: Any) -> Any:
    config = hf.read_config({"model_type": model_type, **SIZES, **FOLDED.get(model_type, {}), **changes})
    torch.manual_seed(0)
    model = hf.random_model(config)
    twin.randomize(model)
    return model


def scaling(group: Group, weights: dict[str, Tensor]) -> Tensor:
    held = weights.get(group.linears[0], weights.get(f"{group.linears[0]}.weight"))
    assert held is not None and group.source is not None
    stacked = held.dim() == 3 and group.source.kind == "linear"
    return tied(torch.rand(*held.shape[:1] if stacked else (), held.shape[-1]) * 1.5 + 0.5, group.source)


@pytest.mark.parametrize("model_type", FOLDED)
def test_every_fold_of_a_model_at_once(model_type: str) -> None:
    model = made(model_type)
    wanted = saved.logits(model)
    wiring = observe(model.config)
    folded = 0
    for i, layer in enumerate(model.get_submodule(wiring.path)):
        weights = {p: (w.data.mT if turned(layer, p) else w.data) for p, w in layer.named_parameters()}
        for group in wiring.for_layer(i, model.config).groups:
            if group.source is not None:
                weights |= fold(weights, group, scaling(group, weights))
                folded += 1
        for path, parameter in layer.named_parameters():
            parameter.data = (weights[path].mT if turned(layer, path) else weights[path]).contiguous()
    assert folded >= 2 * (i + 1)
    assert twin.relative(saved.logits(model), wanted) < 2e-5


def test_what_is_folded() -> None:
    """By hand: a norm of 1 + w, two linears, and a router that reads the same."""
    weights = {
        "norm.weight": torch.tensor([0.0, 1.0]), "norm.bias": torch.tensor([4.0, 4.0]), "a.weight": torch.ones(3, 2),
        "b.weight": torch.ones(1, 2), "router.weight": torch.ones(4, 2), "c.weight": torch.ones(2, 2),
    }  # fmt: skip
    group = Group(("a", "b"), Source("norm", "norm", 1), ("router",))
    found = fold(weights, group, torch.tensor([2.0, 4.0]))
    assert sorted(found) == ["a.weight", "b.weight", "norm.bias", "norm.weight", "router.weight"]
    assert found["norm.weight"].tolist() == [-0.5, -0.5] and found["norm.bias"].tolist() == [2.0, 1.0]
    assert all(found[f"{n}.weight"].tolist() == [[2.0, 4.0]] * rows for n, rows in (("a", 3), ("b", 1), ("router", 4)))
    assert weights["norm.weight"].tolist() == [0.0, 1.0]


LAYOUTS = (  # layout, repeat, block, N, K -> the row of each channel
    ("all", 1, 0, 4, 4, [0, 1, 2, 3]),
    ("all", 2, 2, 4, 8, [0, 1, 0, 1, 2, 3, 2, 3]),
    ("last", 1, 0, 8, 4, [4, 5, 6, 7]),
    ("last", 2, 2, 8, 4, [6, 7, 6, 7]),
    ("first", 1, 0, 8, 4, [0, 1, 2, 3]),
    ("even", 1, 0, 8, 4, [0, 2, 4, 6]),
    ("odd", 1, 0, 8, 4, [1, 3, 5, 7]),
    ("grouped", 1, 2, 12, 4, [4, 5, 10, 11]),
    ("grouped", 2, 2, 16, 8, [6, 7, 6, 7, 14, 15, 14, 15]),
)


@pytest.mark.parametrize(("layout", "repeat", "block", "n", "k", "rows"), LAYOUTS)
def test_rows(layout: Any, repeat: int, block: int, n: int, k: int, rows: list[int]) -> None:
    source = Source("linear", "a", 0, layout, repeat, block)
    assert source.rows(n, k).tolist() == rows
    s = tied(torch.arange(1.0, k + 1), source)
    w = {"a.weight": torch.ones(n, 3), "a.bias": torch.ones(n), "b.weight": torch.ones(5, k)}
    found = fold(w, Group(("b",), source), s)
    assert torch.equal(found["a.bias"][rows] * s, torch.ones(k))
    assert (found["a.bias"] != 1).sum() <= len(set(rows)) and torch.equal(found["b.weight"], s.expand(5, k))


def test_scalings_that_cannot_be() -> None:
    w = {"a.weight": torch.ones(2, 3), "b.weight": torch.ones(5, 4)}
    group = Group(("b",), Source("linear", "a", 0, "all", 2, 1))
    for s, error, text in (
        (torch.tensor([1.0, 2, 3, 3]), SpecError, "share each row"),
        (torch.tensor([1.0, 1, -3, -3]), SpecError, "above 0"),
        (torch.ones(3), SpecError, "cannot be scaled"),
    ):
        with pytest.raises(error, match=text):
            fold(w, group, s)
    with pytest.raises(UnsupportedError, match="b: nothing"):
        fold(w, Group(("b",)), torch.ones(4))
    with pytest.raises(SpecError, match="c: no weight"):
        fold(w, Group(("c",), group.source), torch.ones(4))


@pytest.mark.parametrize("model_type", ROTATED)
def test_rotated(model_type: str, tmp_path: Path) -> None:
    """The rotated source fills a model with the same logits, and every weight on the stream is another."""
    model = made(model_type, tie_word_embeddings=model_type in ("llama", "gemma", "granite", "qwen3_moe"))
    saved.save(model, tmp_path)
    wiring = observe(model.config)
    with codecs.open(tmp_path) as source, Rotated(source, wiring, seed=3, dtype=torch.float32) as rotated:
        assert rotated.value_q  # heads turn too
        ours = filled(rotated)
        assert twin.relative(saved.logits(ours), saved.logits(model)) < 2e-5
        assert rotated.config["tie_word_embeddings"] is False and "lm_head.weight" in rotated.dense
        assert rotated.path == source.path and not rotated.modules
        changed = [n for n in source.dense if n in rotated.dense and not torch.equal(rotated.read(n), source.read(n))]
        kept = sorted(set(source.dense) - set(changed))
    assert all(n.rpartition(".")[2] in ("bias", "sinks") or "norm" in n or "_b_proj" in n or n.endswith("_bias")
               for n in kept), kept  # fmt: skip
    plain = ours.get_submodule(f"{wiring.path}.0.input_layernorm").weight
    assert torch.equal(plain, torch.full_like(plain, float(model_type != "gemma")))


def filled(rotated: Rotated) -> Any:
    model = hf.build(hf.read_config(rotated.config), torch.float32)
    twin.fill(model, rotated)
    return model


def test_rotated_is_the_same_for_a_seed_and_in_the_stored_dtype(tmp_path: Path) -> None:
    model = made("llama", tie_word_embeddings=True).bfloat16()
    wiring = observe(saved.save(model, tmp_path) and model.config)
    name = "model.layers.1.mlp.down_proj.weight"
    with codecs.open(tmp_path) as source:
        first, again, other = (Rotated(source, wiring, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first.read(name), again.read(name)) and not torch.equal(first.read(name), other.read(name))
        for each in first.dense:
            info = first.dense[each]
            value = first.read(each)
            assert (info.dtype, tuple(info.shape)) == ("BF16", tuple(value.shape)) and value.dtype == torch.bfloat16
        wide = Rotated(source, wiring, dtype=torch.float32)
        info = wide.dense["lm_head.weight"]
        assert (info.name, info.dtype, info.nbytes) == ("lm_head.weight", "F32", 128 * 96 * 4)
        assert wide.read("lm_head.weight").dtype == torch.float32


def test_rotation_spreads_what_stands_out(tmp_path: Path) -> None:
    model = made("llama")
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.shape[-1] == 96:
            parameter.data[:, 7] *= 30
    saved.save(model, tmp_path)
    with codecs.open(tmp_path) as source:
        rotated = Rotated(source, observe(model.config))
        name = "model.layers.0.mlp.gate_proj.weight"
        before, after = (s.read(name).abs().amax(0) for s in (source, rotated))
        assert after.max() / after.median() < 3 < before.max() / before.median()


@pytest.mark.parametrize(("model_type", "reason"), [("gemma3_text", "post_attention_layernorm"), ("opt", "embedding")])
def test_not_rotated(model_type: str, reason: str, tmp_path: Path) -> None:
    model = made(model_type)
    saved.save(model, tmp_path)
    with codecs.open(tmp_path) as source, pytest.raises(UnsupportedError, match=reason):
        Rotated(source, observe(model.config))


def test_quantized_is_not_rotated() -> None:
    with codecs.open(gemma3()) as source:
        wiring = observe(made("llama").config)
        with pytest.raises(UnsupportedError, match="float weights are needed"):
            Rotated(source, wiring)


def test_load_is_what_it_was(tmp_path: Path) -> None:
    """The model that is rotated is the one that load gives."""
    model = made("qwen3")
    saved.save(model, tmp_path)
    with codecs.open(tmp_path) as source:
        rotated = filled(Rotated(source, observe(model.config)))
    assert twin.relative(saved.logits(rotated), saved.logits(load(tmp_path, dtype=torch.float32))) < 2e-5
