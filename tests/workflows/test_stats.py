"""Watcher: statistics against float64, inputs shared by identity, experts, ranges, keys and values, coverage."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbit import codecs
from fewbit.algos.algo import Stats
from fewbit.errors import RequestError, SpecError, UnsupportedError
from fewbit.models.build import load
from fewbit.modules.linear import Linear
from fewbit.quant.elements import E2M1, E4M3, ELEMENTS, F32, INT8
from fewbit.quant.formats import FORMATS, TENSOR_FP8
from fewbit.quant.qtensor import Quantized
from fewbit.quant.reference import encode, fake_quant
from fewbit.quant.spec import Format, QuantSpec, Scale, spec
from fewbit.workflows import stats_gather
from fewbit.workflows.stats import Watcher, all_tokens
from fewbit.workflows.stats_coverage import check_experts, combine, cover, expert_tokens
from fewbit.workflows.stats_gather import Gather, Spread
from fewbit.workflows.stats_range import kv_scales, observe_range, static_planes
from tests.codecs.roundtrip import back_again
from tests.models import saved
from tests.tiny import llama

LAYER = "model.layers.0."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return load(llama(tmp_path_factory.mktemp("stats")))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return load(saved.save(saved.model("qwen3_moe"), tmp_path_factory.mktemp("moe")), dtype=torch.float32)


def batches(count: int = 3, tokens: int = 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(10, 90, (2, tokens), generator=generator) for _ in range(count)]


def run(model: nn.Module, ids: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(x).logits for x in ids]


def inputs(model: nn.Module, path: str, ids: list[Tensor]) -> Tensor:
    """What one linear reads, by a hook of the test's own: [tokens, K] float64."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    run(model, ids)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])


def check(stats: Stats, x: Tensor, rtol: float = 3e-6) -> None:
    assert stats.tokens == len(x)
    assert torch.equal(stats.amax, x.abs().amax(0).float())
    torch.testing.assert_close(stats.mean.double(), x.abs().mean(0), rtol=rtol, atol=0)
    torch.testing.assert_close(stats.square.double(), x.square().mean(0), rtol=rtol, atol=0)
    if stats.hessian is not None:
        want = x.T @ x / len(x)
        assert torch.equal(stats.hessian, stats.hessian.T)
        scale = want.diagonal().sqrt()
        assert bool(((stats.hessian - want).abs() <= rtol * scale[:, None] * scale).all())
    if stats.sample is not None:
        rows = {tuple(row) for row in x.float().tolist()}
        assert {tuple(row) for row in stats.sample.tolist()} <= rows


def test_stats_of_every_linear(model: nn.Module) -> None:
    with Watcher(model, needs=("hessian", "sample"), rows=16) as watcher:
        run(model, batches())
        groups = watcher.groups
    assert not watcher.unseen and len(groups) == 2 * 4 + 1
    for group in groups[:4] + groups[-1:]:
        check(group.stats, inputs(model, group.paths[-1].removesuffix(".weight"), batches()))
        assert group.stats.sample is not None and len(group.stats.sample) == 16


