"""Where tensors go: every tool's names, and every kind of conversion, plain and quantized."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit.errors import UnsupportedError
from fewbit.models import hf
from fewbit.models.account import finish
from fewbit.models.fill import Filler, prepare
from fewbit.models.placement import Placement, structure
from fewbit.models.twin import Memory
from fewbit.modules.linear import Options
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import Quantized
from fewbit.quant.reference import decode, encode
from tests.models import saved

CPU = torch.device("cpu")
GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize("folder", ["block_sparse_moe", "mlp"])
@pytest.mark.parametrize("names", [("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_expert_names_of_every_tool(model_type: str, folder: str, names: tuple[str, str, str]) -> None:
    if model_type == "qwen3_moe" and folder != "mlp":
        pytest.skip("no tool writes qwen3_moe that way")
    model = hf.build(saved.model(model_type).config, torch.float32)
    gate, up, down = (f"model.layers.0.{folder}.experts.3.{name}.weight" for name in names)
    router = f"model.layers.0.{folder}.gate.weight"
    found = hf.placements(model, [gate, up, down, router, "model.layers.0.nothing.weight"])
    assert found[gate] == Placement((GATE_UP,), 3, 0, 2)
    assert found[up] == Placement((GATE_UP,), 3, 1, 2)
    assert found[down] == Placement((DOWN,), 3)
    assert found[router] == Placement(("model.layers.0.mlp.gate.weight",))
    assert found["model.layers.0.nothing.weight"] is None


def test_stacked_and_prefixed_names() -> None:
    model = hf.build(saved.model("gpt_oss").config, torch.float32)
    found = hf.placements(model, [GATE_UP, "layers.0.mlp.experts.down_proj_bias", "lm_head.weight"])
    assert [p and p.target for p in found.values()] == [f"{DOWN}_bias", "lm_head.weight", GATE_UP]


def op(name: str, **values: Any) -> Any:
    return type(name, (), values)()


@pytest.mark.parametrize(
    ("ops", "targets", "want"),
    [
        ([op("MergeModulelist", dim=0)], 1, Placement(("a",), 5)),
        ([op("MergeModulelist", dim=0), op("Concatenate", dim=1)], 1, Placement(("a",), 5, 1, 2)),
        ([op("Concatenate", dim=0)], 1, Placement(("a",), None, 1, 2)),
        ([op("Chunk", dim=0)], 3, Placement(("a", "a", "a"))),
        ([op("Split", dim=1)], 2, Placement(("a", "a"), axis=1)),
        ([op("Transpose", dim0=1, dim1=2, check_dims=False)], 1, Placement(("a",), swap=(1, 2))),
        ([op("Transpose", dim0=1, dim1=2, check_dims=True)], 1, None),
        ([op("Concatenate", dim=0, num_shards_attribute="n")], 1, None),
        ([op("PermuteForRope")], 1, None),
        ([op("Interleave", dim=0), op("Chunk", dim=0)], 2, None),
    ],
)
def test_structure(ops: list[Any], targets: int, want: Placement | None) -> None:
    several = want is not None and want.parts > 1
    assert structure(ops, ("a",) * targets, int(several), 1 + several, 5) == want


def fill(model: Any, tensors: dict[str, Tensor], modules: dict[str, Quantized]) -> Any:
    """A model from tensors in memory, some of them quantized."""
    source = Memory(tensors, {n: SimpleNamespace(shape=q.weight.shape) for n, q in modules.items()})
    read = source.read
    filler = Filler(model, hf.rules(model), Options(), CPU)
    prepare(model)
    mixed = SimpleNamespace(
        modules=source.modules, dense=source.dense, read=lambda name: modules[name] if name in modules else read(name)
    )
    finish(filler, filler.fill(mixed), mixed)
    return model


def quantized(w: Tensor, name: str = "int4-g32") -> Quantized:
    return Quantized(FORMATS[name], encode(w, FORMATS[name].weight))


def test_one_quantized_tensor_cut_in_four() -> None:
    theirs = saved.model("hrm_text")
    state = hf.disk_state(theirs)
    cut = {n.removesuffix(".weight"): quantized(state.pop(n)) for n in list(state) if n.endswith("gqkv_proj.weight")}
    assert cut
    ours = fill(hf.build(theirs.config, torch.float32), state, cut)
    plain = hf.disk_state(theirs) | {f"{n}.weight": decode(q.weight) for n, q in cut.items()}
    want = fill(hf.build(theirs.config, torch.float32), plain, {})
    torch.testing.assert_close(saved.logits(ours), saved.logits(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_quantized_embedding(tied: bool) -> None:
    theirs = saved.model("gemma3_text", tie_word_embeddings=tied)
    state = hf.disk_state(theirs)
    table = quantized(state.pop("model.embed_tokens.weight"), "int8-channel")
    ours = fill(hf.build(theirs.config, torch.float32), state, {"model.embed_tokens": table})
    theirs.model.embed_tokens.weight.data = decode(table.weight)
    torch.testing.assert_close(saved.logits(ours), saved.logits(theirs), rtol=1e-4, atol=1e-4)
    assert not any("embed" in name for name, _ in ours.named_parameters())


def test_quantized_conv1d_is_decoded() -> None:
    theirs = saved.model("gpt2")
    state = hf.disk_state(theirs)
    name = "transformer.h.0.mlp.c_fc"
    q = quantized(state.pop(f"{name}.weight").T.contiguous())
    ours = fill(hf.build(theirs.config, torch.float32), state, {name: q})
    theirs.transformer.h[0].mlp.c_fc.weight.data = decode(q.weight).T.contiguous()
    torch.testing.assert_close(saved.logits(ours), saved.logits(theirs), rtol=1e-4, atol=1e-5)


def test_experts_held_in_another_way_are_refused_by_name() -> None:
    theirs = saved.model("llama4_text")
    state = hf.disk_state(theirs)
    name = next(n for n in state if "experts.gate_up_proj" in n)
    q = quantized(state.pop(name).mT.contiguous())
    with pytest.raises(UnsupportedError, match="Llama4TextExperts"):
        fill(hf.build(theirs.config, torch.float32), state, {name: q})


def test_half_quantized_experts_are_refused() -> None:
    theirs = saved.model("qwen3_moe")
    state = hf.disk_state(theirs)
    name = "model.layers.0.mlp.experts.1.up_proj"
    q = quantized(state.pop(f"{name}.weight"))
    with pytest.raises(UnsupportedError, match="is quantized on disk, and part is not"):
        fill(hf.build(theirs.config, torch.float32), state, {name: q})


def test_what_structure_cannot_say_runs_transformers_own_operation() -> None:
    """A converter with an operation of its own: gathered, converted, and refused where activations are rounded."""
    theirs = saved.model("llama")
    model = hf.build(theirs.config, torch.float32)
    rules = hf.rules(model)
    rules.converters.append(_interleaved())  # type: ignore[attr-defined]
    state = hf.disk_state(theirs)
    up, gate = (f"model.layers.0.mlp.{n}_proj.weight" for n in ("up", "gate"))
    both = torch.stack([state.pop(gate), state.pop(up)], 1).flatten(0, 1)
    state["model.layers.0.mlp.joined.weight"] = both
    filler = Filler(model, rules, Options(), CPU)
    source = Memory(state)
    finish(filler, filler.fill(source), source)
    torch.testing.assert_close(saved.logits(model), saved.logits(theirs), rtol=1e-4, atol=1e-5)


def _interleaved() -> Any:
    from transformers.core_model_loading import Chunk, Interleave, WeightConverter

    targets = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    return WeightConverter("mlp.joined.weight", targets, [Interleave(dim=0), Chunk(dim=0)])
