"""quantize with its layers on a GPU: every algorithm, close to what the CPU gives, the same bytes twice."""

from pathlib import Path

import pytest
import torch

import fewbit
from fewbit.workflows.evaluate import evaluate
from fewbit.workflows.quantize import quantize
from tests import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CASES = [
    ("int4-g64", "rtn", "compressed-tensors"), ("int4-g64", "gptq", "gptq"), ("int4-g64-asym", "awq", "awq"),
    ("W8A8", "smooth+gptq", "compressed-tensors"), ("int2-g64", "autoround", "auto-round"),
    ("NVFP4", "gptq", "modelopt"),
    ("int4-g64", "hqq", "compressed-tensors"), ("q8_0", "imatrix", "gguf"), ("int4-g64", "rotate+gptq", "gptq"),
    ("FP8", "rtn", "compressed-tensors"),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def ids() -> list[torch.Tensor]:
    return list(torch.randint(3, 250, (8, 32), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("form", "algo", "to"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_close_to_the_cpu(form: str, algo: str, to: str, model: Path, ids: list[torch.Tensor], tmp_path: Path) -> None:
    if to == "gguf":
        pytest.skip("the tiny model has no tokenizer, which a GGUF file must hold")
    given = {"algo": algo, "to": to, "calib": ids, "length": 32, "dtype": "float32", "report": False}
    if algo == "autoround":
        given["options"] = {"iters": 10}
    errors = []
    wanted = fewbit.load(model, dtype=torch.float32)(torch.stack(ids)).logits
    for device in ("cpu", "cuda", "cuda"):
        out = tmp_path / f"{device}{len(errors)}"
        quantize(model, out, form, device=device, **given)
        assert not [f for f in fewbit.verify(out) if f.severity == "error"]
        got = fewbit.load(out, dtype=torch.float32)(torch.stack(ids)).logits
        errors.append(float((got - wanted).norm() / wanted.norm()))
    assert errors[1] < 1.15 * errors[0] + 0.01
    first, second = ((tmp_path / f"cuda{i}" / "model.safetensors").read_bytes() for i in (1, 2))
    assert first == second


@pytest.mark.parametrize("form", ["int4-g64", "FP8_DYNAMIC", "NVFP4A16", "int8-channel"])
def test_data_free_files_are_the_cpus(form: str, model: Path, tmp_path: Path) -> None:
    """Read ahead through pinned memory, encoded there, written as shards by several threads: the same bytes."""
    for device in ("cpu", "cuda"):
        quantize(model, tmp_path / device, form, algo="rtn", device=device, max_shard=100_000, report=False)
    names = sorted(p.name for p in (tmp_path / "cpu").glob("*.safetensors"))
    assert len(names) > 2 and names == sorted(p.name for p in (tmp_path / "cuda").glob("*.safetensors"))
    assert all((tmp_path / "cpu" / n).read_bytes() == (tmp_path / "cuda" / n).read_bytes() for n in names)


def test_evaluate_agrees_with_the_cpu(model: Path, ids: list[torch.Tensor]) -> None:
    found = [evaluate(model, ids=torch.cat(ids), context=32, device=d, dtype="float32") for d in ("cpu", "cuda")]
    assert abs(found[0].perplexity.value / found[1].perplexity.value - 1) < 1e-4
