"""What observation found, as plain values.

A path in a layer is relative to it, and names what reads an input: a linear, whose parameter is `path.weight`, or a
stack of experts [E, N, K], which is the parameter itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewbit.errors import SpecError

Layout = Literal["all", "first", "last", "grouped", "even", "odd"]
LAYOUTS: tuple[Layout, ...] = ("all", "last", "first", "even", "odd", "grouped")


@dataclass(frozen=True, slots=True)
class Source:
    """Where s can be taken out of a group's input exactly: the weight of a norm, or rows of another linear.

    offset: of a norm that multiplies by offset + weight. layout: which rows of a linear make the channels, all of them,
    a first or last share, every other one, or the last share of each of several equal runs. Each run of `block` rows
    serves `repeat` runs of channels, as in grouped-query attention; block 0: the rows are one run. head: channels in
    runs of this length may be turned among themselves; 0: they may not.
    """

    kind: Literal["norm", "linear"]
    path: str
    offset: int = 0
    layout: Layout = "all"
    repeat: int = 1
    block: int = 0
    head: int = 0
    named: str = ""  # the attribute of a module that says `block` and `head`

    def rows(self, n: int, k: int) -> Tensor:
        """-> [k] long: the row, of n, that makes each channel."""
        block = self.block or k // self.repeat
        runs = k // (block * self.repeat)
        step = 2 if self.layout in ("even", "odd") else 1
        stride = n // runs if self.layout == "grouped" else block * step
        starts = {"last": n - runs * block, "grouped": stride - block, "odd": 1}
        run = torch.arange(runs)[:, None, None] * stride
        at = starts.get(self.layout, 0) + run + torch.arange(block) * step
        return at.expand(runs, self.repeat, block).reshape(-1)

    def heads(self, n: int, k: int, size: int) -> Tensor:
        """-> [heads, size] long: the rows of each run that may be turned, each run once."""
        return self.rows(n, k).view(-1, self.repeat, size)[:, 0]


@dataclass(frozen=True, slots=True)
class Group:
    """Linears and stacks that read one tensor. also: other modules that read it and whose weight can be scaled."""

    linears: tuple[str, ...]
    source: Source | None = None
    also: tuple[str, ...] = ()

    @property
    def readers(self) -> tuple[str, ...]:
        return (*self.linears, *self.also)


@dataclass(frozen=True, slots=True)
class LayerWiring:
    """One decoder layer. readers: what reads the residual stream, norms and plain readers; writers: what adds to it."""

    index: int
    kind: str  # what the config calls a layer of this kind
    structure: frozenset[tuple[str, str]]  # (path, class) of every module in it
    groups: tuple[Group, ...]
    readers: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()

    def group_of(self, path: str) -> Group | None:
        return next((g for g in self.groups if path in g.linears), None)


@dataclass(frozen=True, slots=True)
class Stream:
    """The two ends of the residual stream, by full path. reasons: why it cannot be rotated; none: it can.

    heads: whether values can be rotated too, within each head, between their projection and the output's.
    """

    embedding: str = ""
    norm: Source | None = None  # the last one
    head: str = ""
    heads: bool = False
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """A candidate that the twin did not confirm."""

    what: str
    why: str
    error: float | None = None

    def __str__(self) -> str:
        return f"{self.what}: {self.why}" + (f" ({self.error:.2g})" if self.error is not None else "")


def structure(layer: nn.Module) -> frozenset[tuple[str, str]]:
    return frozenset((path, type(module).__name__) for path, module in layer.named_modules())


def kind(config: Any, index: int) -> str:
    """What the config calls the layer."""
    types = getattr(config.get_text_config(), "layer_types", None)
    return str(types[index]) if isinstance(types, list | tuple) and index < len(types) else ""


def parameter(weights: Mapping[str, Tensor], path: str) -> str:
    """The parameter of a path: a linear's or a norm's weight, or a stack itself."""
    for name in (f"{path}.weight", path):
        if name in weights:
            return name
    raise SpecError(f"{path}: no weight of that name; the layer has {', '.join(sorted(weights))}")


def bias_of(name: str) -> str:
    """The bias beside a weight."""
    return f"{name.removesuffix('weight')}bias" if name.endswith(".weight") else f"{name}_bias"