def test_linears_of_one_input_are_one_group(model: nn.Module) -> None:
    with Watcher(model.get_submodule("model.layers.1")) as watcher:
        run(model, batches())
    assert [sorted(path.split(".")[1] for path in group.paths) for group in watcher.groups] == [
        ["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]
    ]  # fmt: skip


def test_only_what_is_wanted(model: nn.Module) -> None:
    wanted = {LAYER + "self_attn.v_proj.weight", LAYER + "mlp.down_proj.weight"}
    for asked in (wanted, lambda path: path in wanted):
        with Watcher(model, asked) as watcher:
            assert sorted(watcher.unseen) == sorted(wanted)
            run(model, batches())
        assert {path for group in watcher.groups for path in group.paths} == wanted
        assert all(group.stats.hessian is None and group.stats.sample is None for group in watcher.groups)


def test_nothing_is_left_behind_or_changed(model: nn.Module) -> None:
    before = run(model, batches(1))[0]
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    with Watcher(model, needs=("hessian",), kv=True, histogram=True), pytest.raises(RequestError, match="already"):
        assert torch.equal(run(model, batches(1))[0], before)
        Watcher(model, kv=True)
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not any(name.startswith("fewbit_watch") for m in model.modules() for name in vars(m))


def test_deterministic_and_blind_to_how_batches_are_cut(model: nn.Module) -> None:
    ids = batches(4)
    cuts = [ids, ids, [torch.cat(ids[:2]), torch.cat(ids[2:])]]
    found = []
    for cut in cuts:
        with Watcher(model, lambda p: p.startswith(LAYER), needs=("hessian", "sample"), rows=32) as watcher:
            run(model, cut)
        found.append([group.stats for group in watcher.groups])
    for a, b, c in zip(*found, strict=True):
        assert torch.equal(a.hessian, b.hessian) and torch.equal(a.sample, b.sample)
        assert a.tokens == c.tokens and a.sample.shape == c.sample.shape
        torch.testing.assert_close(a.hessian, c.hessian, rtol=1e-2, atol=1e-3)


class Odd(nn.Module):
    """Linears that are called in ways that could be mistaken for sharing."""

    def __init__(self, way: str):
        super().__init__()
        self.a, self.b = (Linear.of(nn.Linear(8, 8, bias=False)) for _ in range(2))
        self.way, self.turn = way, 0

    def forward(self, x: Tensor) -> None:
        self.turn += 1
        if self.way == "reused memory":
            self.a(x + 1)
            self.b(x + 2)
        elif self.way == "in place":
            self.a(x)
            self.b(x.mul_(2))
        elif self.way == "views":
            self.a(x.view(-1, 8))
            self.b(x.view(-1, 8))
        elif self.way == "late":
            self.a(x)
            if self.turn > 1:
                self.b(x)
        elif self.way == "apart":
            self.a(x)
            self.b(x if self.turn == 1 else x + 1)
        elif self.way == "missing":
            self.a(x)
            if self.turn == 1:
                self.b(x)


@pytest.mark.parametrize(
    ("way", "groups"), [("reused memory", 2), ("in place", 2), ("views", 1), ("late", 2), ("apart", 0), ("missing", 0)]
)
def test_sharing_is_by_identity(way: str, groups: int) -> None:
    module = Odd(way)
    with torch.no_grad(), Watcher(module) as watcher:
        if groups:
            for _ in range(3):
                module(torch.randn(2, 5, 8))
            assert len(watcher.groups) == groups
            return
        with pytest.raises(UnsupportedError, match=r"b\.weight reads the same input as a\.weight in one batch"):
            for _ in range(3):
                module(torch.randn(2, 5, 8))
            watcher.groups  # noqa: B018


def gathered(x: Tensor, sizes: list[int], **kept: Any) -> Gather:
    gather = Gather("x", x.shape[1], x.device, frozenset(kept.pop("needs", ("hessian", "sample"))), **kept)
    for part in x.split(sizes):
        gather.add(part)
    return gather


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [96, 576])
def test_hessian_is_float32_whatever_the_dtype(dtype: torch.dtype, columns: int) -> None:
    x = torch.randn(5000, columns, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, columns)
    gather = gathered(x.to(dtype), [3, 1200, 7, 600, 3190], rows=100)
    check(gather.stats(), x.to(dtype).double())
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_a_sample_is_even_over_batches_and_positions() -> None:
    length, rows = 512, 2048
    x = torch.arange(256 * length, dtype=torch.float32)[:, None]
    for sizes in ([length] * 256, [1000] * 131 + [72], [256 * length]):
        sample = gathered(x, sizes, needs=("sample",), rows=rows).stats().sample
        assert sample is not None and sample.shape == (rows, 1)
        batch = torch.bincount(sample[:, 0].long() // length, minlength=256)
        position = torch.bincount(sample[:, 0].long() % length, minlength=length)
        assert batch.min() >= 6 and batch.max() <= 10 and position.max() <= 16 and bool((sample.diff(dim=0) > 0).all())
    first = gathered(x, [77] * 1000 + [54072], needs=("sample",), rows=rows).stats().sample
    assert first is not None and torch.equal(first, sample)


def test_values_that_are_not_finite() -> None:
    x = torch.randn(10, 4)
    x[3, 2] = torch.inf
    with pytest.raises(UnsupportedError, match="1 channels of its input hold NaN or Inf"):
        gathered(x, [10]).stats()
    with pytest.raises(SpecError, match="statistics moment are not known; known: moments, hessian, sample"):
        Gather("x", 4, torch.device("cpu"), frozenset(["moment"]))  # type: ignore[list-item]


def test_without_instructions_for_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats_gather, "multiplies_bf16", lambda: False)
    x = torch.randn(700, 64).bfloat16()
    gather = gathered(x, [700])
    check(gather.stats(), x.double())
    with pytest.raises(RequestError, match="were read before the last batch"):
        gather.add(x)


