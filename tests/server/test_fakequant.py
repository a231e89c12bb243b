"""ModelOpt's example as a process: its variables, its flags, what it says, and ranks that serve the same."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from fewbit import LLM, SamplingParams
from fewbit.errors import RequestError
from fewbit.serve_fakequant import arguments
from tests.server.served import model
from tests.server.test_serve import Child

ROOT = Path(__file__).parents[2]
CODE = ("import sys, torch; torch.set_num_threads(1); sys.argv[0] = 'serve_fakequant'; "
        "from fewbit.serve_fakequant import main; main()")  # fmt: skip
SMALL = {"QUANT_CALIB_SIZE": "2", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(
        tmp_path_factory.mktemp("fakequant") / "tiny", num_attention_heads=4, num_key_value_heads=2, head_dim=32
    )


def served(folder: Path, *args: object, **env: str) -> tuple[Child, str, str]:
    """-> the server, what it says to a prompt, its metrics."""
    child = Child(folder, "--port", 0, "--served-model-name", "tiny", *args, code=CODE, **{**SMALL, **env}).up()
    body = {"model": "tiny", "prompt": "the fog", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    text = child.post(**body).json()["choices"][0]["text"]
    metrics = httpx.get(child.url + "/metrics", timeout=30, trust_env=False).text
    child.process.terminate()
    assert child.ended() == 0
    return child, text, metrics


def test_variables_reach_the_engine(folder: Path) -> None:
    env = {"QUANT_CFG": "NVFP4_DEFAULT_CFG", "KV_QUANT_CFG": "NVFP4_KV_CFG", "KV_ATTN_MATH": "fp8"}
    child, text, metrics = served(folder, "--kv-cache-dtype", "fp8", **env)
    said = "".join(child.said)
    assert "calibrating on the text that ships" in said and "calibrating on 2 samples" in said
    assert "Traceback" not in said
    assert 'fewbit_kernel_modules{kernel="emulated",format="nvfp4"} 4' in metrics  # siblings are one
    assert 'scales="1.0, locked"' in metrics and "rounded through e2m1" in metrics
    options = {"calib_size": 2, "kv_cache_dtype": "fp8", "kv_attn_math": "fp8"}
    with LLM(folder, fakequant="NVFP4_DEFAULT_CFG", kv_fakequant="NVFP4_KV_CFG", **options) as llm:
        want = llm.generate("the fog", SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
    assert text == want[0].outputs[0].text


def test_ranks_serve_the_same(folder: Path, tmp_path: Path) -> None:
    """One scale for all ranks: magnitudes that two ranks serve with are those of one."""
    env = {"QUANT_CFG": "FP8_DEFAULT_CFG", "KV_QUANT_CFG": "FP8_KV_CFG"}
    texts = [served(folder, "--dtype", "float32", "-tp", size, **env)[1] for size in (1, 2)]
    assert texts[0] == texts[1]


def test_kv_attn_math_wants_a_cache_in_fp8(folder: Path) -> None:
    child = Child(folder, "--port", 0, code=CODE, KV_QUANT_CFG="NVFP4_KV_CFG", KV_ATTN_MATH="fp8", **SMALL)
    assert child.ended() == 1
    said = "".join(child.said)
    assert "kv_attn_math=fp8 wants kv_cache_dtype=fp8" in said and "Traceback" not in said


def test_an_interrupt_while_calibrating(folder: Path) -> None:
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {CODE}"  # as from a terminal
    child = Child(folder, "--port", 0, code=code, QUANT_CFG="NVFP4_AWQ_FULL_CFG", HF_HUB_OFFLINE="1")
    assert child.process.stderr
    assert any("calibrating on" in line and "samples" in line for line in child.process.stderr)
    child.process.send_signal(signal.SIGINT)
    assert child.ended(120) == 130 and "Traceback" not in child.said[-1]


def test_the_example_and_its_help(folder: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "QUANT_CFG": "NVFP4_DEFUALT_CFG"}
    command = [sys.executable, str(ROOT / "examples" / "serve_fakequant.py"), str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=120)
    assert found.returncode == 1 and "near: NVFP4_DEFAULT_CFG" in found.stderr and "Traceback" not in found.stderr
    found = subprocess.run([*command, "--help"], capture_output=True, text=True, env=env, cwd=ROOT, timeout=120)
    assert found.returncode == 0 and "--tensor-parallel-size" in found.stdout and "--fakequant" in found.stdout


DATASET = ["--calib-dataset", "cnn_dailymail"]
LATE = {"QUANT_FILE_PATH": "q.pth", "RECIPE_PATH": "r.yaml", "CALIB_BATCH_SIZE": "4", "QUANT_DATASET": "d"}
CASES: dict[str, tuple[dict[str, str], list[str], list[str]]] = {
    "nothing": ({}, ["m"], ["--fakequant", "NVFP4_DEFAULT_CFG", *DATASET, "m"]),
    "keys alone": ({"KV_QUANT_CFG": "K"}, ["m"], ["--kv-fakequant", "K", *DATASET, "m"]),
    "a file": ({"AMAX_FILE_PATH": "a.pth", "QUANT_CFG": "F"}, ["m"], ["--amax-file", "a.pth", "--fakequant", "F", "m"]),
    "late ones": (LATE, ["m"], ["--amax-file", "q.pth", "--fakequant", "r.yaml", "--calib-batch-size", "4",
                                "--calib-dataset", "d", "m"]),
    "a flag wins": ({"QUANT_CFG": "F"}, ["m", "--fakequant=G"], [*DATASET, "m", "--fakequant=G"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_variables_are_flags(name: str) -> None:
    variables, given, want = CASES[name]
    assert arguments(given, variables) == want


def test_two_for_one_flag() -> None:
    with pytest.raises(RequestError, match="AMAX_FILE_PATH and MODELOPT_STATE_PATH are set"):
        arguments(["m"], {"AMAX_FILE_PATH": "a", "MODELOPT_STATE_PATH": "b"})
