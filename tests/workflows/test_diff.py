"""diff: what its figures are, and that it names the one module that was tampered with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbit
from fewbit.errors import RequestError
from fewbit.models.layers import Layers
from fewbit.quant.formats import FORMATS
from fewbit.quant.reference import decode, encode
from fewbit.workflows.diff import Difference, diff, figures, layer_rows, module_rows, verdict
from fewbit.workflows.diff_rounding import Matrix, stored
from fewbit.workflows.evaluate import evaluate
from fewbit.workflows.refit import effective
from tests.models import saved
from tests.tiny import edit, edit_config, llama

CONTEXT = 32
FP8, INT4, NVFP4 = "fp8-channel", "int4-g64", "nvfp4"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("diff") / "base")


@pytest.fixture(scope="session")
def ids() -> Tensor:
    return torch.randint(3, 256, (CONTEXT * 3,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def made(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """A new conversion of the base, maybe tampered with."""

    def make(format: str, dialect: str = "compressed-tensors", change: Any = None) -> Path:
        out = tmp_path / (f"{len(list(tmp_path.iterdir()))}" + (".gguf" if dialect == "gguf" else ""))
        fewbit.convert(base, out, dialect, requantize=format)
        return edit(out, change) if change else out

    return make


def run(a: Path, b: Path | None, ids: Tensor, **options: Any) -> Difference:
    return diff(a, b, ids=ids, context=CONTEXT, tokens=CONTEXT * 3, **{"dtype": "f32"} | options)


def exceeded(found: Difference) -> list[str]:
    return [m.name for m in found.modules if m.exceeded]


def test_figures(base: Path, ids: Tensor, made: Callable[..., Path]) -> None:
    other = made(INT4)
    found = run(base, other, ids)
    scored = evaluate(other, ids=ids, against=base, context=CONTEXT, dtype="f32")
    for name in ("perplexity", "base_perplexity", "kl", "agreement", "difference"):
        assert getattr(found, name).value == pytest.approx(getattr(scored, name).value, rel=1e-5, abs=1e-7), name
    assert found.digest == scored.digest and found.tokens == scored.tokens
    json.dumps(found.to_json(), allow_nan=False)
    assert len(figures(found)) == 4 and len(list(layer_rows(found))) == 2
    assert len(module_rows(found, every=True)) == len(found.modules)


def test_order_and_modules(base: Path, ids: Tensor) -> None:
    names = [m.name for m in run(base, None, ids, format=INT4).modules]
    assert names[0] == "model.embed_tokens" and names[-2:] == ["model.norm", "lm_head"]
    first = ["input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
    assert names[1:10] == [f"model.layers.0.{name}" for name in first]
    assert len(names) == 3 + 2 * 9


def test_errors_of_one_module_by_hand(base: Path, ids: Tensor) -> None:
    """Both models whole, with hooks; then one linear on the other's inputs."""
    found = {m.name: m for m in run(base, None, ids, format="int8-channel-a8").modules}
    models = [fewbit.load(base, dtype="float32", format=form) for form in (None, "int8-channel-a8")]
    name = "model.layers.1.mlp.down_proj"
    seen: list[tuple[Tensor, Tensor]] = []
    for model in models:
        model.get_submodule(name).register_forward_hook(lambda m, x, y: seen.append((x[0], y)))
        with torch.no_grad():
            model(input_ids=ids.view(3, CONTEXT))
    (x, y), (_, own) = seen
    same = models[1].get_submodule(name)(x)
    weights = [model.get_submodule(name).weight for model in models]
    m = found[name]
    assert m.own == pytest.approx(float((own - y).norm() / y.norm()), rel=1e-3)
    assert m.same == pytest.approx(float((same - y).norm() / y.norm()), rel=1e-3)
    assert m.weight == pytest.approx(float((weights[1] - weights[0]).norm() / weights[0].norm()), rel=1e-3)
    assert m.explained == pytest.approx(m.same, rel=1e-3)  # rounding to nearest is what the format explains
    assert m.same < m.own


