"""The JSON of QUANT_CONFIG: every key, its default, and what is refused with the nearest that is known."""

import json
from pathlib import Path
from typing import Any

import pytest

from fewbit.errors import CheckpointError, FewbitError, RequestError, UnsupportedError
from fewbit.inc import config
from fewbit.inc.scales import METHODS, REFUSED, UNITS, Method, Rule

MEASURE = {"method": "HOOKS", "mode": "MEASURE", "observer": "maxabs", "measure_exclude": "OUTPUT",
           "allowlist": {"types": [], "names": []}, "blocklist": {"types": [], "names": ["lm_head"]},
           "dump_stats_path": "./out/inc_output"}  # fmt: skip
QUANTIZE = {"mode": "QUANTIZE", "observer": "maxabs", "scale_method": "maxabs_hw", "scale_format": "scalar",
            "fp8_config": "E4M3", "allowlist": {"types": [], "names": []}, "blocklist": {"types": [], "names": []},
            "dump_stats_path": "./out/inc_output"}  # fmt: skip


def test_defaults() -> None:
    found = config.parsed({})
    assert (found.mode, found.observer, found.stats, found.exclude, found.interval) == (
        "QUANTIZE", "maxabs", "stats", "OUTPUT", 0)  # fmt: skip
    assert found.unit is UNITS["GAUDI3", "E4M3"] and found.methods.default is METHODS["MAXABS_HW"]
    assert (found.input_backoff, found.weight_backoff, found.asked_dtype) == (0.25, 0.5, None)
    assert not found.allow and not found.block and found.flags == config.FLAGS


def test_documented_files(tmp_path: Path) -> None:
    for given, mode in ((MEASURE, "MEASURE"), (QUANTIZE, "QUANTIZE")):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(given))
        assert config.read(path).mode == mode
    assert config.parsed(MEASURE).takes(("model.layers.0.self_attn.qkv_proj",), frozenset({"Linear"}))
    assert not config.parsed(MEASURE).takes(("lm_head",), frozenset({"ParallelLMHead"}))


SAME: list[tuple[dict[str, Any], str, Any]] = [
    ({"mode": "measure"}, "mode", "MEASURE"), ({"mode": "None"}, "mode", "NONE"), ({"mode": "shape"}, "mode", "SHAPE"),
    ({"observer": "MAXABS_PER_CHANNEL"}, "observer", "maxabs_per_channel"), ({"mode": "SHAPE"}, "observer", "shape"),
    ({"mode": "measure", "observer": "SAVE"}, "observer", "save"),
    ({"fp8_config": "e5m2"}, "unit", UNITS["GAUDI3", "E5M2"]), ({"device_for_scales": "gaudi2"}, "unit",
                                                                UNITS["GAUDI2", "E4M3"]),
    ({"hp_dtype": "fp32"}, "asked_dtype", "float32"), ({"measure_exclude": "none"}, "exclude", "NONE"),
    ({"scale_params": {"input_backoff": 1}}, "input_backoff", 1.0),
    ({"scale_params": {"weight_backoff": 0.75}}, "weight_backoff", 0.75),
    ({"calibration_sample_interval": 4}, "interval", 4),
    *(({"scale_method": name.lower()}, "methods.default", METHODS[name]) for name in METHODS),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(SAME)))
def test_values(case: int) -> None:
    given, name, want = SAME[case]
    found: Any = config.parsed(given)
    for part in name.split("."):
        found = getattr(found, part)
    assert found == want


