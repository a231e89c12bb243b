"""Where the texts of a step lie, as tensors that kernels on a GPU read: no list of slots is made for any request.

A page holds `size` tokens, and slot = page x size + place. A CUDA graph keeps the tensors and has new contents copied
into them, so what sizes a grid (ones, longest, reach, the length of blocks) are plain numbers that bound what the
tensors say.

Without `blocks` the requests of one row come first, `ones` of them. With it they stand anywhere: of the first `ones`
requests decoding takes those with one row, and leaves the others alone; prefill takes the blocks that are listed, best
those first that see most.

A step's own keys and values come beside it, with the turn by their places that they and the queries may still need.
"""

from dataclasses import dataclass

from torch import Tensor

BLOCK = 128  # rows of a request that a line of `blocks` stands for


@dataclass(slots=True)
class Table:
    pages: Tensor  # [B, P] int32: pages of each request in order of its text; what is beyond its own is never read
    lengths: Tensor  # [B] int32: tokens in the cache once this step has written its own; 0: rows that stand for nobody
    starts: Tensor  # [B + 1] int32: where each request's rows begin among the step's tokens
    ones: int  # so many leading requests have exactly one row; with blocks: are decoding's where they have
    longest: int  # an upper bound of the rows of any request
    reach: int  # an upper bound of `lengths`
    size: int  # tokens of a page
    blocks: Tensor | None = None  # [N, 2] int32: request (-1: none) and the row of it that a block begins with


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary embedding that is yet to be done, as modules.rotary has it. cos, sin: [B or 1, T or 1, R]."""

    cos: Tensor
    sin: Tensor
    reads: bool  # pairs are neighbours in what is read, in what is written
    writes: bool
    table: str
    wide: bool

    @property
    def width(self) -> int:
        """How many channels are turned."""
        return self.cos.shape[-1] * (2 if self.table == "short" else 1)


@dataclass(frozen=True, slots=True)
class New:
    """Keys [1, G, T, D] and values [1, G, T, Dv] of a step, and their slots [T], whole numbers."""

    key: Tensor
    value: Tensor
    slots: Tensor
    rotary: Rotary | None = None  # of keys and queries
