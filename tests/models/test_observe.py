"""What observation finds in architectures, what it refuses, and that it finds it in models of other sizes too."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fewbit.errors import UnsupportedError
from fewbit.models import hf, twin
from fewbit.models.observe import observe
from fewbit.models.observe_derive import made_of
from fewbit.models.observe_proof import Bench, proven
from fewbit.models.observe_taps import watch
from fewbit.models.observe_values import Group, LayerWiring, Refused, Source
from fewbit.models.observe_wiring import Wiring
from fewbit.models.shrink import shrink
from tests.models import saved

QKV, GLU = "q+k+v<-input_layernorm o<-v", "gate+up<-post_attention_layernorm down<-up"
QKV2 = f"{QKV}*2"
MOE = "experts.gate_up(gate)<-post_attention_layernorm experts.down<-experts.gate_up/last"
MLA = "q_a+kv_a_with_mqa<-input_layernorm q_b<-q_a_layernorm kv_b<-kv_a_layernorm o<-kv_b/grouped"
# The last layer of each type: what reads one tensor (and what else does) <- what makes it / which rows * how often each
# serves. Then the rotation: "values" also turns heads, "yes" only the stream, otherwise a word of the reason.
TYPES: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    ("llama", {}, f"{QKV2} {GLU}", "values"),
    ("mistral", {}, f"{QKV2} {GLU}", "values"),
    ("qwen2", {"num_key_value_heads": 8}, f"{QKV2} {GLU}", "values"),
    ("qwen3", {"num_key_value_heads": 8}, f"{QKV2} {GLU}", "values"),
    ("granite", {"num_key_value_heads": 8}, f"{QKV2} {GLU}", "values"),
    ("gemma", {"num_key_value_heads": 16}, f"{QKV} {GLU}", "values"),
    ("gemma2", {}, f"{QKV2} {GLU.replace('post_attention', 'pre_feedforward')}", "post_attention_layernorm"),
    ("gemma3_text", {}, f"{QKV2} {GLU.replace('post_attention', 'pre_feedforward')}", "post_attention_layernorm"),
    ("phi3", {"num_key_value_heads": 8}, "o<-qkv/last*2 qkv<-input_layernorm gate_up<-post_attention_layernorm "
     "down<-gate_up/last", "values"),
    ("glm4", {}, f"{QKV2} gate_up<-post_attention_layernorm down<-gate_up/last", "post_self_attn_layernorm"),
    ("olmo2", {}, "q+k+v<-None o<-v gate+up<-None down<-up", "post_attention_layernorm"),
    ("cohere2", {}, "q+k+v+gate+up<-input_layernorm o<-v down<-up", "subtracts the mean"),
    ("opt", {}, "k+v+q<-self_attn_layer_norm out<-v fc1<-final_layer_norm fc2<-fc1", "embedding"),
    ("gpt_neox", {}, "query_key_value<-input_layernorm dense<-query_key_value/grouped "
     "dense_h_to_4h<-post_attention_layernorm dense_4h_to_h<-None", "bias"),
    ("mixtral", {}, f"{QKV2} {MOE}", "values"),
    ("qwen3_moe", {}, f"{QKV2} {MOE}", "values"),
    ("gpt_oss", {}, f"{QKV2} experts.gate_up(router)<-post_attention_layernorm experts.down<-None", "values"),
    ("deepseek_v3", {}, f"{MLA} experts.gate_up+shared_experts.gate+shared_experts.up(gate)<-post_attention_layernorm "
     "shared_experts.down<-shared_experts.up experts.down<-experts.gate_up/last", "values"),
    ("gpt2", {}, "", "added to the embeddings"),
    ("falcon", {}, "", "bias"),
)  # fmt: skip
ODD = (
    "gemma3n_text",
    "mamba",
    "rwkv",
    "reformer",
    "bert",
    "llama4_text",
    "hrm_text",
    "lfm2",
    "olmo",
    "gptj",
    "openai-gpt",
)


def config(model_type: str, changes: dict[str, Any]) -> Any:
    return hf.read_config({"model_type": model_type, **saved.FULL.get(model_type, {}), **changes})


def told(layer: LayerWiring) -> str:
    return " ".join(told_group(group) for group in layer.groups)


def told_group(group: Group) -> str:
    s = group.source
    also = f"({'+'.join(map(short, group.also))})" if group.also else ""
    end = "None" if s is None else short(s.path)
    if s is not None and s.kind == "linear":
        end += (f"/{s.layout}" if s.layout != "all" else "") + (f"*{s.repeat}" if s.repeat > 1 else "")
    return f"{'+'.join(map(short, group.linears))}{also}<-{end}"


def short(path: str) -> str:
    head, _, leaf = path.rpartition(".")
    return f"{'.'.join(p for p in head.split('.')[1:])}.{leaf}".lstrip(".").replace("_proj", "")


@pytest.mark.parametrize(("model_type", "changes", "expected", "rotation"), TYPES, ids=[t[0] for t in TYPES])
def test_types(model_type: str, changes: dict[str, Any], expected: str, rotation: str) -> None:
    wiring = observe(config(model_type, changes))
    assert told(wiring.layers[-1]) == expected
    if rotation in ("values", "yes"):
        assert wiring.stream.reasons == () and wiring.stream.heads == (rotation == "values")
    else:
        assert any(rotation in reason for reason in wiring.stream.reasons), wiring.stream.reasons
    offsets = {g.source.offset for layer in wiring.layers for g in layer.groups if g.source and g.source.kind == "norm"}
    assert offsets <= {int(model_type.startswith("gemma"))}
    assert f"{model_type}: layers at {wiring.path}" in str(wiring)


@pytest.mark.parametrize("model_type", ODD)
def test_odd_types_do_not_raise(model_type: str) -> None:
    wiring = observe(config(model_type, {}))
    assert wiring.layers or wiring.refused
    assert len(wiring.for_model(shrink(config(model_type, {})))) == len(wiring.layers)
    assert all(str(refused) for refused in wiring.refused)


def test_no_config_at_all() -> None:
    wiring = observe(object())
    assert not wiring.layers and wiring.stream.reasons and wiring.refused


def test_known_once_and_leaves_no_trace() -> None:
    before = torch.get_rng_state()
    large = config("llama", {"hidden_size": 512, "intermediate_size": 1024})
    assert observe(large) is observe(config("llama", {}))
    assert torch.equal(before, torch.get_rng_state())


REAL: tuple[tuple[str, dict[str, Any], int, str, dict[str, Any]], ...] = (
    ("llama", {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 3}, 2,
     "self_attn.o_proj", {"repeat": 4, "block": 128, "head": 128}),
    ("gemma3_text", {"hidden_size": 640, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
                     "num_hidden_layers": 6}, 5, "self_attn.o_proj", {"repeat": 4, "block": 256}),
    ("phi3", {"hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 10, "num_hidden_layers": 2}, 1,
     "self_attn.o_proj", {"layout": "last", "repeat": 4, "block": 128}),
    ("deepseek_v3", {"num_hidden_layers": 5, "first_k_dense_replace": 3, "n_routed_experts": 8, "n_group": 2,
                     "topk_group": 1, "num_experts_per_tok": 2, "num_attention_heads": 16}, 4,
     "self_attn.o_proj", {"layout": "grouped", "repeat": 1, "block": 128, "head": 128}),
)  # fmt: skip


@pytest.mark.parametrize(("model_type", "changes", "index", "path", "expected"), REAL, ids=[r[0] for r in REAL])
def test_real_sizes(model_type: str, changes: dict[str, Any], index: int, path: str, expected: dict[str, Any]) -> None:
    asked = config(model_type, changes)
    layer = observe(asked).for_layer(index, asked)
    group = layer.group_of(path)
    assert layer.index == index and group is not None and group.source is not None
    assert {name: getattr(group.source, name) for name in expected} == expected


def test_dense_and_sparse_layers_are_told_apart() -> None:
    asked = config("deepseek_v3", REAL[3][1])
    layers = observe(asked).for_model(asked)
    assert [layer.group_of("mlp.down_proj") is not None for layer in layers] == [True] * 3 + [False] * 2
    with pytest.raises(UnsupportedError, match="layer 5"):
        observe(asked).for_layer(5, asked)


def test_a_layer_like_none_of_the_twin_has_groups_without_sources() -> None:
    asked = config("qwen3_moe", {"num_hidden_layers": 8, "mlp_only_layers": [7], "num_experts": 8})
    assert told(observe(asked).for_layer(7, asked)) == "q+k+v<-None o<-None"


def test_layers_that_disagree_keep_what_they_share() -> None:
    asked = config("llama", {})
    wiring = observe(asked)
    first, second = wiring.layers
    poorer = replace(second, groups=tuple(replace(g, source=None) for g in second.groups[:3]))
    mixed = Wiring(wiring.model_type, wiring.path, (first, poorer), wiring.stream)
    found = mixed.for_layer(0, asked)
    assert [g.linears for g in found.groups] == [g.linears for g in first.groups[:3]]
    assert all(g.source is None for g in found.groups)


def test_a_reader_left_out_is_noticed() -> None:
    """A norm cannot take a scaling that only some of its readers undo."""
    bench = made("llama")
    group = Group(("self_attn.q_proj", "self_attn.k_proj"), Source("norm", "input_layernorm"))
    found = proven(bench, 0, "model.layers.0", group)
    assert isinstance(found, Refused) and found.error is not None and found.error > 0.01
    group = Group(("self_attn.o_proj",), Source("linear", "self_attn.k_proj", 0, "all", 2, 16))
    assert isinstance(proven(bench, 0, "model.layers.0", group), Refused)


def test_a_clamp_between_two_linears_is_found_out() -> None:
    """Near zero it looks like nothing."""
    wiring = observe(config("deepseek_v4", {}))
    downs = [g for layer in wiring.layers for g in layer.groups if g.linears[0].endswith("down_proj")]
    assert downs and all(g.source is None for g in downs)
    assert any("down_proj" in r.what and r.error is not None and r.error > 0.01 for r in wiring.refused)


def test_what_has_no_effect_proves_nothing() -> None:
    bench = made("llama")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        bench.model.get_submodule(f"model.layers.1.{name}").weight.data.zero_()
    bench.wanted = bench.outputs()
    group = Group(("mlp.gate_proj", "mlp.up_proj"), Source("norm", "post_attention_layernorm"))
    found = proven(bench, 1, "model.layers.1", group)
    assert isinstance(found, Refused) and "proves nothing" in found.why


def made(model_type: str) -> Bench:
    small = shrink(config(model_type, {}))
    _, model = twin.filled(small, twin.require(small))
    ids = torch.randint(10, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    return Bench(model, "model.layers", ids)


def test_derivatives_agree_with_scaling() -> None:
    """What a channel is made of, by scaling one row at a time."""
    bench = made("llama")
    seen = watch(bench.model, bench.path, bench.ids)
    taps = {p: t for p, t in seen.taps.items() if p.startswith("model.layers.0.")}
    down, up = (taps[f"model.layers.0.mlp.{n}_proj"] for n in ("down", "up"))
    index = made_of(down.inputs[0], taps.values())["model.layers.0.mlp.up_proj"]
    before = down.inputs[0].detach()
    for row in (0, 17, 95):
        held = up.module.weight.data
        up.module.weight.data = held.clone()
        up.module.weight.data[row] *= 2
        after = watch(bench.model, bench.path, bench.ids).taps["model.layers.0.mlp.down_proj"].inputs[0].detach()
        up.module.weight.data = held
        moved = (after != before).flatten(0, 1).any(0).nonzero().flatten()
        assert torch.equal(moved, (index == row).nonzero().flatten())
        assert torch.allclose(after[..., moved], 2 * before[..., moved])
