"""The certificate: what it says of our kernels is in docs/, and a kernel that is wrong does not get one."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit.errors import SpecError
from fewbit.kernels import registry
from fewbit.kernels.compiled import library
from fewbit.kernels.registry import REFERENCE, Kernel
from fewbit.quant.formats import FORMATS
from fewbit.quant.reference import decode
from fewbit.workflows.certify import certify, identity, rows, writable

PAGE = Path(__file__).parents[2] / "docs" / "certificate.md"
ALL = writable()
MINE = next(k for k in registry.KERNELS if k.name == REFERENCE)
Run = Callable[[Tensor, Any, Tensor | None], Tensor]


def told() -> dict[tuple[str, str, str], tuple[str, ...]]:
    """(format, kernel, dtype) -> what the page says of it: inputs, bound, verdict."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    found = {}
    for kernel, dtype, _, *said, names in (row for row in rows if row[0] != "kernel"):
        for name in names.split(", "):
            found[name, kernel, dtype] = tuple(said)
    return found


def test_names_that_people_know() -> None:
    assert rows(["FP8", "nvfp4", "W8A8"]) == ["fp8-tensor-static", "nvfp4", "int8-channel-a8"]
    for name in ("Q4_K_M", "dense"):
        with pytest.raises(SpecError, match="not one format"):
            rows([name])
    with pytest.raises(SpecError, match="near"):
        rows(["fp9"])


@pytest.mark.parametrize("names", [ALL[i::6] for i in range(6)], ids=range(6))
def test_the_page_is_true(names: list[str]) -> None:
    there, which = told(), ["packed", REFERENCE]
    if isinstance(library("packed"), str):
        which = [REFERENCE]
    for one in certify(names, which=which):
        assert one.ok, one
        assert there[one.format, one.kernel, one.dtype] == (one.inputs, f"{one.bound:.1e}", "holds")


def test_the_page_has_every_format() -> None:
    there = told()
    for name in ALL:
        assert {dtype for row, kernel, dtype in there if (row, kernel) == (name, REFERENCE)} == {
            "float32", "bfloat16", "float16",
        }  # fmt: skip


def doubtful(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    wrong = Kernel("wrong", "linear", (), (torch.float32,), lambda *_: None, MINE.prepack, run)
    monkeypatch.setattr("fewbit.workflows.certify.kernels", lambda: (wrong,))


def nudged(y: Tensor) -> Tensor:
    return torch.cat([y[..., :-1], y[..., -1:] * (1 + 2**-10)], -1)


WRONG: dict[str, Run] = {
    "a value": lambda x, packed, bias: nudged(MINE.run(x, packed, bias)),
    "inputs": lambda x, packed, bias: MINE.run(x, replace_act(packed), bias),
    "sums": lambda x, packed, bias: MINE.run(x, packed, bias) + (1e-3 if len(x) == 65 else 0.0),
    "rows": lambda x, packed, bias: MINE.run(x[:1].expand_as(x), packed, bias),
    "NaN": lambda x, packed, bias: MINE.run(x, packed, bias).index_fill(0, torch.tensor([len(x) - 1]), float("nan")),
}  # fmt: skip


def replace_act(packed: Any) -> Any:
    q = packed.source
    return replace(packed, source=replace(q, format=replace(q.format, act=None)))


@pytest.mark.parametrize("kind", WRONG)
def test_no_certificate(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    doubtful(monkeypatch, WRONG[kind])
    (one,) = certify(["fp8-channel"])
    assert not one.ok, one


def test_identity() -> None:
    for name in ALL:
        if FORMATS[name].act is not None:
            assert torch.equal(decode(identity(FORMATS[name].weight, 256)), torch.eye(256)), name


def test_unknown_kernel() -> None:
    with pytest.raises(SpecError, match="kernel marlin is not known; known: packed"):
        list(certify(["fp8-channel"], which=["marlin"]))


def test_command() -> None:
    command = [sys.executable, "-m", "fewbit", "certify", "int8-channel-a8", "--kernel", REFERENCE, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and [one["ok"] for one in found] == [True] * 3
    assert {one["inputs"] for one in found} == {"equal"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is here")
def test_a_device_that_is_not_here() -> None:
    command = [sys.executable, "-m", "fewbit", "certify", "fp8-tensor", "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "torch sees 0 such devices" in done.stderr and "Traceback" not in done.stderr