# --- experts


def keep(args: tuple[Tensor, ...], held: tuple[list[Tensor], list[Tensor]]) -> None:
    held[0].append(args[0].double())
    held[1].append(args[1])


def routes(model: nn.Module, ids: list[Tensor]) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """What the stacks of experts are called with."""
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    handles = []
    for path, module in model.named_modules():
        if path.endswith("mlp.experts"):
            held = seen.setdefault(path, ([], []))
            handles.append(module.register_forward_pre_hook(lambda _, args, held=held: keep(args, held)))
    run(model, ids)
    for handle in handles:
        handle.remove()
    return seen


def test_experts_by_their_own_tokens(moe: nn.Module) -> None:
    with Watcher(moe, needs=("hessian",)) as watcher:
        run(moe, batches())
    seen = routes(moe, batches())
    assert watcher.routed.keys() == seen.keys() and seen
    for path, (hidden, index) in seen.items():
        x, chosen = torch.cat(hidden), torch.cat(index)
        assert int(watcher.routed[path].sum()) == chosen.numel()
        experts = {g.expert: g for g in watcher.groups if g.paths == (f"{path}.gate_up_proj",)}
        downs = {g.expert: g for g in watcher.groups if g.paths == (f"{path}.down_proj",)}
        for e in range(len(watcher.routed[path])):
            rows = x[(chosen == e).any(-1)]
            assert int(watcher.routed[path][e]) == len(rows)
            if len(rows):
                check(experts[e].stats, rows)
                assert downs[e].stats.tokens == len(rows)
            else:
                assert e not in experts


def test_all_tokens_changes_statistics_alone(moe: nn.Module) -> None:
    before = run(moe, batches())
    seen = routes(moe, batches())
    with Watcher(moe, experts=(1, 3)) as watcher, all_tokens(watcher):
        after = run(moe, batches())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for path, (hidden, index) in seen.items():
        groups = [g for g in watcher.groups if g.paths == (f"{path}.gate_up_proj",)]
        assert [g.expert for g in groups] == [1, 3]
        for group in groups:
            check(group.stats, torch.cat(hidden))
        chosen = torch.cat(index).flatten()
        assert torch.equal(watcher.routed[path], torch.bincount(chosen, minlength=len(watcher.routed[path])))
    downs = [g for g in watcher.groups if g.paths[0].endswith("down_proj") and g.expert is not None]
    assert downs and all(g.stats.tokens == 120 for g in downs)


def test_policy_for_experts() -> None:
    counts = {"a.experts": torch.tensor([5, 0, 9]), "b.experts": [7, 7, 7]}
    for policy in ("weights-only", "all-tokens"):
        assert check_experts(counts, 6, policy) == {"a.experts": (0, 1)}  # type: ignore[arg-type]
    assert check_experts(counts, 0) == {}
    with pytest.raises(RequestError, match=r"a\.experts: experts saw fewer than 6 tokens: 0 \(5\), 1 \(0\);"):
        check_experts(counts, 6)
    with pytest.raises(SpecError, match="known: error, weights-only, all-tokens"):
        check_experts(counts, 6, "none")  # type: ignore[arg-type]


