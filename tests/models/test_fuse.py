"""What is fused in which architecture, and that nothing of what a model computes changes."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbit.engine import proof
from fewbit.engine.fusion import KINDS
from fewbit.kernels import attend, fused, packed, rounded, tiles
from fewbit.kernels.compiled import left_to_torch
from fewbit.models import build, fuse, fuse_forms, fuse_look, hf, twin
from fewbit.models.fuse_place import put_back
from fewbit.models.fuse_values import Decision, Fused, Plan
from fewbit.models.shrink import shrink
from fewbit.modules import experts, glu, latent, norm, residual, router
from fewbit.modules.glu import Gating, GluForm
from fewbit.modules.latent import LatentForm
from fewbit.modules.linear import Linear
from fewbit.modules.merged import Slice
from fewbit.modules.norm import Norm, NormForm
from fewbit.modules.router import Choice, Groups, RouteForm
from fewbit.quant.formats import FORMATS
from tests.models import saved
from tests.tiny import llama

# Per layer of the twin: groups of merged linears, norms (the last one of the model beside them), gated MLPs, rotary,
# whether its additions are done with norms.
TYPES: tuple[tuple[str, int, int, int, int, int], ...] = (
    ("llama", 2, 2, 1, 1, 1),
    ("mistral", 2, 2, 1, 1, 1),
    ("qwen2", 2, 2, 1, 1, 1),
    ("qwen3", 2, 4, 1, 1, 1),
    ("gemma3_text", 2, 6, 1, 1, 1),
    ("phi3", 0, 2, 1, 1, 1),
    ("mixtral", 1, 2, 1, 1, 1),
    ("gpt_oss", 1, 2, 1, 1, 1),
    ("glm4", 1, 4, 1, 1, 1),
    ("olmo2", 2, 4, 1, 1, 1),
    ("cohere2", 2, 1, 1, 1, 1),
    ("opt", 1, 0, 0, 0, 0),
    ("gpt2", 0, 0, 0, 0, 0),
    ("gpt_neox", 0, 0, 0, 1, 0),
)
ODD = ("falcon", "bloom", "mamba", "bert", "nemotron")


def config(model_type: str, **more: Any) -> Any:
    return hf.read_config({"model_type": model_type, **saved.FULL.get(model_type, {}), **more})


def fused_twin(model_type: str) -> tuple[Any, Fused, list[Tensor], list[Tensor]]:
    """-> the twin fused, the report, its logits before and after."""
    asked = config(model_type)
    small = shrink(asked)
    _, model = twin.filled(small, twin.require(asked))
    before = twin.logits(model, small)
    report = fuse.apply(model, fuse.plan(asked))
    return model, report, before, twin.logits(model, small)


@pytest.mark.parametrize(("model_type", "merged", "norms", "glus", "rotary", "sums"), TYPES, ids=[t[0] for t in TYPES])
def test_types(model_type: str, merged: int, norms: int, glus: int, rotary: int, sums: int) -> None:
    model, report, before, after = fused_twin(model_type)
    layers = model.config.num_hidden_layers
    found = [report.count(kind) for kind in ("merged", "glu", "rotary", "sums")]
    assert found == [layers * n for n in (merged, glus, rotary, sums)]
    assert report.count("norm") == layers * norms + (norms > 0)
    assert max(twin.relative(a, b) for a, b in zip(after, before, strict=True)) <= fuse.LIMIT
    assert sum(isinstance(m, Norm) for m in model.modules()) == report.count("norm")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Libraries of C++ that somebody wants, and does not get."""
    wanted: list[str] = []

    def built(name: str) -> str:
        wanted.append(name)
        return "not in this test"

    monkeypatch.setattr(fuse, "_PLANS", {})
    monkeypatch.setattr(twin, "_VERDICTS", {})
    monkeypatch.setattr(proof, "_SEEN", {})
    for module, name in ((attend, "_native"), (fused, "_native"), (packed, "_native"), (tiles, "native")):
        monkeypatch.setattr(module, name, partial(built, module.__name__))
        monkeypatch.setattr(module, "library", built)
    monkeypatch.setattr(rounded, "library", built)
    return wanted


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "deepseek_v3", "mixtral", "gpt_oss"])
def test_a_plan_waits_for_no_compiler(model_type: str, asked: list[str]) -> None:
    assert fuse.plan(config(model_type)).rewrites
    assert twin.require(config(model_type)) and not asked
    with left_to_torch():  # as an engine on a GPU loads
        assert proof.check(config(model_type)).exact and not asked


