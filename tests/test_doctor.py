"""doctor: true on this machine, and right about machines that are not here."""

import json
import platform
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import Any

import pytest
import torch

from fewbit.kernels.registry import FLOATS, Kernel
from fewbit.quant.formats import FORMATS
from fewbit.workflows import doctor as module
from fewbit.workflows.doctor import PACKAGES, doctor, render
from tests.yardstick import within

ROOT = Path(__file__).parents[1]
ZEN5 = {"device": "cpu", "flags": ["avx2", "avx512f", "avx512_vnni"], "capability": None}
OLD_CPU = {"device": "cpu", "flags": ["avx2"], "capability": None}
V100, A100, H100, B200 = (
    {"device": "cuda:0", "flags": [], "capability": list(c)} for c in ((7, 0), (8, 0), (9, 0), (10, 0))
)
LACKS: list[tuple[dict[str, Any], str, str | None]] = [
    (ZEN5, "int8", None),
    (OLD_CPU, "int8", "INT8 needs avx512_vnni or avx_vnni or amx_int8"),
    (ZEN5, "e4m3", "no CPU has FP8"),
    (V100, "int8", "INT8 needs compute capability 7.5, found 7.0"),
    (A100, "int8", None),
    (A100, "e4m3", "FP8 needs compute capability 8.9, found 8.0"),
    (H100, "e4m3", None),
    (H100, "e5m2", None),
    (H100, "e2m1", "FP4 needs compute capability 10.0, found 9.0"),
    (B200, "e2m1", None),
    (B200, "e3m2", None),
    (B200, "nf4", "no hardware multiplies nf4"),
]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return doctor()


def test_it_is_plain_data(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report)) == report


def test_it_tells_the_truth_about_this_machine(report: dict[str, Any]) -> None:
    cpu = report["devices"][0]
    assert cpu["device"] == "cpu"
    assert cpu["cores"] >= 1
    assert 2**28 < cpu["memory_bytes"] < 2**45
    assert report["python"] == platform.python_version()
    found = {package["name"]: package["version"] for package in report["packages"]}
    assert found["torch"] == version("torch")
    assert found["safetensors"] == version("safetensors")
    assert len(report["devices"]) == 1 + (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_every_format_on_every_device_has_a_reason(report: dict[str, Any]) -> None:
    assert len(report["formats"]) == len(report["devices"]) * len(FORMATS)
    for row in report["formats"]:
        assert row["speed"] in module.SPEEDS
        assert row["why"], row
    cpu = {row["format"]: row for row in report["formats"] if row["device"] == "cpu"}
    if cpu["int4-g128"]["kernel"] == "reference":
        assert cpu["int4-g128"]["speed"] == "slow"
    if cpu["nvfp4"]["kernel"] == "reference":
        assert cpu["nvfp4"]["speed"] == "emulated"
        assert "rounded to e2m1" in cpu["nvfp4"]["why"]


def test_the_text_says_it_all(report: dict[str, Any]) -> None:
    text = render(report)
    for part in ("Devices", "Installed", "Formats on cpu", torch.__version__.partition("+")[0], *FORMATS):
        assert part in text
    assert max(map(len, text.splitlines())) < 200


def test_what_is_missing_says_how_to_get_it(report: dict[str, Any]) -> None:
    gone = {"name": "gguf", "version": None, "extra": "test", "use": "x"}
    plain = {"name": "auto-round-lib", "version": None, "extra": "", "use": "x"}
    text = render(report | {"packages": [gone, plain]})
    assert "missing      x (pip install 'fewbit[test]')" in text
    assert "missing      x (pip install auto-round-lib)" in text


def test_the_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {extra for extra, _ in PACKAGES.values()} - {""} <= set(extras)


@pytest.mark.parametrize(("device", "element", "want"), LACKS)
def test_what_hardware_lacks(device: dict[str, Any], element: str, want: str | None) -> None:
    assert module._lack(element, device) == want


@pytest.mark.parametrize(("name", "device", "speed"), [
    ("fp8-channel", A100, "emulated"), ("fp8-channel", H100, "slow"), ("fp8-channel-a16", A100, "slow"),
    ("nvfp4", H100, "emulated"), ("nvfp4", B200, "slow"), ("int4-g128", V100, "slow"),
    ("int8-channel-a8", ZEN5, "slow"), ("int8-channel-a8", OLD_CPU, "emulated"),
])  # fmt: skip
def test_speed_by_the_reference(name: str, device: dict[str, Any], speed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel("reference", "linear", (), FLOATS, lambda *_: None, lambda q: q, lambda *_: torch.zeros(1))
    monkeypatch.setattr(module, "select", lambda *_: (kernel, [("quick", "needs another device")]))
    row = module._speed(FORMATS[name], device)
    assert (row["speed"], row["kernel"], row["refused"]) == (speed, "reference", ["quick: needs another device"])


def test_a_kernel_made_for_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(
        "quick", "linear", (), FLOATS, lambda *_: None, lambda q: q, lambda *_: torch.zeros(1), note="made for it"
    )
    monkeypatch.setattr(module, "select", lambda *_: (kernel, []))
    row = module._speed(FORMATS["nvfp4"], H100)
    assert (row["speed"], row["kernel"], row["why"]) == ("fast", "quick", "made for it")


def test_a_machine_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_proc", lambda path: {})
    cpu = module._cpu()
    assert cpu["flags"] == []
    assert cpu["memory_bytes"] > 0
    assert "none of the vector extensions" in module._device_line(cpu)
    gpu = H100 | {"name": "a GPU", "cores": 132, "memory_bytes": 80 * 2**30}
    assert module._device_line(gpu) == "cuda:0: a GPU, 80 GiB, 132 cores, compute capability 9.0"


def test_it_answers_in_three_seconds() -> None:
    """Of work: waiting for a busy machine is not counted."""
    subprocess.run([sys.executable, "-c", "import fewbit; fewbit.doctor()"], check=True, cwd=ROOT)
    before = getrusage(RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "import fewbit; fewbit.doctor()"], check=True, cwd=ROOT)
    after = getrusage(RUSAGE_CHILDREN)
    assert within(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 3)
