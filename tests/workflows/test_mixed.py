"""mixed: a size is kept, and a mixture loses less than the uniform format of that size."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import fewbit
from fewbit.errors import RequestError
from fewbit.workflows.mixed import Choice, choose, fill, hull_of, pattern
from fewbit.workflows.quantize import quantize
from tests import tiny

LENGTH = 64
GIVEN = {"length": LENGTH, "dtype": "float32"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=3, hidden_size=256)


@pytest.fixture(scope="module")
def ids() -> list[Tensor]:
    return list(torch.randint(3, 250, (16, LENGTH), generator=torch.Generator().manual_seed(0)))


def divergence(model: Path, out: Path, ids: list[Tensor]) -> float:
    x = torch.stack(ids[8:])
    wanted, got = (fewbit.load(p, dtype=torch.float32)(x).logits.log_softmax(-1) for p in (model, out))
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


def bits(out: Path) -> float:
    return fewbit.inspect(out).quantized_bits_per_weight


def test_a_mixture_beats_the_uniform_format(model: Path, ids: list[Tensor], tmp_path: Path) -> None:
    quantize(model, tmp_path / "uniform", "int4-g64", algo="rtn", report=False, **GIVEN)
    size = bits(tmp_path / "uniform")
    recipe = choose(model, bits=size, formats=["int3-g64", "int4-g64", "int5-g64", "int8-g64"], calib=ids, **GIVEN)
    assert recipe.rules
    quantize(model, tmp_path / "mixed", recipe, algo="rtn", report=False, **GIVEN)
    assert bits(tmp_path / "mixed") <= size
    assert divergence(model, tmp_path / "mixed", ids) < divergence(model, tmp_path / "uniform", ids)
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    quantize(model, tmp_path / "again", tmp_path / "again.yaml", algo="rtn", report=False, **GIVEN)
    files = [tmp_path / name / "model.safetensors" for name in ("mixed", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    formats = {m.name: m.format for m in fewbit.inspect(tmp_path / "mixed").modules}
    for layer in range(3):
        p = f"model.layers.{layer}."
        assert len({formats[p + f"self_attn.{n}_proj"] for n in "qkv"}) == 1
        assert formats[p + "mlp.gate_proj"] == formats[p + "mlp.up_proj"]


def test_a_size_of_the_whole_checkpoint(model: Path, ids: list[Tensor], tmp_path: Path) -> None:
    size = 1_000_000
    recipe = choose(model, size=size, formats=["int4-g64", "int8-g64", "dense"], calib=ids, **GIVEN)
    quantize(model, tmp_path / "out", recipe, algo="rtn", report=False, **GIVEN)
    assert 0.7 * size < (tmp_path / "out" / "model.safetensors").stat().st_size <= size + 20_000  # and its header


def test_targets_that_cannot_be_met(model: Path, ids: list[Tensor]) -> None:
    with pytest.raises(RequestError, match="below what the smallest candidates give"):
        choose(model, bits=2.0, formats=["int3-g64", "int4-g64"], calib=ids, **GIVEN)
    with pytest.raises(RequestError, match="give one of"):
        choose(model, formats=["int3-g64", "int4-g64"], calib=ids, **GIVEN)
    with pytest.raises(RequestError, match="two formats or more"):
        choose(model, bits=4.0, formats=["int4-g64"], calib=ids, **GIVEN)


def test_money_goes_where_it_saves_most() -> None:
    a = Choice(("a",), 0, {"s": 10, "m": 20, "l": 40}, {"s": 8.0, "m": 2.0, "l": 1.0})
    b = Choice(("b",), 1, {"s": 10, "m": 20, "l": 40}, {"s": 1.0, "m": 0.9, "l": 0.0})
    useless = Choice(("c",), 0, {"s": 10, "m": 20, "l": 40}, {"s": 1.0, "m": 1.5, "l": 0.5})
    assert hull_of(a) == ["s", "m", "l"] and hull_of(b) == ["s", "l"] and hull_of(useless) == ["s", "l"]
    fill([a, b], {0: 1.0, 1: 1.0}, 30)
    assert (a.chosen, b.chosen) == ("m", "s")
    fill([a, b], {0: 1.0, 1: 100.0}, 60)
    assert (a.chosen, b.chosen) == ("m", "l")


def test_patterns_name_just_these() -> None:
    from fewbit.workflows.recipe import Rule

    names = ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]
    rule = Rule(pattern(names), "dense")
    assert all(rule.hits(name) for name in names)
    assert not any(rule.hits(n) for n in ("model.layers.11.self_attn.q_proj", "model.layers.1.self_attn.v_proj"))
    experts = [f"model.layers.0.mlp.experts.{e}.up_proj" for e in range(12)]
    assert all(Rule(pattern(experts), "dense").hits(name) for name in experts)