@pytest.mark.parametrize("model_type", ODD)
def test_odd_types_do_not_raise(model_type: str) -> None:
    plan = fuse.plan(config(model_type))
    assert plan.rewrites or plan.refused
    assert model_type in str(plan)


def test_no_config_at_all() -> None:
    plan = fuse.plan(object())
    assert not plan.rewrites and plan.refused


def test_known_once_and_leaves_no_trace() -> None:
    before = torch.get_rng_state()
    larger = {"model_type": "llama", **saved.FULL["llama"], "hidden_size": 512, "intermediate_size": 1024}
    assert fuse.plan(config("llama")) is fuse.plan(hf.read_config(larger))
    assert torch.equal(before, torch.get_rng_state())


def test_another_model_of_the_class_is_untouched() -> None:
    """Rewrites are of modules, not of classes or of functions."""
    small = shrink(config("llama"))
    model, *_ = fused_twin("llama")
    _, other = twin.filled(small, twin.require(small))
    assert not any("forward" in vars(m) or isinstance(m, Slice | Norm) for m in other.modules())
    assert any("forward" in vars(m) for m in model.modules())


# For sums: a layer itself, norms and linears whose outputs are added; ernie4_5_moe has a layer without experts.
PLACES = {"llama": 2 * 3, "gemma3_text": 6 * 5, "olmo2": 2 * 2, "mixtral": 2 * 2, "gpt_oss": 2 * 2,
          "ernie4_5_moe": 3 + 2}  # fmt: skip


@pytest.mark.parametrize(
    "model_type", ["llama", "gemma3_text", "olmo2", "mixtral", "gpt_oss", "ernie4_5_moe", "gpt_neox"]
)
def test_put_back(model_type: str) -> None:
    """transformers' code again where it was fused, then fused again, to the bit and to the module."""
    model, report, before, after = fused_twin(model_type)
    modules = [id(m) for m in model.modules()]
    back = put_back(model, KINDS)
    kinds = [one.kind for one in back]
    assert all(kinds.count(kind) == report.count(kind) for kind in KINDS if kind != "sums")
    assert kinds.count("sums") == PLACES.get(model_type, 0)
    assert not any(isinstance(m, Norm) or {"forward", experts.GATE} & vars(m).keys() for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(twin.logits(model, model.config), before, strict=True))
    for one in back:
        one.again()
    assert [id(m) for m in model.modules()] == modules
    assert all(torch.equal(a, b) for a, b in zip(twin.logits(model, model.config), after, strict=True))
    assert not put_back(model, ())