WRONG: list[tuple[Any, type[FewbitError], str]] = [
    ([], RequestError, "want a JSON object"),
    ({"scale_metod": "maxabs_hw"}, RequestError, "did you mean scale_method"),
    ({"separate_measure_files": True}, RequestError, "did you mean seperate_measure_files"),
    ({"mode": "MEASUR"}, RequestError, "did you mean MEASURE"),
    ({"scale_method": "maxabs_hv"}, RequestError, "did you mean MAXABS_HW"),
    ({"observer": "minmax"}, RequestError, "no such value"),
    ({"fp8_config": 4}, RequestError, "known: E4M3, E5M2"),
    ({"blocklist": {"types": ["Matmull"]}}, RequestError, "did you mean Matmul"),
    ({"blocklist": {"nmes": []}}, RequestError, "did you mean names"),
    ({"blocklist": {"names": ["("]}}, RequestError, "no regular expression"),
    ({"blocklist": ["lm_head"]}, RequestError, "an object with types and names"),
    ({"blocklist": {}, "blacklist": {}}, RequestError, "one key under two names"),
    ({"scale_params": {"input_backof": 1}}, RequestError, "did you mean input_backoff"),
    ({"scale_params": {"input_backoff": 0}}, RequestError, "above 0 up to 1"),
    ({"use_qdq": "maybe"}, RequestError, "true or false"),
    ({"dump_stats_path": ""}, RequestError, "want a path"),
    ({"calibration_sample_interval": -1}, RequestError, "0 for never"),
    ({"dynamic_quantization": True}, RequestError, "scale_method of tokens: ACT_MAXABS_PCS"),
    ({"use_qdq": True, "scale_method": "maxabs_pcs_pow2"}, RequestError, "one scale per tensor"),
    ({"mode": "MEASURE", "scale_method": "unit_scale"}, RequestError, "reads no measurements"),
    ({"observer": "save"}, RequestError, "no maxima"),
    ({"mode": "LOAD"}, UnsupportedError, "serve it without QUANT_CONFIG"),
    ({"row_parallel_linear_allreduce_quantization": True}, UnsupportedError, "add up their sums"),
    *(({"scale_method": name}, UnsupportedError, name) for name in REFUSED),
    ({"scale_method": {"weight": {"granularity": "PTC"}}}, RequestError, "did you mean PTS"),
    ({"scale_method": {"activation": {"granularity": "PCS"}}}, UnsupportedError, "one maximum per tensor"),
    ({"scale_method": {"layer": {}}}, RequestError, "did you mean layers"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_refusals(case: int) -> None:
    given, error, text = WRONG[case]
    with pytest.raises(error, match=text):
        config.parsed(given)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        config.read(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{'mode': 1}")
    with pytest.raises(CheckpointError, match=r"bad\.json: not JSON"):
        config.read(tmp_path / "bad.json")


NODE, TYPES = ("model.layers.3.mlp.gate_up_proj",), frozenset({"Linear", "MergedColumnParallelLinear"})
LISTED = [  # allowlist, blocklist -> whether the node is taken
    ({}, {}, True),
    ({"types": ["Linear"]}, {}, True),
    ({"types": ["Matmul"]}, {}, False),
    ({"types": ["Matmul"], "names": ["mlp"]}, {}, True),
    ({"names": [r"layers\.4\."]}, {}, False),
    ({}, {"types": ["MergedColumnParallelLinear"]}, False),
    ({}, {"names": ["gate_up"]}, False),
    ({}, {"names": [r"mlp\.gate\b"]}, True),
    ({"types": ["Linear"]}, {"names": [r"layers\.3"]}, False),
]


@pytest.mark.parametrize(("allow", "block", "want"), LISTED)
@pytest.mark.parametrize("old", [False, True])
def test_lists(allow: Any, block: Any, want: bool, old: bool) -> None:
    names = ("whitelist", "blacklist") if old else ("allowlist", "blocklist")
    assert config.parsed(dict(zip(names, (allow, block), strict=True))).takes(NODE, TYPES) == want


def test_methods_of_nodes() -> None:
    own = {"activation": {"rounding_method": "pow2", "backoff": 0.5},
           "weight": {"scale_value_type": "fixed_value", "rounding_method": "scale_unit"}}  # fmt: skip
    given = {"default": "maxabs_pow2", "nodes": {"lm_head": "unit_scale"}, "layers": {"3": own},
             "layer_types": {"matmul": "maxabs_arbitrary"}}  # fmt: skip
    found = config.parsed({"scale_method": given})
    of = found.methods.of
    assert of("lm_head", "linear") is METHODS["UNIT_SCALE"]
    assert of("model.layers.3.x", "matmul") == Method(Rule("pow2", backoff=0.5), Rule("unit", "fixed"))
    assert of("model.layers.1.x", "matmul") is METHODS["MAXABS_ARBITRARY"]
    assert of("model.layers.1.x", "linear") is METHODS["MAXABS_POW2"]
