"""Ways to run an op: one file per kernel, one table of them, one function that chooses.

`fewbit.kernels` is this folder and, as the public name, the function that lists them; so the module can be called.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Listing(ModuleType):
    def __call__(self) -> Any:
        return import_module("fewbit.registry").kernels()


sys.modules[__name__].__class__ = _Listing