def test_coverage(moe: nn.Module) -> None:
    with Watcher(moe) as watcher:
        run(moe, batches())
    layer = cover(watcher, watcher.groups, least=10**6, prefix="p.")
    assert layer.starved == {path: tuple(range(len(of))) for path, of in layer.experts.items()}
    assert {path.removeprefix("p."): of for path, of in layer.experts.items()} == expert_tokens(watcher)
    ids = [x for batch in batches() for x in batch]
    total = combine([*ids, ids[0][:5]], [layer, layer])
    assert (total.tokens, total.lengths) == (125, {5: 1, 20: 6})
    assert total.experts == layer.experts and total.channels == 2 * layer.channels and not total.inactive


def test_channels_and_listed_experts_that_are_never_active() -> None:
    module = nn.ModuleDict({"experts": nn.ModuleList(Linear.of(nn.Linear(4, 4)) for _ in range(3))})
    names = [f"experts.{e}.weight" for e in range(3)]
    with torch.no_grad(), Watcher(module) as watcher:
        for e, n in ((0, 5), (2, 2)):
            module["experts"][e](torch.tensor([1.0, 0.0, -1.0, 0.0]).expand(n, 4))
    found = cover(watcher, watcher.groups, least=3)
    assert found.experts == {"experts": (5, 0, 2)} and found.starved == {"experts": (1, 2)}
    assert found.inactive == {names[0]: 2, names[2]: 2} and watcher.unseen == [names[1]]


# --- ranges and scales


def spread(x: Tensor) -> Spread:
    return gathered(x, [len(x)], needs=(), spread=True).span()


ASYMMETRIC = QuantSpec(ELEMENTS["uint8"], (Scale(F32, (0, 0)),), (Scale(ELEMENTS["uint8"], (0, 0)),), "range")
STATIC_INT8 = spec(INT8, (F32, 0, 0), rule="range")
STATIC_NVFP4 = QuantSpec(E2M1, (Scale(E4M3, (1, 16), dynamic=True), Scale(F32, (0, 0))))
RECIPROCAL = QuantSpec(E2M1, (Scale(E4M3, (1, 16), dynamic=True), Scale(F32, (0, 0), "div")))


def test_histogram_counts_everything() -> None:
    x = torch.cat([torch.randn(3000) * 10.0**e for e in (-6, 0, 4)] + [torch.zeros(7)])[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        seen = spread(x.to(dtype))
        assert seen.counts is not None and int(seen.counts.sum()) == len(x)
        assert (seen.low, seen.high) == (float(x.to(dtype).min()), float(x.to(dtype).max()))


def test_percentile_within_a_bin() -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(1))[:, None] + 0.5
    for percentile in (90.0, 99.0, 99.9, 100.0):
        low, high = observe_range(spread(x), TENSOR_FP8, "percentile", percentile)
        assert low == -high and high == pytest.approx(float(x.abs().double().quantile(percentile / 100)), rel=0.02)
        low, high = observe_range(spread(x), ASYMMETRIC, "percentile", percentile)
        ends = (1 - percentile / 100) / 2
        assert low == pytest.approx(float(x.double().quantile(ends)), rel=0.03)
        assert high == pytest.approx(float(x.double().quantile(1 - ends)), rel=0.03)


@pytest.mark.parametrize("asked", [STATIC_INT8, ASYMMETRIC, TENSOR_FP8], ids=["int8", "uint8 with zero", "fp8"])
def test_mse_is_never_worse_than_max(asked: QuantSpec) -> None:
    generator = torch.Generator().manual_seed(2)
    for outlier in (0.0, 40.0, 4000.0):
        x = torch.randn(20_000, 1, generator=generator)
        x[7] += outlier
        error = {}
        for how in ("max", "mse"):
            planes = static_planes(asked, observe_range(spread(x), asked, how))  # type: ignore[arg-type]
            error[how] = float((fake_quant(x, asked, planes) - x).double().square().mean())
        assert error["mse"] <= error["max"] * 1.01
        if asked.element is INT8 and outlier == 40:
            assert error["mse"] < 0.95 * error["max"]


