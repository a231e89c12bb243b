"""Metrics as Prometheus reads them, and the other figures."""

from pathlib import Path

import pytest

import fewbit
from fewbit.server.metrics import line
from tests.server.served import Running, engine, running


def test_metrics(folder: Path) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    with running(engine(folder, quantization="int8", kv_cache_dtype="fp8", kv_scale=1.0)) as served:
        assert served.good() and served.good()
        served.post("/v1/completions", {"prompt": "a", "n": -1})
        served.idle()
        text = served.http.get("/metrics").text
        families = {family.name: family for family in parser.text_string_to_metric_families(text)}
        sample = {(s.name, s.labels.get("finished_reason") or s.labels.get("status")): s.value
                  for family in families.values() for s in family.samples}  # fmt: skip
    assert sample["vllm:generation_tokens_total", None] == sample["fewbit_generated_tokens_total", None] == 4
    assert sample["vllm:prompt_tokens_total", None] == 4
    assert sample["vllm:request_success_total", "length"] == sample["fewbit_requests_total", "length"] == 2
    assert sample["vllm:time_to_first_token_seconds_count", None] == 2
    assert sample["vllm:num_requests_running", None] == sample["vllm:kv_cache_usage_perc", None] == 0
    assert sample["fewbit_http_responses_total", "400"] == 1
    kernels = {(s.labels["kernel"], s.labels["format"]): s.value for s in families["fewbit_kernel_modules"].samples}
    assert {form for _, form in kernels} == {"int8-channel-a8", "bfloat16"} and kernels["dense", "bfloat16"] == 1
    assert families["fewbit_cache_info"].samples[0].labels == {
        "kv": "e4m3 x f32[tensor]", "scales": "1.0, given", "held": "codes"}  # fmt: skip
    assert sample["fewbit_saturated_total", None] == 0
    assert sample["fewbit_nan_rows_total", None] == 0


def test_labels_hold_anything() -> None:
    assert line("n", {"a": 'x"\\\n'}, 1) == 'n{a="x\\"\\\\\\n"} 1'


def test_facts(served: Running) -> None:
    assert served.http.get("/version").json() == {"version": fewbit.__version__}
    assert served.http.get("/info").json()["engine"]["max_model_len"] == 512
    assert served.http.get("/stats").json()["pages_total"] > 0
    assert served.http.get("/v1/models/tiny").json()["id"] == "tiny"
    assert served.http.get("/v1/models/a/b").json()["error"]["code"] == "model_not_found"
    assert served.http.get("/health").status_code == served.http.get("/ping").status_code == 200
    assert served.http.get("/v1/completions").json()["error"]["message"].startswith("GET")
    assert served.post("/v1/embeddings", {}).status_code == 501


def test_tokens_there_and_back(served: Running) -> None:
    text = "hé <s> 你好"
    found = served.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert served.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": text}
