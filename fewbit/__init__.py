"""fewbit: quantize any Hugging Face language model to any common low-bit format, prove what that cost, and serve it.

Names are imported when first used, so that `import fewbit` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fewbit.errors import (
    CapacityError,
    CheckpointError,
    FewbitError,
    RequestError,
    SpecError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from fewbit.engine.params import SamplingParams
    from fewbit.llm import LLM
    from fewbit.models.build import load
    from fewbit.models.verify import Finding, verify
    from fewbit.quant.elements import Element
    from fewbit.quant.formats import FORMATS
    from fewbit.quant.plan import Plan
    from fewbit.quant.qtensor import QTensor
    from fewbit.quant.spec import Format, QuantSpec, Scale
    from fewbit.registry import dialects, formats, kernels
    from fewbit.workflows.convert import convert
    from fewbit.workflows.doctor import doctor
    from fewbit.workflows.inspect import inspect

__version__ = "0.1.0.dev0"

_HOMES = {
    "LLM": "llm",
    "SamplingParams": "engine.params",
    "load": "models.build",
    "inspect": "workflows.inspect",
    "verify": "models.verify",
    "Finding": "models.verify",
    "quantize": "workflows.quantize",
    "convert": "workflows.convert",
    "diff": "workflows.diff",
    "evaluate": "workflows.evaluate",
    "doctor": "workflows.doctor",
    "dialects": "registry",
    "formats": "registry",
    "kernels": "kernels",  # the folder, which lists itself when called
    "Plan": "codecs",
    "FORMATS": "quant.formats",
    "Element": "quant.elements",
    "Scale": "quant.spec",
    "QuantSpec": "quant.spec",
    "Format": "quant.spec",
    "QTensor": "quant.qtensor",
}

__all__ = [
    "FORMATS",
    "LLM",
    "CapacityError",
    "CheckpointError",
    "Element",
    "FewbitError",
    "Finding",
    "Format",
    "Plan",
    "QTensor",
    "QuantSpec",
    "RequestError",
    "SamplingParams",
    "Scale",
    "SpecError",
    "UnsupportedError",
    "convert",
    "dialects",
    "diff",
    "doctor",
    "evaluate",
    "formats",
    "inspect",
    "kernels",
    "load",
    "quantize",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fewbit' has no attribute {name!r}; it has {', '.join(__all__)}")
    home = import_module(f"fewbit.{_HOMES[name]}")
    value = home if name == "kernels" else getattr(home, name)
    globals()[name] = value
    return value
