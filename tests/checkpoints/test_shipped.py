"""What the repository carries of the peers' checkpoints: one module of each, and one whole model."""

from pathlib import Path

import pytest

from fewbit import codecs
from fewbit.files.safetensors import open_safetensors
from fewbit.quant.qtensor import Quantized
from fewbit.workflows.refit import effective
from tests.checkpoints.compare import compare, table

DATA = Path(__file__).parents[1] / "data"
MODULES = sorted(p.parent for p in DATA.glob("*/expected.safetensors"))
WHOLE = sorted(p.parent for p in DATA.glob("*/reference.safetensors"))


@pytest.mark.parametrize("folder", MODULES, ids=lambda p: p.name)
def test_rows_that_the_tool_itself_decoded(folder: Path) -> None:
    with open_safetensors(folder / "expected.safetensors") as file, codecs.open(folder) as source:
        ((label, want),) = ((name, file.read(name)) for name in file.tensors)
        module = label.removeprefix("dequantized.").partition(".weight")[0]
        assert list(source.modules) in ([module], []), source.problems
        value = source.read(module) if source.modules else source.read(f"{module}.weight")
    weight = effective(value) if isinstance(value, Quantized) else value.float()
    gap = (weight[: len(want)] - want.float()).abs().max() / want.abs().max()
    assert gap <= 2.0**-7  # the tools decode in bfloat16 or float16: the scale and the product are rounded


@pytest.mark.parametrize("folder", WHOLE, ids=lambda p: p.name)
def test_whole_model(folder: Path) -> None:
    row = compare(folder)
    assert row.ok, table([row])


def test_there_is_something_to_test() -> None:
    assert len(MODULES) >= 25 and len(WHOLE) == 1