SUMS = ("llama", "gemma3_text", "olmo2", "cohere2", "granite", "qwen3_moe", "deepseek_v3", "llama4_text", "glm4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", SUMS)
def test_sums_change_no_bit(model_type: str, dtype: torch.dtype) -> None:
    """Beside torch's additions and our norms."""
    model, report, *_ = fused_twin(model_type)
    assert report.count("sums") == model.config.num_hidden_layers
    found = []
    for _ in ("added by norms", "added before"):
        found.append(twin.logits(model.to(dtype), model.config))
        put_back(model, ("sums",))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_sums_are_passed_on_by_all_layers_or_by_none() -> None:
    """A layer of another kind would not know what it is given."""
    small, plan = shrink(config("llama")), fuse.plan(config("llama"))
    _, model = twin.filled(small, twin.require(small))
    before, layers = twin.logits(model, small), model.model.layers
    vars(layers[0])["forward"] = layers[0].forward
    report = fuse.apply(model, plan)
    assert [d.reason for d in report.decisions if d.kind == "sums"] == ["its forward is no longer its own", ""]
    assert max(twin.relative(a, b) for a, b in zip(twin.logits(model, small), before, strict=True)) <= fuse.LIMIT
    _, model = twin.filled(small, twin.require(small))
    model.model.layers[1].other = nn.Identity()
    report = fuse.apply(model, plan)
    assert [d.reason for d in report.decisions if d.kind == "sums"] == ["not every layer passes sums on"]
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_sums_of_code_that_asks_for_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused alone, with what it said."""
    monkeypatch.setattr(fuse, "_PLANS", {})
    monkeypatch.setattr(residual.Later, "__add__", lambda *_: 1 / 0)
    plan = fuse.plan(config("llama"))
    assert {r.kind for r in plan.rewrites} == {"merged", "norm", "glu", "rotary"}
    assert [d.reason for d in plan.refused if d.kind == "sums"] == ["ZeroDivisionError: division by zero"]


def gating(model_type: str, **changes: Any) -> GluForm:
    """Of its experts."""
    plan = fuse.plan(hf.read_config({"model_type": model_type, **changes}))
    assert not any(d.kind == "glu" for d in plan.refused)
    return next(r.form for r in plan.rewrites if isinstance(r.form, GluForm) and "Experts" in r.target.name)


GATES: tuple[tuple[str, dict[str, float], Gating, glu.Half], ...] = (
    ("gpt_oss", {}, Gating("quick_gelu", 1.702, 7.0, 1.0), "even"),
    ("gpt_oss", {"swiglu_alpha": 1.25, "swiglu_limit": 2.5}, Gating("quick_gelu", 1.25, 2.5, 1.0), "even"),
    ("minimax_m3_vl_text", {}, Gating("quick_gelu", 1.702, 7.0, 1.0), "first"),
    ("deepseek_v4", {}, Gating("silu", limit=10.0), "first"),
    ("deepseek_v4", {"swiglu_limit": 200.0}, Gating("silu", limit=200.0), "first"),
    ("mixtral", {"head_dim": 128}, Gating("silu"), "first"),
)


@pytest.mark.parametrize(("model_type", "changes", "found", "half"), GATES)
def test_gates_with_numbers(model_type: str, changes: dict[str, float], found: Gating, half: glu.Half) -> None:
    """Read off the module; a limit is seen although few values are ever beyond it."""
    assert gating(model_type, **changes) == GluForm(found, "gate_up_proj", "", "down_proj", half)


def test_a_rotary_embedding_that_is_no_form() -> None:
    found = fuse_forms.rotary_form(lambda q, k, cos, sin: (q, k), "")
    assert found == "its values are those of no rotary embedding that is known, the nearest is off by 1.7"


def test_a_limit_far_out_is_seen() -> None:
    """Of what a norm reads and of what a gate does, though hardly any value is ever beyond it."""
    made = saved.model("llama").model
    normed, gated = made.norm.forward, made.layers[0].mlp.act_fn.forward
    assert isinstance(fuse_forms.norm_form(made.norm, made.config.hidden_size), NormForm)
    made.norm.forward = lambda x: normed(x.clamp(-200, 200))
    assert "of no norm that is known" in str(fuse_forms.norm_form(made.norm, made.config.hidden_size))
    names, width = ("gate_proj", "up_proj", "down_proj"), made.config.hidden_size
    assert isinstance(fuse_forms.glu_form(made.layers[0].mlp, names, width), GluForm)
    made.layers[0].mlp.act_fn.forward = lambda x: gated(x.clamp(max=3e4))
    assert "of no gated MLP that is known" in str(fuse_forms.glu_form(made.layers[0].mlp, names, width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gate_by_our_kernel(dtype: torch.dtype) -> None:
    """Against transformers' own operations: float32 to rounding, 16 bits no further from float32 than those."""
    form, host = gating("gpt_oss"), saved.model("gpt_oss").model.layers[0].mlp.experts
    x = (4 * torch.randn(9, 2 * host.intermediate_size, generator=torch.Generator().manual_seed(0))).to(dtype)
    with torch.no_grad():
        want, truth = host._apply_gate(x), host._apply_gate(x.float())
        setattr(host, experts.GATE, form)
        got = experts.gated(host, x)
    assert bool((x > 7).any()) and got.dtype == dtype
    if dtype == torch.float32:
        assert twin.relative(got, want) <= fuse.LIMIT
    assert float((got - truth).norm()) <= float((want - truth).norm()) + 1e-5 * float(truth.norm())


