"""What a model is cut into for several ranks, as plain values. Rows and columns are runs: (start, stop) pairs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Block:
    """A linear whose input falls apart into units that are made independently, and what makes them.

    Paths are relative to a layer. makers: linear, or first projection of a stack -> the rows of it that each unit
    needs; several units may need the same ones, as heads that share keys. params: vectors cut the same way.
    """

    reader: str
    unit: int  # channels
    units: int
    makers: Mapping[str, tuple[Runs, ...]]
    params: Mapping[str, tuple[Runs, ...]]
    stack: bool = False

    @property
    def host(self) -> str:
        """The module that the reader belongs to."""
        return self.reader.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Stack:
    """A stack of experts, any of which may live on any rank."""

    host: str
    count: int


@dataclass(frozen=True, slots=True)
class Looked:
    """What can be cut in each decoder layer. path: of the list of layers; head: of the output head, "" for none."""

    path: str
    layers: tuple[tuple[Block | Stack, ...], ...]
    head: str = ""


@dataclass(frozen=True, slots=True)
class Cut:
    """What one rank holds of one matrix or vector.

    rows: these of a maker (or of a vector), in this order. columns: those of a reader. experts: those of a stack.
    whole: a reader whose columns lie in an order of their own: it is given its whole input, of `sizes` on each rank.
    """

    kind: Literal["rows", "columns", "experts"]
    runs: Runs
    sizes: tuple[int, ...] = ()
    whole: bool = False

    @property
    def count(self) -> int:
        return length(self.runs)


def length(runs: Runs) -> int:
    return sum(stop - start for start, stop in runs)


def runs_of(mask: Tensor) -> Runs:
    """mask: [n] bool -> the runs of True."""
    places = mask.nonzero().flatten().tolist()
    return merged((p, p + 1) for p in places)


def merged(runs: Iterable[tuple[int, int]]) -> Runs:
    """Sorted, neighbours joined, the same rows once."""
    out: list[tuple[int, int]] = []
    for start, stop in sorted(set(runs)):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(stop, out[-1][1])
        else:
            out.append((start, stop))
    return tuple(out)


def chained(runs: Iterable[tuple[int, int]]) -> Runs:
    """In the order given, neighbours joined; rows may come twice."""
    out: list[tuple[int, int]] = []
    for start, stop in runs:
        if out and start == out[-1][1]:
            out[-1] = out[-1][0], stop
        else:
            out.append((start, stop))
    return tuple(out)
