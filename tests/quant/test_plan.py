"""Plan: matchers, order, rules that hit nothing, bad patterns, and dispatch by quant_method."""

from itertools import permutations

import pytest

from fewbit.errors import SpecError, UnsupportedError
from fewbit.quant.formats import FORMATS
from fewbit.quant.plan import Plan, Rule

INT4, FP8 = FORMATS["int4-g128"], FORMATS["fp8-channel"]
NAME = "model.layers.10.mlp.down_proj"
MATCHES = [
    ("exact", NAME, True), ("exact", "model.layers.10.mlp", False), ("exact", "down_proj", False),
    ("regex", r"model\.layers\.\d+\.mlp", True), ("regex", r".*down_proj$", True), ("regex", "mlp", False),
    ("regex", r"model\.layers\.1\.", False),
    ("glob", "*.down_proj", True), ("glob", "model.layers.1?.*", True), ("glob", "down_proj", False),
    ("glob", "MODEL*", False),
    ("substring", "mlp.down", True), ("substring", "layers.1", True), ("substring", "up_proj", False),
    ("class", "Linear", True), ("class", "Embedding", False), ("class", NAME, False),
    ("any", "", True), ("any", "nothing like it", True),
]  # fmt: skip


@pytest.mark.parametrize(("match", "pattern", "hit"), MATCHES)
def test_matchers(match: str, pattern: str, hit: bool) -> None:
    rule = Rule(pattern, match, INT4, "here")  # type: ignore[arg-type]
    assert rule.hits(NAME, "Linear") is hit
    assert Plan((rule,)).for_module(NAME) == ((INT4, rule) if hit else (None, None))


def test_the_first_rule_that_matches_wins() -> None:
    skip = Rule("lm_head", "exact", None, "config.json: quantization_config.ignore[0]")
    down = Rule(r".*down_proj", "regex", FP8, "config_groups.group_1")
    rest = Rule("Linear", "class", INT4, "config_groups.group_0")
    plan = Plan((skip, down, rest))
    assert plan.for_module("lm_head") == (None, skip)
    assert plan.for_module(NAME) == (FP8, down)
    assert plan.for_module("model.layers.0.mlp.up_proj") == (INT4, rest)
    assert plan.for_module("model.embed_tokens", "Embedding") == (None, None)
    assert Plan((rest, down)).for_module(NAME) == (INT4, rest)
    assert Plan().for_module(NAME) == (None, None)


def test_any_order_of_rules_is_read_from_the_top() -> None:
    rules = (
        Rule(NAME, "exact", INT4), Rule(NAME, "exact", None), Rule("mlp", "substring", FP8),
        Rule("lm_head", "exact", FP8), Rule("Linear", "class", None),
    )  # fmt: skip
    for order in permutations(rules):
        for name in (NAME, "lm_head", "model.layers.0.self_attn.q_proj"):
            first = next((rule for rule in order if rule.hits(name, "Linear")), None)
            assert Plan(order).for_module(name) == (first and first.format, first)


def test_rules_that_hit_nothing_are_named() -> None:
    rules = tuple(
        Rule(pattern, match, None)  # type: ignore[arg-type]
        for pattern, match in (
            (".*qkv_proj", "regex"),
            (NAME, "exact"),
            ("*", "glob"),
            ("Conv1d", "class"),
            ("", "any"),
        )
    )
    idle = Plan(rules).idle(iter([NAME, "lm_head"]))
    assert [rule.pattern for rule in idle] == [".*qkv_proj", "Conv1d"]
    assert [rule.pattern for rule in Plan(rules).idle([])] == [".*qkv_proj", NAME, "*", "Conv1d"]


@pytest.mark.parametrize("pattern", ["(", "*.down_proj", "a{2,1}"])
def test_a_bad_pattern_names_its_place(pattern: str) -> None:
    with pytest.raises(SpecError, match=r"dynamic\[2\]: .* is not a regular expression"):
        Plan((Rule(pattern, "regex", None, "quantize_config.json: dynamic[2]"),))
    Plan((Rule(pattern, "glob", None),))


def test_from_config_finds_the_config_and_asks_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []

    def read(config: dict[str, object]) -> Plan:
        seen.append(config)
        return Plan(dialect="toy")

    monkeypatch.setattr("fewbit.quant.plan.READERS", [read])
    inner = {"quant_method": "Toy_Four", "bits": 4}
    for config in (inner, {"quantization_config": inner}, {"compression_config": inner, "model_type": "llama"}):
        assert Plan.from_config(config).dialect == "toy"
    assert seen == [inner] * 3


def test_from_config_through_the_real_dialects() -> None:
    import fewbit

    nested = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    for config, name in (({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"), (nested, "modelopt")):
        plan = fewbit.Plan.from_config(config)
        assert plan.dialect == name and plan.for_module("model.layers.0.mlp.up_proj")[0] is not None
        assert plan.for_module("lm_head")[0] is None
    with pytest.raises(UnsupportedError, match="nope"):
        fewbit.Plan.from_config({"quant_method": "nope"})
