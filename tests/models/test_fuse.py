"""What is fused in which architecture, and that nothing of what a model computes changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbit.models import build, fuse, hf, twin
from fewbit.models.fuse_place import put_back
from fewbit.models.fuse_values import Decision, Fused, Plan
from fewbit.models.shrink import shrink
from fewbit.modules import experts, glu, residual
from fewbit.modules.glu import Gating, GluForm
from fewbit.modules.linear import Linear
from fewbit.modules.merged import Slice
from fewbit.modules.norm import Norm
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


def config(model_type: str) -> Any:
    return hf.read_config({"model_type": model_type, **saved.FULL.get(model_type, {})})


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


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "olmo2", "mixtral", "gpt_oss", "gpt_neox"])
def test_put_back(model_type: str) -> None:
    """transformers' code again where it was fused, then fused again, to the bit and to the module."""
    model, report, before, after = fused_twin(model_type)
    modules = [id(m) for m in model.modules()]
    back = put_back(model, ("norm", "glu", "rotary", "sums"))
    kinds = [one.kind for one in back]
    assert all(kinds.count(kind) == report.count(kind) for kind in ("norm", "glu", "rotary"))
    assert kinds.count("sums") == report.count("sums") * {"gemma3_text": 3, "olmo2": 2}.get(model_type, 1)
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


def test_report() -> None:
    _, report, *_ = fused_twin("opt")
    assert "torch's own is one kernel already" in str(report) and "k_proj + v_proj + q_proj" in str(report)
    assert {entry["kept"] for entry in report.json()} == {True, False}
    assert Decision("a", "norm", "b", "why").kept is False


def test_what_the_twin_refutes_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's form that is wrong in one place takes only its own rewrite with it."""
    monkeypatch.setattr(fuse, "_PLANS", {})
    real = glu.act_mul
    monkeypatch.setattr(glu, "act_mul", lambda gate, up, act: real(gate, up, act) * (1.001 if up.shape[0] == 2 else 1))
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
    limit = fuse.LIMIT if dtype == "float32" else 1e-2  # inputs that are rounded may fall on the other side
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
