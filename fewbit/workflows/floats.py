"""Floats: a checkpoint with every quantized module seen as the dense weight that does the same."""

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from fewbit.codecs.source import Source
from fewbit.workflows.refit import effective


@dataclass(frozen=True, slots=True)
class Plain:
    """A dense tensor as headers describe one."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * {"F64": 8, "F32": 4}.get(self.dtype, 2)


class Floats:
    """A Source without quantized modules; what is not about tensors is the Source's own."""

    def __init__(self, source: Source, dtype: str):
        self.source = source
        self.modules: dict[str, Any] = {}
        self.kv: dict[str, dict[str, str]] = {}
        decoded = {self.key(name, e.shape): Plain(dtype, tuple(e.shape)) for name, e in source.modules.items()}
        self._stored = {self.key(name, e.shape): name for name, e in source.modules.items()}
        self.dense: dict[str, Any] = {**source.dense, **decoded}

    @staticmethod
    def key(name: str, shape: tuple[int, ...]) -> str:
        """Stacks of experts are tensors of their own; a linear's weight is."""
        return name if len(shape) > 2 else f"{name}.weight"

    def read(self, name: str) -> Tensor:
        value = self.source.read(self._stored.get(name, name))
        return effective(value) if name in self._stored else value  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)