@pytest.mark.parametrize(
    ("asked", "writer"),
    [
        (TENSOR_FP8, "compressed-tensors"), (TENSOR_FP8, "modelopt"), (STATIC_INT8, "compressed-tensors"),
        (ASYMMETRIC, "compressed-tensors"), (STATIC_NVFP4, "modelopt"), (RECIPROCAL, "compressed-tensors"),
    ],
)  # fmt: skip
def test_planes_are_what_codecs_hold(asked: QuantSpec, writer: str) -> None:
    """Written and read they are the same, and rounding with them is rounding with scales of the tensor itself."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(3)) * 3 + 1
    planes = static_planes(asked, observe_range(spread(x), asked))
    assert all(plane.shape == (1, 1) for plane in planes.values())
    torch.testing.assert_close(fake_quant(x, asked, planes), fake_quant(x, asked), rtol=0, atol=0)
    name = {"e4m3": "fp8-tensor", "e2m1": "nvfp4"}.get(asked.element.name, "int8-tensor-a8")
    codec = codecs.CODECS[writer]
    form = replace(codec.fit(Format(FORMATS[name].weight, asked)), act=asked)
    back = back_again(codec, Quantized(form, encode(torch.randn(64, 64), form.weight), planes))
    assert back.act.keys() == planes.keys() and all(torch.equal(back.act[n], planes[n]) for n in planes)
    assert back.format.act is not None
    torch.testing.assert_close(fake_quant(x, back.format.act, back.act), fake_quant(x, asked), rtol=0, atol=0)


def test_scales_that_cannot_be_static() -> None:
    assert static_planes(spec(E4M3, (F32, 1, 0), dynamic=1), (-1.0, 1.0)) == {}
    with pytest.raises(UnsupportedError, match="scale0 is not per tensor"):
        static_planes(spec(E4M3, (F32, 1, 128)), (-1.0, 1.0))
    with pytest.raises(SpecError, match="needs a histogram"):
        observe_range(Spread(-1.0, 1.0), TENSOR_FP8, "mse")
    with pytest.raises(SpecError, match="known: max, percentile, mse"):
        observe_range(Spread(-1.0, 1.0), TENSOR_FP8, "median")  # type: ignore[arg-type]
    assert observe_range(Spread(-1.0, 3.0), STATIC_NVFP4, "mse") == (-3.0, 3.0)
    assert observe_range(Spread(0.5, 3.0), ASYMMETRIC) == (0.0, 3.0)


# --- keys and values


def test_keys_and_values(tmp_path: Path) -> None:
    model = load(llama(tmp_path, num_key_value_heads=2), dtype="float32")
    seen: list[tuple[Tensor, Tensor]] = []
    with Watcher(model, (), kv=True) as watcher:
        run(model, batches())
    attention = model.get_submodule("model.layers.1.self_attn")
    attention.fewbit_watch_kv = lambda k, v: seen.append((k, v))
    run(model, batches())
    key, value = (torch.cat(each) for each in zip(*seen, strict=True))
    by_head = kv_scales(watcher.kv, "head")["model.layers.1.self_attn"]
    torch.testing.assert_close(by_head["k"], key.abs().amax((0, 2, 3)) / 448)
    torch.testing.assert_close(by_head["v"], value.abs().amax((0, 2, 3)) / 448)
    whole = kv_scales(watcher.kv)
    assert len(whole) == 2 and whole["model.layers.1.self_attn"]["k"].tolist() == [by_head["k"].max()]
    assert watcher.groups == []
    with pytest.raises(UnsupportedError, match="no keys and values were seen"):
        kv_scales({})


def test_scales_round_trip_through_the_cache(model: nn.Module) -> None:
    """With its own scale no key is clipped."""
    from fewbit.modules.attention import rounded

    seen: list[tuple[Tensor, Tensor]] = []
    with Watcher(model, (), kv=True) as watcher:
        run(model, batches())
    attention = model.get_submodule("model.layers.0.self_attn")
    attention.fewbit_watch_kv = lambda k, v: seen.append((k.float(), v.float()))
    run(model, batches())
    del attention.fewbit_watch_kv
    scales = kv_scales(watcher.kv)["model.layers.0.self_attn"]
    planes = [{"scale0": scales[of].reshape(1, 1)} for of in ("k", "v")]
    for key, value in seen:
        for before, after in zip((key, value), rounded(key, value, TENSOR_FP8, *planes), strict=True):
            assert float((before - after).abs().max()) <= float(before.abs().max()) / 14
