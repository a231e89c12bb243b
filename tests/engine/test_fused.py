"""An engine on a fused model gives the tokens that it gives on the model as it is, and says what is not fused."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fewbit.engine import fusion
from fewbit.engine.config import EngineConfig
from fewbit.engine.engine import Engine
from fewbit.engine.params import SamplingParams
from fewbit.engine.request import Request
from fewbit.engine.runner import LATE
from fewbit.errors import RequestError, UnsupportedError
from fewbit.models import build
from fewbit.modules import experts, glu, norm, paged, residual, rotary
from fewbit.modules.merged import Slice
from fewbit.modules.norm import Norm
from tests.compat import small
from tests.engine.test_engine import GREEDY, drain, prompts, tokens
from tests.models import saved
from tests.own_code import with_code
from tests.tiny import llama

MIXED = Path(__file__).parents[1] / "data" / "gguf-q2_k-llamacpp-qwen2"  # v in another type than q and k


def started(folder: Path, **options: Any) -> Engine:
    options = {"dtype": "bfloat16", **options}
    return Engine(EngineConfig.of(model=str(folder), device="cpu", max_model_len=96, **options))


def answers(engine: Engine) -> list[list[int]]:
    texts = [[token % engine.loaded.vocab for token in text] for text in prompts(6, shared=20)]
    asked = [Request(str(i), text, SamplingParams(max_tokens=5, **GREEDY)) for i, text in enumerate(texts)]
    found = drain(engine, asked)
    return [tokens(found[r.id]) for r in asked]


def fused_modules(engine: Engine) -> int:
    return sum(isinstance(m, Norm | Slice) or "forward" in vars(m) for m in engine.loaded.model.modules())


@pytest.mark.parametrize("options", [{}, {"quantization": "int4-g128"}])
def test_same_tokens(options: dict[str, Any], tmp_path: Path) -> None:
    folder = llama(tmp_path, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    plain, fused = started(folder, fusion="off", **options), started(folder, fusion="strict", **options)
    assert answers(plain) == answers(fused)
    assert fused_modules(plain) == 0 and not hasattr(plain.loaded.model, "fewbit_fused")
    assert fused.loaded.model.fewbit_fused.count("merged") == 4 and fused_modules(fused) > 0
    for engine in (plain, fused):
        engine.shutdown()


WHOLE = ("mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "glm4", "olmo2", "cohere2", "mixtral",
         "qwen3_moe", "gpt_oss", "deepseek_v3")  # fmt: skip


@pytest.mark.parametrize("model_type", WHOLE)
def test_all_of_an_architecture(model_type: str, tmp_path: Path) -> None:
    """Nothing is refused, and the tokens are those of transformers' own layers."""
    folder = saved.save(saved.model(model_type), tmp_path)
    plain, fused = (started(folder, dtype="float32", fusion=way) for way in ("off", "strict"))
    assert answers(plain) == answers(fused)
    assert fused.loaded.model.fewbit_fused.count("sums") and fused.loaded.model.fewbit_fused.count("glu")
    for engine in (plain, fused):
        engine.shutdown()


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_experts_that_are_quantized(model_type: str, tmp_path: Path) -> None:
    """They are fused as dense ones are, which the plan has seen."""
    folder = saved.save(saved.model(model_type), tmp_path)
    options = {"dtype": "float32", "quantization": "int4-g32"}
    plain, fused = (started(folder, fusion=way, **options) for way in ("off", "strict"))
    assert answers(plain) == answers(fused)
    gates = [path for path, module in fused.loaded.model.named_modules() if hasattr(module, experts.GATE)]
    assert gates and all(path.endswith("experts") for path in gates)
    for engine in (plain, fused):
        engine.shutdown()


def test_strict_refuses_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the twin refuses is known by then."""
    folder = saved.save(saved.model("nemotron", num_key_value_heads=8), tmp_path)
    monkeypatch.setattr(build, "prepare", lambda *_: pytest.fail("weights were to be read"))
    with pytest.raises(UnsupportedError, match="fusion=strict") as found:
        started(folder, fusion="strict")
    assert "NemotronLayerNorm1P" in found.value.reasons[0] and len(found.value.reasons) == 1


def test_siblings_of_several_formats(caplog: pytest.LogCaptureFixture) -> None:
    """Only the checkpoint knows that: strict says so once it is read, without strict it is said and goes on."""
    with pytest.raises(UnsupportedError, match="fusion=strict") as found:
        started(MIXED, fusion="strict")
    (reason,) = found.value.reasons
    assert "q_proj + k_proj + v_proj (model.layers.0.self_attn and 1 more): left as it is, int3" in reason
    with caplog.at_level(logging.INFO, "fewbit.engine"):
        started(MIXED).shutdown()
    assert [m for m in caplog.messages if m.startswith("not fused")] == [f"not fused: {reason}"]


@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "fp8", "kv_scale": 1.0}])
def test_attention_turns_what_it_attends_to(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotate hands on what it was given, and the answers are those of a model that turns before attention."""
    folder = llama(tmp_path)
    engine, plain = started(folder, **options), started(folder, **options)
    setattr(plain.loaded.model, LATE, False)
    claimed, found = rotary.claimed, []
    monkeypatch.setattr(paged.rotary, "claimed", lambda *given: found.append(claimed(*given)) or found[-1])
    late = answers(engine)
    assert found and all(turning is not None for turning in found)
    found.clear()
    assert late == answers(plain) and found and not any(found)


