"""Parted: what ranks do about a linear of whose columns each has some, so that together they compute what one would.

Each gives its part of a sum. An input rounded by a scale of its whole row needs the largest of all parts first: kernels
that take codes get them made by it, others an input that is rounded already.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from fewbit.kernels.input_rounding import Rounding, Wanted, offer, offered
from fewbit.kernels.near import Near


class Ranks(Protocol):
    """Processes (or threads) that run the same forward in lock step, each on its part of the weights.

    near: by which kernels exchange numbers themselves, where they can.
    """

    rank: int
    size: int

    @property
    def near(self) -> Near | None: ...

    def reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks."""

    def largest(self, x: Tensor) -> Tensor:
        """The largest over all ranks, element by element."""

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """All ranks' parts side by side along the last axis; sizes: of each rank's."""


@dataclass(slots=True)
class Parted:
    """What is done before a linear and after.

    gathers: how much each rank has of an input that all need whole. how: the kernel rounds its input, where it
    takes codes that others made; rounded: else, what rounds it in software.
    """

    ranks: Ranks
    gathers: Sequence[int] = ()
    how: Rounding | None = None
    rounded: Callable[[Tensor, Ranks], Tensor] | None = None

    def given(self, x: Tensor) -> Tensor:
        """What the linear is given in place of x: [..., K]."""
        if self.gathers:
            x = self.ranks.gather(x, self.gathers)
        if self.how is not None:
            return self.coded(x, self.how)
        return x if self.rounded is None else self.rounded(x, self.ranks)

    def coded(self, x: Tensor, how: Rounding) -> Tensor:
        """x, with codes for who rounds it as `how`."""
        from fewbit.kernels.triton_quantize import quantize_rows

        agreed = replace(how, ranks=self.ranks)
        codes = offered(x, agreed) or quantize_rows(x.reshape(-1, x.shape[-1]), agreed)
        return offer(x.view_as(x), Wanted(how), codes)