@pytest.mark.parametrize("form", [FP8, INT4, NVFP4, "int8-channel-a8", "mxfp4", "q4_k"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_formats_explain_rounding(tmp_path: Path, ids: Tensor, form: str, dtype: str) -> None:
    wide = llama(tmp_path / "m", hidden_size=256, num_attention_heads=4)
    found = run(wide, None, ids, format=form, dtype=dtype)
    assert exceeded(found) == [] and found.guilty is None
    assert "every module" in verdict(found)
    assert found.kl.value > 1e-5


@pytest.mark.parametrize(
    ("form", "first", "second"),
    [(INT4, "gptq", "compressed-tensors"), ("int4-g128", "gptq", "awq"), ("nvfp4-a16", "modelopt", "gguf"),
     ("fp8-block", "fp8", "compressed-tensors"), ("int8-g32", "gguf", "gptq")],
)  # fmt: skip
def test_two_dialects_of_the_same_codes(
    base: Path, ids: Tensor, made: Callable[..., Path], tmp_path: Path, form: str, first: str, second: str
) -> None:
    a, b = made(form, first), tmp_path / ("to.gguf" if second == "gguf" else "to")
    fewbit.convert(a, b, second)
    for found in (run(a, b, ids), run(b, a, ids)):
        assert exceeded(found) == []
        rounded = max(m.explained or 0 for m in found.modules)  # scales in another float type
        assert rounded < 1e-3
        assert max(m.same or 0 for m in found.modules) <= rounded + 1e-6
        assert found.kl.value < 1e-6 and found.agreement.value == 1


def test_nothing_is_different_from_itself(base: Path, ids: Tensor, made: Callable[..., Path]) -> None:
    other = made(NVFP4, "modelopt") if FORMATS[NVFP4].act is None else made("int8-channel-a8")
    for a, options in ((base, {}), (other, {"kernels": ("reference", "auto")})):
        found = run(a, a, ids, **options)
        assert max(m.same or 0 for m in found.modules) < 1e-6 and exceeded(found) == []
        assert found.kl.value < 1e-9


def test_activations_off(base: Path, ids: Tensor, made: Callable[..., Path]) -> None:
    found = run(made("int8-channel-a8"), None, ids, activations=("declared", "off"))
    linears = [m for m in found.modules if m.kind == "Linear" and m.name != "lm_head"]
    assert all(m.weight == 0 and m.same > 1e-4 for m in linears)
    assert all(m.explained == pytest.approx(m.same, rel=0.05) for m in linears) and exceeded(found) == []


K1 = "model.layers.1.self_attn.k_proj"


def doubled(tensors: dict[str, Tensor]) -> None:
    tensors[f"{K1}.weight_scale"] *= 2


def swapped(tensors: dict[str, Tensor]) -> None:
    scale = tensors[f"{K1}.weight_scale"]
    order = scale.flatten(1).float().norm(dim=1).argsort().tolist()
    scale[[order[0], order[-1]]] = scale[[order[-1], order[0]]]


def wrong_norm(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.post_attention_layernorm.weight"][3] *= 1.5


def wrong_table(tensors: dict[str, Tensor]) -> None:
    tensors["model.embed_tokens.weight"] *= 1.1


def wrong_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"].copy_(tensors["lm_head.weight"].flip(0).clone())


@pytest.mark.parametrize(
    ("change", "named"),
    [(doubled, K1), (swapped, K1), (wrong_norm, "model.layers.1.post_attention_layernorm"),
     (wrong_table, "model.embed_tokens"), (wrong_head, "lm_head")],
    ids=lambda v: v.__name__ if callable(v) else "",
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_guilty_module_is_named(
    base: Path, ids: Tensor, made: Callable[..., Path], change: Any, named: str, dtype: str
) -> None:
    good, bad = made(FP8), made(FP8, change=change)
    references = (good,) if change is swapped else (base, good)  # two rows of scales are within 3 times rounding
    for reference in references:
        found = run(reference, bad, ids, dtype=dtype)
        assert exceeded(found) == [named]
        assert found.guilty is not None and found.guilty.name == named and named in verdict(found)


def static(folder: Path, scales: float) -> Path:
    """FP8 weights, and one scale for the input of every linear, which no rounding to nearest could choose."""
    held = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}

    def declare(config: dict[str, Any]) -> None:
        for group in config["quantization_config"]["config_groups"].values():
            group["input_activations"] = held

    def add(tensors: dict[str, Tensor]) -> None:
        for name in [n.removesuffix("_scale") for n in tensors if n.endswith("weight_scale")]:
            tensors[name.replace("weight", "input_scale")] = torch.tensor([scales], dtype=torch.bfloat16)

    return edit(edit_config(folder, declare), add)


def test_a_wrong_activation_scale_is_named(base: Path, ids: Tensor, made: Callable[..., Path]) -> None:
    good, bad = (static(made(FP8), 0.01) for _ in range(2))
    name = "model.layers.1.mlp.up_proj"
    edit(bad, lambda t: t[f"{name}.input_scale"].mul_(1 / 16))
    assert exceeded(run(base, good, ids)) == []
    assert exceeded(run(base, bad, ids)) == [name]
    assert exceeded(run(good, bad, ids)) == [name]


def folded(tensors: dict[str, Tensor]) -> None:
    """Scales out of a norm, out of the values and out of the up projection, into what reads them."""
    generator = torch.Generator().manual_seed(5)
    layer = "model.layers.1."

    def fold(producer: str, readers: list[str], heads: int = 1) -> None:
        weight = tensors[f"{layer}{producer}.weight"]
        scale = torch.exp(0.5 * torch.randn(len(weight), generator=generator))
        tensors[f"{layer}{producer}.weight"] = weight.float() / scale.view(-1, *[1] * (weight.dim() - 1))
        wide = scale.view(-1, 1, 64).expand(-1, heads, 64).flatten()
        for reader in readers:
            tensors[f"{layer}{reader}.weight"] = tensors[f"{layer}{reader}.weight"].float() * wide

    fold("input_layernorm", [f"self_attn.{n}_proj" for n in "qkv"])
    fold("self_attn.v_proj", ["self_attn.o_proj"], 2)
    fold("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"])
    fold("mlp.up_proj", ["mlp.down_proj"])


@pytest.mark.parametrize("form", [None, "int4-g64", "int8-channel-a8"])
def test_folded_scales_are_no_fault(base: Path, ids: Tensor, tmp_path: Path, form: str | None) -> None:
    other = edit(llama(tmp_path / "other"), folded)
    b = other
    if form:
        b = tmp_path / "quantized"
        fewbit.convert(other, b, "compressed-tensors", requantize=form)
    assert exceeded(run(base, b, ids)) == []
    assert exceeded(run(b, base, ids)) == []
    bad = edit(b, lambda t: t["model.layers.1.post_attention_layernorm.weight"][3].mul_(1.5))
    assert exceeded(run(base, bad, ids)) == ["model.layers.1.post_attention_layernorm"]


def test_gguf(base: Path, ids: Tensor, made: Callable[..., Path]) -> None:
    found = run(base, made("int8-g32", "gguf"), ids)
    assert exceeded(found) == [] and found.kl.value < 1e-3


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_experts(model_type: str, ids: Tensor, tmp_path: Path) -> None:
    folder = saved.save(saved.model(model_type), tmp_path / "moe")
    found = run(folder, None, ids % 90 + 3, format="int8-channel-a8")
    experts = [m for m in found.modules if m.kind == "Experts"]
    assert {m.name.rpartition(".")[2] for m in experts} == {"gate_up_proj", "down_proj"}
    assert all(m.explained == pytest.approx(m.same, rel=0.05) and m.weight > 0 for m in experts)
    assert exceeded(found) == []


def test_a_model_that_does_not_run_by_layers(base: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = run(base, None, ids, format=INT4)
    start = Layers.__init__
    monkeypatch.setattr(Layers, "__init__", lambda self, *a, **k: start(self, *a, **k | {"path": ""}))
    found = run(base, None, ids, format=INT4)
    assert [m.name for m in found.modules] == [m.name for m in wanted.modules]
    for mine, other in zip(found.modules, wanted.modules, strict=True):
        assert mine.same == pytest.approx(other.same, rel=1e-4, abs=1e-7)
    assert [layer.name for layer in found.layers] == ["model"]
    assert found.kl.value == pytest.approx(wanted.kl.value, rel=1e-4)


def test_long_matrices_are_sampled(base: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {m.name: m for m in run(base, None, ids, format=INT4).modules}
    monkeypatch.setattr("fewbit.workflows.diff_rounding.ROWS", 32)
    monkeypatch.setattr("fewbit.workflows.diff_rounding.RUN", 16)
    for m in run(base, None, ids, format=INT4).modules:
        assert m.explained == pytest.approx(wanted[m.name].explained, rel=0.2, abs=1e-9), m.name
    assert Matrix(dense=torch.zeros(128, 4)).runs() == [(0, 16), (64, 80)]


def test_stored_inverts_effective(tmp_path: Path) -> None:
    from fewbit.quant.qtensor import Quantized, Transform

    generator = torch.Generator().manual_seed(0)
    n, k = 16, 64
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    transforms = (
        Transform("input_scale", {"scale": torch.rand(k, generator=generator) + 0.5}),
        Transform("rotate", {"matrix": rotation}),
        Transform("permute", {"index": torch.randperm(k, generator=generator)}),
        Transform(
            "low_rank", {"a": torch.randn(2, k, generator=generator), "b": torch.randn(n, 2, generator=generator)}
        ),
    )
    spec = FORMATS["int8-g32"].weight
    weight = encode(torch.randn(n, k, generator=generator), spec)
    whole = effective(Quantized(FORMATS["int8-g32"], weight, {}, transforms))
    torch.testing.assert_close(stored(whole, transforms, [(0, n)]), decode(weight), rtol=1e-4, atol=1e-5)


def test_requests_that_cannot_be_met(base: Path, ids: Tensor, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="compared with what"):
        run(base, None, ids)
    other = llama(tmp_path / "wide", intermediate_size=384)
    with pytest.raises(RequestError, match=r"down_proj.weight is \[128, 256\].*\[128, 384\]"):
        run(base, other, ids)
    deep = llama(tmp_path / "deep", num_hidden_layers=3)
    with pytest.raises(RequestError, match="not there"):
        run(base, deep, ids)
    qwen = edit_config(llama(tmp_path / "type"), lambda c: c.update(model_type="qwen2"))
    with pytest.raises(fewbit.FewbitError):
        run(base, qwen, ids)
