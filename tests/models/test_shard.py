"""Shards of a model, run as ranks of one process: their logits are the whole model's, whatever the weights are in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit.errors import UnsupportedError
from fewbit.models import hf, twin
from fewbit.models.build import load
from fewbit.models.shard import cache_scale
from fewbit.models.shard_look import Tried, look
from fewbit.models.shard_plan import Piece, even, nearest, plan, rows_of
from fewbit.models.shard_proof import Meeting, Simulated, proven, together
from fewbit.models.shard_source import SHARDS
from fewbit.models.shard_take import take
from fewbit.models.shard_values import Block, Cut, Stack, chained, merged
from fewbit.models.shrink import shrink
from fewbit.modules.embedding import Embedding
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import Quantized, Transform
from fewbit.quant.reference import decode, encode
from fewbit.quant.spec import Format
from tests.models import saved

FIXTURES = Path(__file__).parents[2] / ".." / "shared" / "fixtures"
CLOSE = 1e-5


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(model_type: str, **changes: Any) -> Any:
    return hf.read_config({"model_type": model_type, **saved.FULL.get(model_type, {}), **changes})


# what a layer's readers are made of: (units of so many channels, rows of the first unit by maker)
SEEN: dict[str, dict[str, tuple[int, int, dict[str, Any]]]] = {
    "llama": {
        "self_attn.o_proj": (4, 16, {"q_proj": ((0, 16),), "k_proj": ((0, 16),), "v_proj": ((0, 16),)}),
        "mlp.down_proj": (12, 8, {"gate_proj": ((0, 8),), "up_proj": ((0, 8),)}),
    },
    "phi3": {
        "self_attn.o_proj": (4, 16, {"qkv_proj": ((0, 16), (64, 80), (128, 144))}),
        "mlp.down_proj": (12, 8, {"gate_up_proj": ((0, 8), (96, 104))}),
    },
    "gpt_oss": {
        "self_attn.o_proj": (4, 16, {"q_proj": ((0, 16),), "k_proj": ((0, 16),), "v_proj": ((0, 16),)}),
        "mlp.experts.down_proj": (12, 8, {"gate_up_proj": ((0, 16),)}),
    },
    "gpt_neox": {
        "attention.dense": (4, 16, {"query_key_value": ((0, 48),)}),
        "mlp.dense_4h_to_h": (12, 8, {"dense_h_to_4h": ((0, 8),)}),
    },
    "gpt2": {},
}


@pytest.mark.parametrize("model_type", SEEN)
def test_what_makes_what_is_seen(model_type: str) -> None:
    found = look(shrink(config(model_type)), hf.OURS)
    blocks = {b.reader: b for b in found.layers[0] if isinstance(b, Block)}
    told = {
        name: (b.units, b.unit, {p.rpartition(".")[2]: runs[0] for p, runs in b.makers.items()})
        for name, b in blocks.items()
    }
    assert told == SEEN[model_type]
    sinks = [runs for b in blocks.values() for runs in b.params.values()]
    assert sinks == ([tuple(((h, h + 1),) for h in range(4))] if model_type == "gpt_oss" else [])


@pytest.mark.parametrize("units", [2, 3, 5, 16])
def test_digits_of_units_tell_what_one_by_one_does(units: int) -> None:
    """Where nothing is shared; else they say that something is."""
    a, b, shared = (torch.randn(4, units * 6, requires_grad=True) for _ in range(3))
    every = torch.randn(6, requires_grad=True)
    x = (a * b).unflatten(-1, (units, 6)).flip(1).flatten(1)[..., : units * 6 - 2]
    tried = Tried(x, {"a": a, "b": b})
    told = tried.apart(6)
    assert len(told) == units
    for one, other in zip(told, tried.one_by_one(6), strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    half = shared.unflatten(-1, (units, 6))[:, : -(-units // 2)].repeat_interleave(2, 1)[:, :units].flatten(1)
    for more in (half, every.repeat(units)):
        leaves = {"a": a, "shared": shared} if more is half else {"a": a, "every": every}
        both = Tried(a * more, leaves)
        assert both.apart(6) == [] and len(both.one_by_one(6)) == units


def test_real_sizes_are_seen_without_weights() -> None:
    sizes = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 4}
    found = look(config("llama", **sizes, head_dim=64, intermediate_size=5632), hf.OURS)
    attention, mlp = found.layers[23]
    assert isinstance(attention, Block) and isinstance(mlp, Block)
    assert (attention.units, attention.unit, len(set(attention.makers["self_attn.k_proj"]))) == (32, 64, 4)
    assert (mlp.units, mlp.unit) == (88, 64) and found.head == "lm_head"


PROVEN: dict[str, tuple[set[str], str]] = {
    "llama": ({"self_attn.o_proj", "mlp.down_proj"}, ""),
    "qwen3_moe": ({"self_attn.o_proj", "mlp.experts", "mlp.experts.down_proj"}, ""),
    "deepseek_v3": ({"self_attn.o_proj", "mlp.down_proj", "mlp.experts", "mlp.experts.down_proj",
                     "mlp.shared_experts.down_proj"}, ""),
    "opt": ({"self_attn.out_proj", "fc2"}, "heads"),
    "phi3": ({"self_attn.o_proj", "mlp.down_proj"}, "config"),
    "olmo2": ({"mlp.down_proj"}, ""),  # norms over all heads
    "bloom": ({"mlp.dense_4h_to_h"}, ""),  # its positions are of all heads: attention stays whole
}  # fmt: skip


@pytest.mark.parametrize("model_type", PROVEN)
def test_the_twin_decides(model_type: str) -> None:
    found = proven(config(model_type), 2)
    assert (set(found.chosen.names), found.chosen.patch) == PROVEN[model_type]
    assert found.chosen.head
    assert bool(found.reasons) == (model_type in ("bloom", "olmo2"))


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="tensor_parallel_size=2: nothing of model_type 'gpt2'"):
        proven(config("gpt2"), 2)


def test_a_wrong_cut_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.models import shard_proof

    monkeypatch.setattr(shard_proof, "_PROVEN", {})
    monkeypatch.setattr(Simulated, "reduce", lambda self, x: self._all(x)[0])  # forgets the other ranks
    with pytest.raises(UnsupportedError, match="logits differ by"):
        proven(config("llama"), 2)


def shards(path: Path, size: int, **options: Any) -> tuple[Sequence[Any], torch.Tensor, torch.Tensor]:
    """-> every rank's model, their logits, the whole model's."""
    whole = load(path, dtype=torch.float32, **options)
    meeting = Meeting(size)
    models = [load(path, dtype=torch.float32, ranks=Simulated(r, size, meeting), **options) for r in range(size)]
    got = together(models, meeting, saved.logits)
    assert all(torch.equal(g, got[0]) for g in got)
    return models, got[0], saved.logits(whole)


def held(model: Any) -> dict[str, tuple[int, ...]]:
    return {path: cut.runs for path, cut in getattr(model, SHARDS).cuts.items() if ".0." in path}


CASES: list[tuple[str, int, str | None, dict[str, Any]]] = [
    ("llama", 2, None, {}),
    ("llama", 3, None, {}),  # four heads on three ranks, the two of keys on one or two of them
    ("llama", 4, None, {}),  # more ranks than heads of keys
    ("llama", 3, "int4-g32", {}),
    ("llama", 2, "nvfp4", {}),  # with a scale of whole rows, chosen at each call
    ("llama", 2, "fp8-tensor", {}),
    ("phi3", 2, "int8-channel", {}),
    ("gpt_oss", 2, "mxfp4", {}),
    ("mixtral", 2, "int4-g32", {}),
    ("mixtral", 4, "int4-g32", {}),  # three groups of channels: whole experts
    ("qwen3_moe", 3, None, {}),
    ("deepseek_v3", 2, "int4-g32", {}),
    ("opt", 2, None, {}),
    ("gemma3_text", 2, None, {}),  # a head that shares the embedding's memory
]


@pytest.mark.parametrize(("model_type", "size", "form", "changes"), CASES)
def test_shards_are_the_whole(
    model_type: str, size: int, form: str | None, changes: dict[str, Any], tmp_path: Path
) -> None:
    saved.save(saved.model(model_type, **changes), tmp_path)
    models, got, want = shards(tmp_path, size, format=form)
    assert twin.relative(got, want) < CLOSE
    assert len(getattr(models[0], SHARDS).cuts) > 1
    if model_type == "mixtral":
        kinds = {p: c.kind for p, c in getattr(models[0], SHARDS).cuts.items() if ".0.mlp." in p}
        assert set(kinds.values()) == ({"experts"} if size == 4 else {"rows", "columns"})


DISK = [
    "gptq-w4-g128-sym-descact-llama", "ct-w4a16-g128-sym-gptq-actorder-weight-qwen2", "gptq-w3-g128-sym-llama",
    "fp8-deepseek-block-llama", "ct-nvfp4-llama", "modelopt-nvfp4-qwen3moe", "gptq-w4-g128-mixtral",
    "ct-fp8-dynamic-kvfp8-qwen2", "modelopt-mixed-fp8-nvfp4-auto-llama", "modelopt-int4-awq-llama",
]  # fmt: skip


@pytest.mark.parametrize("name", DISK)
def test_checkpoints_on_disk(name: str) -> None:
    folder = FIXTURES / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    models, got, want = shards(folder, 2)
    assert twin.relative(got, want) < CLOSE
    assert any(cut.kind == "columns" for cut in getattr(models[0], SHARDS).cuts.values())


def bytes_of(model: Any) -> int:
    """Of the layers: what is cut, wherever it lies."""
    seen: dict[int, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, Embedding | torch.nn.Embedding) or path == "lm_head":
            continue
        tensors = [p for p in module._parameters.values() if p is not None]
        parts = getattr(module, "parts", ())
        for part in parts if isinstance(parts, tuple) else [p for each in parts.values() for p in each]:
            tensors += part.quantized.weight.planes.values()
        seen |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(seen.values())


@pytest.mark.parametrize("form", [None, "int4-g32"])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "mixtral"])
def test_only_the_part_stays_in_memory(model_type: str, form: str | None, tmp_path: Path) -> None:
    saved.save(saved.model(model_type), tmp_path)
    models, _, _ = shards(tmp_path, 2, format=form, activations="off")
    whole = bytes_of(load(tmp_path, dtype=torch.float32, format=form, activations="off"))
    assert max(bytes_of(model) for model in models) < 0.7 * whole


PIECE = Piece(0, 256, 4736, FORMATS["int4-g128"])  # 37 groups of columns
MLP = Block("down", 64, 74, {"up": tuple(((64 * u, 64 * u + 64),) for u in range(74))}, {})
HEADS = Block("o", 64, 8, {"q": tuple(((64 * u, 64 * u + 64),) for u in range(8)),
                           "k": tuple(((64 * (u // 4), 64 * (u // 4) + 64),) for u in range(8))}, {})  # fmt: skip


def columns(block: Block, size: int, stored: Any = lambda path: ()) -> list[Any]:
    return [share.cuts[block.reader].runs[0] if share.cuts else None for share in plan([block], stored, size)]


def test_groups_are_not_cut() -> None:
    found = columns(MLP, 4, lambda path: (PIECE,) if path == "down" else ())
    assert [stop - start for start, stop in found] == [1152, 1280, 1152, 1152]
    assert all(start % 128 == 0 for start, _ in found) and found[-1][1] == 4736
    block = Piece(0, 4736, 256, FORMATS["fp8-block"])
    found = columns(MLP, 2, lambda path: (block,) if path == "up" else ())
    assert found[0][1] % 128 == 0
    low = Piece(0, 256, 4736, Format(FORMATS["int4-g128"].weight, None, ("low_rank",)))
    assert columns(MLP, 2, lambda path: (low,) if path == "down" else ()) == [None, None]


def test_heads_share_keys() -> None:
    keys = [plan([HEADS], lambda path: (), n) for n in (2, 4, 3)]
    assert [share.cuts["k"].runs for share in keys[0]] == [((0, 64),), ((64, 128),)]
    assert [share.cuts["k"].runs for share in keys[1]] == [((0, 64),)] * 2 + [((64, 128),)] * 2
    assert [share.cuts["q"].runs for share in keys[2]] == [((0, 192),), ((192, 320),), ((320, 512),)]
    assert [share.cuts["k"].runs for share in keys[2]] == [((0, 64),), ((0, 128),), ((64, 128),)]
    assert rows_of([((0, 2),), ((0, 2),), ((2, 4),)], shared=True) == ((0, 2), (0, 4))  # once for each head
    assert columns(HEADS, 9) == [None] * 9


def test_whole_experts_where_slices_do_not_fit() -> None:
    rows = tuple(((64 * u, 64 * u + 64),) for u in range(4))
    items = [Stack("experts", 6), Block("experts.down", 64, 4, {"experts.up": rows}, {}, stack=True)]
    assert [set(share.cuts) for share in plan(items, lambda path: (), 2)] == [{"experts.down", "experts.up"}] * 2
    shares = plan(items, lambda path: (), 3)  # 2, 1 and 1 of four: too uneven
    assert [share.cuts["experts"].runs for share in shares] == [((0, 2),), ((2, 4),), ((4, 6),)]
    assert plan(items, lambda path: (), 7)[0].cuts == {}


def test_small_sums() -> None:
    assert nearest([1, 2, 3], 4, 2) == (2,) and nearest([1, 3], 4, 2) == (3,) and nearest([1], 4, 3) is None
    assert nearest([1, 2], 9, 3) == (1, 2) and nearest([7, 8], 9, 3) == (7, 8)
    assert even(7, 3) == [(0, 3), (3, 5), (5, 7)] and even(2, 2) == [(0, 1), (1, 2)]
    assert merged([(4, 6), (0, 2), (2, 4), (0, 2)]) == ((0, 6),) and chained([(4, 6), (0, 2), (2, 4)]) == (
        (4, 6),
        (0, 4),
    )


@pytest.mark.parametrize("form", ["int4-g32", "fp8-tensor", "nvfp4", "mxfp8", "int8-channel"])
def test_rows_of_parts(form: str) -> None:
    """Runs in any order, across parts, some twice."""
    torch.manual_seed(0)
    each = [Quantized(FORMATS[form], encode(torch.randn(n, 64), FORMATS[form].weight)) for n in (32, 64)]
    runs = ((16, 48), (80, 96), (0, 16), (0, 16))
    found = take(each, Cut("rows", runs))
    whole = torch.cat([decode(q.weight) for q in each])
    want = torch.cat([whole[a:b] for a, b in runs])
    assert torch.equal(torch.cat([decode(q.weight) for q in found]), want)


def test_a_branch_beside_the_codes() -> None:
    spec = FORMATS["int4-g32"].weight
    low = Transform("low_rank", {"a": torch.randn(4, 64), "b": torch.randn(32, 4)})
    q = Quantized(Format(spec, None, ("low_rank",)), encode(torch.randn(32, 64), spec), {}, (low,))
    (found,) = take([q], Cut("rows", ((16, 32),)))
    assert torch.equal(found.transforms[0].tensors["b"], low.tensors["b"][16:])
    assert torch.equal(found.transforms[0].tensors["a"], low.tensors["a"])
    with pytest.raises(UnsupportedError, match="low_rank"):
        take([q], Cut("columns", ((0, 32),)))


def test_scales_of_the_cache_follow_their_heads() -> None:
    (_, second) = plan([HEADS], lambda path: (), 2)
    scales = torch.arange(2.0).reshape(2, 1, 1)
    assert cache_scale(scales, second.heads["o"], "o").flatten().tolist() == [1.0]
    assert cache_scale(scales[:1, 0], second.heads["o"], "o").shape == (1, 1)
    with pytest.raises(UnsupportedError, match="3 KV scales"):
        cache_scale(torch.ones(3, 1, 1), second.heads["o"], "o")
