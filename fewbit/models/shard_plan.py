"""Where to cut: units dealt out to ranks so that no quantization block and no head falls apart.

What does not fit is not cut: every rank then holds it whole, and computes the same.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

from fewbit.models.shard_round import spanning
from fewbit.models.shard_values import Block, Cut, Runs, Stack, chained, merged
from fewbit.quant.spec import FLAT, Format

Stored = tuple["Piece", ...]  # how a matrix is stored, along its rows; () = dense
Lookup = Callable[[str], Stored]
WHOLE = ("low_rank", "rotate")  # transforms that mix columns: a reader with one is not cut
UNEVEN = 1.5  # times an even share: from there on, whole experts are dealt out instead
HEAD = 64  # rows of the output head that stay together


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows start to stop of a matrix with K columns, in a format."""

    start: int
    stop: int
    columns: int
    format: Format

    def fits_rows(self, edge: int) -> bool:
        """Whether the matrix may be cut before this row."""
        at = edge - self.start
        if not 0 < at < self.stop - self.start:
            return True
        return all(at * self.columns % cols == 0 if rows == FLAT else not rows or at % rows == 0
                   for rows, cols in self.blocks)  # fmt: skip

    def fits_columns(self, edge: int) -> bool:
        element = self.format.weight.element
        if any(rows == FLAT for rows, _ in self.blocks) or set(self.format.transforms) & set(WHOLE):
            return False
        run = element.run if element.kind == "run" else 1
        act = [scale.block[1] for scale in self.format.act.scales] if self.format.act else []
        return all(not cols or edge % cols == 0 for cols in (run, *act, *(cols for _, cols in self.blocks)))

    @property
    def spans(self) -> bool:
        """Whether its input is rounded by scales of all channels, chosen at each call."""
        return self.format.act is not None and bool(spanning(self.format.act))

    @property
    def blocks(self) -> list[tuple[int, int]]:
        return [scale.block for scale in (*self.format.weight.scales, *self.format.weight.zeros)]