BIAS, SCALE = "e_score_correction_bias", "routed_scaling_factor"
GROUPS = Groups("num_group", "topk_group")
DEEPSEEK = RouteForm("top_k", "wide", "sigmoid", BIAS, groups=GROUPS, divide="plus", eps=1e-20, scale=SCALE,
                     ordered=False)  # fmt: skip
ROUTERS: tuple[tuple[str, dict[str, Any], RouteForm], ...] = (
    ("deepseek_v3", {}, DEEPSEEK),
    ("deepseek_v3", {"norm_topk_prob": False}, replace(DEEPSEEK, divide="no", eps=0.0)),
    ("glm4_moe", {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}, DEEPSEEK),
    ("glm4_moe", {}, replace(DEEPSEEK, groups=None, scale="")),
    ("minimax_m2", {}, RouteForm("top_k", "own", "sigmoid", router.GIVEN, divide="plus", ordered=False)),
    ("ernie4_5_moe", {}, RouteForm("top_k", "wide", "softmax", "moe_statics." + BIAS, divide="least", eps=1e-12,
                                   narrow=True)),
    ("mixtral", {"head_dim": 128}, RouteForm("top_k", "own", "softmax", divide="plus")),
    ("qwen3_moe", {}, RouteForm("top_k", "own", "softmax", narrow=True)),
    ("gpt_oss", {}, RouteForm("top_k", "own", "none", shift="bias", then="softmax", narrow=True)),
    ("granitemoe", {}, RouteForm("top_k", "cast", "none", then="softmax", narrow=True)),
)  # fmt: skip


@pytest.mark.parametrize(("model_type", "changes", "found"), ROUTERS)
def test_routers(model_type: str, changes: dict[str, Any], found: RouteForm) -> None:
    plan = fuse.plan(hf.read_config({"model_type": model_type, **changes}))
    assert [r.form for r in plan.rewrites if r.kind == "route"] == [found]


def test_a_router_that_is_no_form() -> None:
    """deepseek_v4 rounds its scores to 16 bits on the way, and has scores of its own."""
    assert any(d.kind == "route" and d.refused for d in fuse.plan(config("deepseek_v4")).refused)


@pytest.mark.parametrize(("model_type", "found"), [(t, f) for t, changes, f in ROUTERS if not changes])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_router_as_transformers_has_it(model_type: str, found: RouteForm, dtype: torch.dtype) -> None:
    """To the bit, equal experts and what is not finite included; what it was given stays."""
    module = next(m for m in saved.model(model_type).modules() if type(m).__name__.lower().endswith("router")).to(dtype)
    width = module.weight.shape[1]
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(0))
    x[::2] = 0.0  # equal experts, but for a bias
    x[3, 0] = torch.inf
    x[5] = torch.nan
    x = x.to(dtype)
    given = (torch.randn(len(module.weight)),) if found.bias == router.GIVEN else ()
    with torch.no_grad():
        got, want = router.forward(module, found, x.clone(), *given), module(x.clone(), *given)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_a_router_of_another_type_than_its_input() -> None:
    module = next(m for m in saved.model("mixtral").modules() if type(m).__name__.endswith("Router")).bfloat16()
    form = next(f for t, _, f in ROUTERS if t == "mixtral")
    with pytest.raises(RuntimeError, match="dtype"):  # as there
        router.forward(module, form, torch.randn(3, module.weight.shape[1]))
    assert Choice.of(module, form).top == module.top_k


