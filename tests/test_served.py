"""Emulated and really quantized, both served: equal where kernels are the oracle, explained where they are not."""

import json
from pathlib import Path

import pytest

from fewbit import served
from tests.server.served import model as tiny
from tests.verbs import run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("served"), vocab_size=288)


@pytest.mark.parametrize("form", ["fp8-tensor", "nvfp4", "int8-channel-a8"])
def test_the_reference_says_what_the_emulation_says(model: Path, form: str) -> None:
    found = served.certify(model, form, 128, kernel="reference", dtype="float32")
    assert found.ok and found.parted is None and found.same == found.tokens == 128, found
    assert found.kernel == "reference"


def test_another_kernel(model: Path) -> None:
    found = served.certify(model, "int4-g32", 128)
    assert found.ok and found.same > 0, found


def test_where_texts_part() -> None:
    assert served.compared([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]) == (6, None)
    assert served.compared([[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[1, 2, 3], [4, 0, 6], [0, 8, 9]]) == (4, (1, 1))


def test_the_guilty_module_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that are said to part: the model is looked at layer by layer."""
    monkeypatch.setattr(served, "compared", lambda wanted, found: (0, (0, 0)))
    found = served.certify(model, "fp8-channel", 64, kernel="reference", dtype="float32")
    assert not found.why and not found.ok  # nothing explains it
    found = served.certify(model, "int4-g32", 64, kernel=served.EMULATED)
    assert not found.why
    monkeypatch.setattr(served, "select", lambda *_: pytest.fail("a kernel was named"))
    found = served.certify(model, "fp8-tensor-a16", 64, kernel="packed")
    assert "layers.0" in found.why and found.ok


def test_command(model: Path) -> None:
    done = run("certify", "fp8-tensor", "--model", model, "--tokens", 64, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["tokens"] == 64