@dataclass(frozen=True, slots=True)
class Dealt:
    """A block's units on each rank: [start, stop). shared: some rows are on several ranks."""

    ranges: tuple[tuple[int, int], ...]
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Heads:
    """A rank's share of a block: what was so many, and what it is there. groups: which of the rarest rows, in order."""

    units: tuple[int, int]
    width: tuple[int, int]
    total: int
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of a layer. cuts: by path of a matrix, vector or stack. heads: by reader."""

    cuts: dict[str, Cut]
    heads: dict[str, Heads]


def plan(items: Sequence[Block | Stack], stored: Lookup, size: int) -> list[Share]:
    """One layer -> what each rank holds of it."""
    out = [Share({}, {}) for _ in range(size)]
    stacks = set()
    for block in (item for item in items if isinstance(item, Block)):
        if (dealt := deal(block, stored, size)) is not None:
            stacks |= {block.host} if block.stack else set()
            for rank in range(size):
                out[rank].cuts.update(cuts(block, dealt, stored, rank))
                out[rank].heads[block.reader] = heads(block, dealt, rank)
    for item in items:
        if isinstance(item, Stack) and item.host not in stacks and item.count >= size:
            for rank, held in enumerate(even(item.count, size)):
                out[rank].cuts[item.host] = Cut("experts", (held,))
    return out


def deal(block: Block, stored: Lookup, size: int) -> Dealt | None:
    """Ranges of units for all ranks, or None where the block stays whole."""
    for shared in (False, True):
        chosen = nearest(list(edges(block, stored, shared)), block.units, size)
        if chosen is None:
            continue
        ranges = tuple(pairwise((0, *chosen, block.units)))
        if block.stack and max(b - a for a, b in ranges) * size >= UNEVEN * block.units:
            return None
        return Dealt(ranges, shared)
    return None


def edges(block: Block, stored: Lookup, shared: bool) -> Iterator[int]:
    """Units before which the block may be cut. shared: rows may be needed on both sides."""
    if block.stack and any(piece.spans for piece in stored(block.reader)):
        return  # each expert's rows would have to be agreed on
    everything = {**block.makers, **block.params}
    reach = 0  # the last unit that needs what the units before need
    held: dict[str, set[int]] = {path: set() for path in block.makers}
    for path, runs in block.makers.items() if shared else ():
        held[path] = {edge for each in runs for run in each for edge in run}
    for u in range(1, block.units):
        for runs in everything.values():
            reach = max(reach, len(runs) - 1 - runs[::-1].index(runs[u - 1]))
        for path, runs in block.makers.items() if not shared else ():
            if runs[u - 1] not in runs[: u - 1]:
                held[path] ^= {edge for run in runs[u - 1] for edge in run}
        if (
            (shared or reach < u)
            and all(piece.fits_columns(u * block.unit) for piece in stored(block.reader))
            and all(piece.fits_rows(edge) for path, at in held.items() for piece in stored(path) for edge in at)
        ):
            yield u


def nearest(admitted: Sequence[int], units: int, size: int) -> tuple[int, ...] | None:
    """size - 1 of the admitted edges, each as near to an even share as the others leave it."""
    if len(admitted) < size - 1:
        return None
    chosen: list[int] = []
    for rank in range(1, size):
        left = admitted[len(chosen) : len(admitted) - (size - 1 - rank)]
        left = [edge for edge in left if not chosen or edge > chosen[-1]]
        chosen.append(min(left, key=lambda edge: (abs(edge * size - units * rank), -edge)))
    return tuple(chosen)


def cuts(block: Block, dealt: Dealt, stored: Lookup, rank: int) -> dict[str, Cut]:
    """What one rank holds of a block's matrices and vectors."""
    start, stop = dealt.ranges[rank]
    sizes = tuple(block.unit * (b - a) for a, b in dealt.ranges)
    permuted = any("permute" in piece.format.transforms for piece in stored(block.reader))
    columns = (start * block.unit, stop * block.unit)
    out = {block.reader: Cut("columns", (columns,), sizes, whole=permuted)}
    for path, runs in {**block.makers, **block.params}.items():
        out[path] = Cut("rows", rows_of(runs[start:stop], dealt.shared))
    return out


def heads(block: Block, dealt: Dealt, rank: int) -> Heads:
    start, stop = dealt.ranges[rank]
    rarest = min(block.makers.values(), key=lambda runs: len(set(runs)))
    known = sorted(set(rarest))
    held = [known.index(each) for each in rarest[start:stop]]
    uneven = dealt.shared and len({held.count(g) for g in held}) > 1
    width = block.unit * block.units, block.unit * (stop - start)
    return Heads((block.units, stop - start), width, len(known), tuple(held if uneven else dict.fromkeys(held)))


def rows_of(runs: Sequence[Runs], shared: bool) -> Runs:
    """Each class of rows once; where ranks share some, and units have unlike shares of them, once for each unit."""
    counts = {each: runs.count(each) for each in runs}
    if shared and len(set(counts.values())) > 1:
        return chained(run for each in runs for run in each)
    return merged(run for each in counts for run in each)


def even(count: int, size: int) -> list[tuple[int, int]]:
    """count things for size ranks, the first ones with one more where it does not divide."""
    ends = [-(-count * rank // size) for rank in range(size + 1)]
    return list(pairwise(ends))


def head_cuts(rows: int, stored: Stored, size: int) -> list[Cut] | None:
    """The output head by runs of rows, or None where it stays whole."""
    run = gcd(rows, HEAD)
    admitted = [edge for edge in range(run, rows, run) if all(piece.fits_rows(edge) for piece in stored)]
    chosen = nearest(admitted, rows, size)
    if chosen is None:
        return None
    ranges = list(pairwise((0, *chosen, rows)))
    sizes = tuple(b - a for a, b in ranges)
    return [Cut("rows", (held,), sizes) for held in ranges]