def test_what_comes_to_attention_otherwise_is_turned_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = llama(tmp_path)
    wanted = answers(started(folder))
    monkeypatch.setattr(rotary.Turning, "gave", lambda *_: False)
    with caplog.at_level(logging.INFO, "fewbit.engine"):
        assert answers(started(folder)) == wanted
    assert sum("turned before attention" in record.message for record in caplog.records) == 1


def test_ranks_turn_before_attention_alike(tmp_path: Path) -> None:
    """What comes to attention is a copy: each begins its step again, with what ranks exchange in it."""
    folder = saved.save(saved.model("phi"), tmp_path)
    one, two = (started(folder, dtype="float32", tensor_parallel_size=size) for size in (1, 2))
    assert two.loaded.model.fewbit_fused.count("rotary")
    assert answers(one) == answers(two)
    for engine in (one, two):
        assert not getattr(engine.loaded.model, LATE)
        engine.shutdown()


def test_nothing_that_is_left_is_lost() -> None:
    q, k, table = torch.ones(1, 2, 3, 8), torch.ones(1, 1, 3, 8), torch.ones(1, 3, 8)
    turn = rotary.Rotate(lambda *_: None, rotary.RotaryForm(), 1)
    with pytest.raises(rotary.Astray, match="no attention of ours"), rotary.late():
        turn(q, k, table, table)
    with pytest.raises(rotary.Astray, match="others still wait"), rotary.late():
        turn(q, k, table, table)
        turn(q, k, table, table)
    with pytest.raises(rotary.Astray, match="something else"), rotary.late():
        found = turn(q, k, table, table)
        rotary.claimed(found[0] * 2, found[1])
    with rotary.late():
        turning = rotary.claimed(*turn(q, k, table, table))
        assert turning is not None and torch.equal(
            turning.attended()[0], rotary.rotate(q, k, table, table, turn.form)[0]
        )
    assert turn(q, k, table, table)[0] is not q and rotary.claimed(q, k) is None


def wrong(monkeypatch: pytest.MonkeyPatch, *kinds: str) -> None:
    """Kernels that are right at the sizes of a twin alone."""
    act_mul, normed = glu.act_mul, norm.norm
    if "glu" in kinds:
        monkeypatch.setattr(glu, "act_mul", lambda g, u, *by: act_mul(g, u, *by) * (1.5 if g.shape[-1] == 256 else 1))
    if "sums" in kinds:
        add = residual.add_normed
        monkeypatch.setattr(residual, "add_normed", lambda x, *rest: add(x * (9 if x.shape[-1] == 128 else 1), *rest))
    if "norm" in kinds:
        monkeypatch.setattr(norm.fused, "takes_norm", lambda *_: False)
        monkeypatch.setattr(norm, "norm", lambda x, *rest: normed(x, *rest) * (1.5 if x.shape[-1] == 128 else 1))


