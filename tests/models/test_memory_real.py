"""The memory rule on the two real models: as the GGUF that they are, and quantized on arrival from a dense copy."""

from pathlib import Path

import pytest

import fewbit
from fewbit import codecs
from tests import real
from tests.models.memory import MIB, measure_each

SLACK = 64 * MIB
FORMATS: tuple[dict[str, str], ...] = ({"format": "int4-g64"}, {"format": "nvfp4"}, {"format": "int8-channel"})


def largest(path: Path) -> int:
    """The largest tensor of a checkpoint, as it is on disk."""
    with codecs.open(path) as source:
        return max(entry.nbytes for entry in (*source.modules.values(), *source.dense.values()))


@pytest.mark.parametrize("model", [real.smollm2, real.gemma3])
def test_peak(model: object, tmp_path: Path) -> None:
    gguf = model()  # type: ignore[operator]
    dense = tmp_path / "dense"
    fewbit.convert(gguf, dense, "dense", dtype="bf16")
    cases = [(gguf, {}), *((dense, arguments) for arguments in FORMATS)]
    for (path, arguments), (peak, final) in zip(cases, measure_each(cases), strict=True):
        asked = f"{path.name} {arguments or 'as it is'}"
        figures = [round(x / MIB) for x in (final, largest(path), peak)]
        print(f"| {gguf.name} | {asked} | {figures[0]} | {figures[1]} | {figures[2]} |")
        assert peak <= final + largest(path) + SLACK, f"{asked}: final, largest, peak: {figures} MiB"