@pytest.mark.parametrize("model_type", ["deepseek_v3", "axk1", "glm4_moe_lite", "minicpm3", "youtu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_latent_attention(model_type: str, dtype: torch.dtype) -> None:
    """With a cache and without one; keys and queries to the bit."""
    model, report, *_ = fused_twin(model_type)
    assert report.count("latent") == model.config.num_hidden_layers
    model.to(dtype)
    kinds = [kind for kind in KINDS if kind != "latent"]
    put_back(model, kinds)
    got = twin.logits(model, model.config, cached=False)
    with_cache = twin.logits(model, model.config)
    assert len(put_back(model, ["latent"])) == model.config.num_hidden_layers
    assert all(torch.equal(a, b) for a, b in zip(got, twin.logits(model, model.config, cached=False), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(with_cache, twin.logits(model, model.config), strict=True))


def test_attention_through_the_latent_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over pages, in float32 and in bfloat16. What differs there is fused as it stands."""

    def form(model_type: str, **more: Any) -> LatentForm:
        monkeypatch.setattr(fuse, "_PLANS", {})
        (found,) = {r.form for r in fuse.plan(config(model_type, **more)).rewrites if isinstance(r.form, LatentForm)}
        return found

    right = form("deepseek_v3")
    assert right.through and "through the latent" in str(right)
    complex_tables = form("deepseek_v2", num_experts_per_tok=6, n_group=8, topk_group=3)
    assert complex_tables.through and complex_tables.rotary.table == "short" and complex_tables.rotary.wide
    absorb = latent.absorb
    for wrong in (lambda q, k: (q * 1.001, k), lambda q, k: (q + (q * 0.05 if q.dtype == torch.bfloat16 else 0), k)):
        monkeypatch.setattr(latent, "absorb", lambda *args, wrong=wrong: wrong(*absorb(*args)))
        assert form("deepseek_v3") == replace(right, through=False)


def test_norms_of_two_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call where both are ours; each its own where one is not, or is watched."""
    model, *_ = fused_twin("deepseek_v3")
    attention, calls, pair = model.model.layers[0].self_attn, [], norm.normed_pair
    monkeypatch.setattr(norm, "normed_pair", lambda *args: calls.append(args) or pair(*args))
    want = twin.logits(model, model.config, cached=False)
    assert len(calls) == model.config.num_hidden_layers
    for watched in (attention.q_a_layernorm, attention.kv_a_layernorm):
        seen: list[Any] = []
        hook = watched.register_forward_hook(lambda *args, seen=seen: seen.append(args))
        calls.clear()
        got = twin.logits(model, model.config, cached=False)
        assert len(seen) == 1 and len(calls) == model.config.num_hidden_layers - 1
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        hook.remove()
    calls.clear()
    put_back(model, ["norm"])
    twin.logits(model, model.config, cached=False)
    assert not calls


def test_rotary_stays_where_latent_attention_is_put_back() -> None:
    model, *_ = fused_twin("deepseek_v3")
    attention = model.model.layers[0].self_attn
    (one, *_) = put_back(model, ["latent"])
    assert isinstance(vars(attention)["forward"], MethodType) and one.module is attention
    one.again()
    assert isinstance(vars(attention)["forward"], partial)
    put_back(model, KINDS)
    assert "forward" not in vars(attention)


@pytest.mark.parametrize("model_type", ["longcat_flash", "deepseek_v32"])
def test_other_latent_attention_is_left(model_type: str) -> None:
    """One scales what it puts together, the other asks for masks of an indexer."""
    plan = fuse.plan(config(model_type))
    assert not [r for r in plan.rewrites if r.kind == "latent"]
    assert [d.refused for d in plan.refused if d.kind == "latent"] == [True] * (model_type == "longcat_flash")


@pytest.mark.parametrize(("model_type", "layers"), [("deepseek_v3", 2), ("ernie4_5_moe", 1), ("qwen2_moe", 0)])
def test_a_shared_expert_is_added_where_the_others_are(model_type: str, layers: int) -> None:
    """qwen2_moe weighs its own by a gate."""
    model, report, before, after = fused_twin(model_type)
    assert report.count("mixture") == layers
    assert max(twin.relative(a, b) for a, b in zip(after, before, strict=True)) <= 2 * fuse.LIMIT
    model.bfloat16()
    put_back(model, [kind for kind in KINDS if kind != "mixture"])
    got = twin.logits(model, model.config)
    assert len(put_back(model, ["mixture"])) == layers
    assert all(torch.equal(a, b) for a, b in zip(got, twin.logits(model, model.config), strict=True))


def test_report() -> None:
    _, report, *_ = fused_twin("opt")
    assert "torch's own is one kernel already" in str(report) and "k_proj + v_proj + q_proj" in str(report)
    assert {entry["kept"] for entry in report.json()} == {True, False}
    assert Decision("a", "norm", "b", "why").kept is False


def test_what_the_twin_refutes_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's form that is wrong in one place takes only its own rewrite with it."""
    monkeypatch.setattr(fuse, "_PLANS", {})
    real = glu.act_mul
    monkeypatch.setattr(glu, "act_mul", lambda gate, up, *by: real(gate, up, *by) * (1.001 if up.shape[0] == 2 else 1))
    plan = fuse.plan(config("llama"))
    assert {r.kind for r in plan.rewrites} == {"merged", "norm", "rotary", "sums"}
    assert any(d.kind == "glu" and "logits differ" in d.reason for d in plan.refused)


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(10, 90, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        found: Tensor = model(ids).logits
        return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", [None, "int4-g128", "fp8-channel", "fp8-tensor", "nvfp4", "int8-channel-a8"])
def test_loaded(format: str | None, dtype: str, tmp_path: Path) -> None:
    folder = llama(tmp_path)
    plain = build.load(folder, format=format, dtype=dtype)
    model: Any = build.load(folder, format=format, dtype=dtype, fuse=True)
    report = model.fewbit_fused
    assert [report.count(kind) for kind in ("merged", "norm", "glu", "rotary", "sums")] == [4, 5, 2, 2, 2]
    assert not any(m.pending for m in model.modules() if isinstance(m, Linear))
    rounds = format is not None and FORMATS[format].act is not None  # and may fall on the other side
    limit = 4 * fuse.LIMIT if dtype == "float32" and not rounds else 1e-2  # processors add in orders of their own
    assert twin.relative(logits(model), logits(plain)) <= limit
    for path, module in plain.named_modules():
        if isinstance(module, Linear):
            assert torch.equal(model.get_submodule(path).weight, module.weight), path


def test_moves_and_biases(tmp_path: Path) -> None:
    model, _, _, after = fused_twin("qwen2")
    sliced = [m for m in model.modules() if isinstance(m, Slice)]
    assert all(m.bias is not None and m.bias._base is not None for m in sliced[:3])
    model.to(torch.float64).to(torch.float32)
    assert all(m.weight.dtype == torch.float32 for m in sliced)
    again = twin.logits(model, model.config)
    assert all(torch.equal(a, b) for a, b in zip(again, after, strict=True))
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in twin.filled(shrink(config("qwen2")), model.config._attn_implementation)[1].parameters()
    )


def test_a_rewrite_that_fits_no_module_is_refused() -> None:
    """A model may have another class at its full size than at its twin's, as BigBird has."""
    small = shrink(config("gpt2"))
    _, model = twin.filled(small, twin.require(small))
    report = fuse.apply(model, fuse.plan(config("llama")))
    assert {(d.kind, d.where) for d in report.decisions} == {
        ("merged", "LlamaAttention"), ("merged", "LlamaMLP"), ("norm", "LlamaRMSNorm"), ("glu", "LlamaMLP"),
        ("rotary", "LlamaAttention"), ("sums", "LlamaDecoderLayer"),
    }  # fmt: skip
    assert all(d.refused and "no module" in d.reason for d in report.decisions)


def test_plan_of_nothing_changes_nothing() -> None:
    small = shrink(config("llama"))
    _, model = twin.filled(small, twin.require(small))
    assert fuse.apply(model, Plan("llama")).decisions == ()


def test_what_a_look_raises_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's code, run on what it was not made for, takes no other kind of kernel with it."""
    monkeypatch.setattr(fuse, "_PLANS", {})
    monkeypatch.setattr(fuse_look, "norm_form", lambda *_: 1 / 0)
    plan = fuse.plan(config("llama"))
    assert {r.kind for r in plan.rewrites} == {"merged", "glu", "rotary"}
    assert any(d.kind == "norm" and "ZeroDivisionError" in d.reason for d in plan.refused)