@pytest.mark.parametrize("kinds", [("glu",), ("norm",), ("sums",), ("glu", "norm")])
def test_what_only_the_real_model_shows(
    kinds: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A few tokens through the loaded model find what the twin is too small for. transformers' code comes back."""
    folder = llama(tmp_path)
    plain = answers(started(folder, fusion="off"))
    wrong(monkeypatch, *kinds)
    monkeypatch.setattr(fusion, "asked", lambda *_: True)
    with caplog.at_level(logging.INFO, "fewbit.engine"):
        engine = started(folder)
    assert answers(engine) == plain
    left = set(kinds) if len(kinds) == 1 else {"sums", "norm", "glu", "rotary"}  # none is the one alone
    fused = engine.loaded.model.fewbit_fused
    assert {d.kind for d in fused.decisions if d.refused} == left
    there = [k for k in fusion.KINDS if k in ("norm", "glu", "rotary")]  # what is in it
    assert [fused.count(k) > 0 for k in ("merged", *there)] == [True, *(k not in left for k in there)]
    assert sum("not fused: " in m and "logits of a few tokens differ by 0." in m for m in caplog.messages) == len(left)
    with pytest.raises(UnsupportedError, match="rounding allows"):
        started(folder, fusion="strict")


def test_a_kernel_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the model's sizes alone: as one that differs."""
    folder, real = llama(tmp_path), glu.act_mul
    monkeypatch.setattr(glu, "act_mul", lambda g, u, *by: real(g, u, *by) if g.shape[-1] != 256 else 1 / 0)
    monkeypatch.setattr(fusion, "asked", lambda *_: True)
    fused = started(folder).loaded.model.fewbit_fused
    refused = [d for d in fused.decisions if d.refused]
    assert {d.kind for d in refused} == {"glu"} and fused.count("norm") == 5
    assert all("a few tokens fail with what is fused, ZeroDivisionError" in d.reason for d in refused)


def test_rounding_is_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kernel does it: all in float32, and one rounding at the end."""
    monkeypatch.setattr(
        glu, "act_mul", lambda g, u, by, _: glu.multiplied(g.float(), u.float(), by).to(g.dtype)
    )  # more exact than the model's own code
    engine = started(llama(tmp_path), fusion="strict")
    assert engine.loaded.model.fewbit_fused.count("glu") == 2


def test_distance() -> None:
    a = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    assert fusion.distance(a, a) == fusion.distance(a + 3, a + 3) == 0
    assert fusion.distance(a * 1.1, a) == pytest.approx(0.1, rel=1e-3)
    assert fusion.distance(torch.where(torch.arange(8)[:, None] == 0, -a, a), a) == 0  # one token alone
    assert fusion.distance(a * float("nan"), a) == float("inf") and fusion.distance(a, a * float("inf")) == 0


def test_what_is_one_kernel_already_is_no_refusal(tmp_path: Path) -> None:
    model = started(saved.save(saved.model("opt"), tmp_path), fusion="strict").loaded.model
    assert any(not d.kept for d in model.fewbit_fused.decisions)


def test_when_it_is_asked_for() -> None:
    """Where INC measures, modules stay as they are, which strict cannot have."""
    measuring: Any = SimpleNamespace(measures=True)

    def asked(how: str, session: Any = None) -> bool:
        return fusion.asked(EngineConfig.of(model="x", fusion=how), session)

    assert [asked(how) for how in ("off", "auto", "strict")] == [False, True, True]
    assert [asked(how, measuring) for how in ("off", "auto")] == [False, False]
    with pytest.raises(UnsupportedError, match="mode MEASURE fuses nothing"):
        asked("strict", measuring)


def test_unknown() -> None:
    with pytest.raises(RequestError, match="fusion='of': known are off, auto, strict"):
        EngineConfig.of(model="x", fusion="of")


IN_PLACE = """
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP
class OwnConfig(LlamaConfig):
    model_type = "fewbit_own"
class OwnMLP(LlamaMLP):
    late = 0
    def forward(self, x):
        gate = self.act_fn(self.gate_proj(x))
        if self.late:
            x.mul_(1.25)
        return self.down_proj(gate * self.up_proj(x))
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.__class__ = OwnMLP
            if layer.self_attn.layer_idx >= 2:  # the twin has no such layer
                layer.mlp.late = 1
"""


def test_what_is_changed_in_place_between_siblings(tmp_path: Path) -> None:
    folder = with_code(small.folder(tmp_path / "own", num_hidden_layers=4), IN_PLACE)
    options = {"trust_remote_code": True, "dtype": "float32"}
    plain, fused = started(folder, fusion="off", **options), started(folder, **options)
    assert fused.loaded.model.fewbit_fused.count("merged") == 8
    assert answers(plain) == answers(fused)
    for engine in (plain, fused):
        engine.shutdown()


SWITCHED = IN_PLACE.replace("x.mul_(1.25)", "gate = gate.abs()")


def test_ranks_are_held_against_the_model_too(tmp_path: Path) -> None:
    """An activation that the twin has not seen: each alone, and two in step."""
    folder = with_code(small.folder(tmp_path / "own", num_hidden_layers=4), SWITCHED)
    options = {"trust_remote_code": True, "dtype": "float32"}
    found = []
    for more in ({"fusion": "off"}, {}, {"tensor_parallel_size": 2}):
        engine = started(folder, **options, **more)
        found.append(answers(engine))
        if "fusion" not in more:
            assert {d.kind for d in engine.loaded.model.fewbit_fused.decisions if d.refused} == {"glu"}
        engine.shutdown()
    assert found[0] == found[1] == found[2]
    with pytest.raises(UnsupportedError, match="logits of a few tokens differ"):
        started(folder, fusion="strict", tensor_parallel_size=2, **options)
