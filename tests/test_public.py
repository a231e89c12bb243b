"""The public names, pinned; and what importing them may cost."""

import subprocess
import sys

import fewbit
from tests.yardstick import within

NAMES = [
    "FORMATS", "LLM", "CapacityError", "CheckpointError", "Element", "FewbitError", "Finding", "Format", "Plan",
    "QTensor", "QuantSpec", "RequestError", "SamplingParams", "Scale", "SpecError", "UnsupportedError", "convert",
    "dialects", "diff", "doctor", "evaluate", "formats", "inspect", "kernels", "load", "quantize", "verify",
]  # fmt: skip


def test_names() -> None:
    assert fewbit.__all__ == NAMES


def test_every_name_resolves() -> None:
    for name in NAMES:
        assert getattr(fewbit, name) is not None


def test_unknown_name_says_what_there_is() -> None:
    try:
        fewbit.quantise  # noqa: B018
    except AttributeError as error:
        assert "convert" in str(error)
    else:
        raise AssertionError("an unknown name must raise")


def test_import_is_light() -> None:
    code = (
        "import sys, fewbit; print(sorted(m for m in ('torch', 'transformers', 'numpy', 'rich') if m in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_import_and_help_are_quick() -> None:
    """Best of five, so that a busy machine does not fail it."""
    assert within(min(seconds("-c", "import fewbit") for _ in range(5)), 0.15)
    assert within(min(seconds("-m", "fewbit", "--help") for _ in range(5)), 0.3)


def seconds(*args: str) -> float:
    import time

    start = time.perf_counter()
    subprocess.run([sys.executable, *args], capture_output=True, check=True)
    return time.perf_counter() - start


def test_kernels_is_callable_before_and_after_the_folder_is_imported() -> None:
    code = "import fewbit; a = fewbit.kernels(); import fewbit.models.build; print(len(a), a == fewbit.kernels())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, same = out.stdout.split()
    assert int(count) >= 2 and same == "True"
