"""plan: sizes that come true to the byte, time and memory from a layer that was run, and nothing written."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewbit.workflows.plan import forecast_of, told
from fewbit.workflows.quantize import quantize
from tests import tiny

LENGTH = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def ids() -> list[Tensor]:
    return list(torch.randint(3, 250, (8, LENGTH), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("form", "to"),
    [("int4-g64", "compressed-tensors"), ("int4-g64", "gptq"), ("int4-g64-asym", "awq"), ("NVFP4", "modelopt"),
     ("FP8", "fp8"), ("FP8_BLOCK", "compressed-tensors"), ("MXFP4", "compressed-tensors")],
)  # fmt: skip
def test_sizes_come_true(form: str, to: str, model: Path, ids: list[Tensor], tmp_path: Path) -> None:
    given = {"algo": "rtn", "to": to, "calib": ids, "length": LENGTH}
    before = sorted(model.iterdir())
    found = forecast_of(model, form, measure=False, **given)
    assert sorted(model.iterdir()) == before and found.seconds is None
    quantize(model, tmp_path / "out", form, report=False, **given)
    file = tmp_path / "out" / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert found.bytes_after == file.stat().st_size - header
    assert {m.name for m in found.modules} & set(found.dense) == set()
    assert "model.embed_tokens" in found.dense and len(found.modules) == 14


def test_time_and_memory_are_measured(model: Path, ids: list[Tensor]) -> None:
    found = forecast_of(model, "int4-g64", algo="gptq", calib=ids, length=LENGTH)
    assert found.seconds is not None and 0 < found.seconds < 120
    assert found.memory is not None and found.memory > 50e6
    assert found.tokens == 8 * LENGTH and found.layer_by_layer
    assert {m.algo for m in found.modules} == {"gptq"} and {m.rule for m in found.modules} == {"default"}
    assert dict(told(found))["calibration"] == "256 tokens"


def test_the_report_holds_it_against_the_run(model: Path, ids: list[Tensor], tmp_path: Path) -> None:
    done = quantize(model, tmp_path / "out", "int4-g64", algo="gptq", calib=ids, length=LENGTH)
    assert done.forecast is not None and done.forecast.seconds is not None
    page = (tmp_path / "out" / "fewbit_report.html").read_text()
    assert "peak memory" in page and "fewbit serve" in page
    card = (tmp_path / "out" / "README.md").read_text()
    assert "quantized_by: fewbit" in card and "int4-g64" in card
    assert (tmp_path / "out" / "fewbit_recipe.yaml").read_text().startswith("version: 1")
    assert (tmp_path / "out" / "fewbit_log.jsonl").read_text().count('"event": "layer"') == 2
