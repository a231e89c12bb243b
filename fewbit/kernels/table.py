"""Where the texts of a step lie, as tensors that kernels on a GPU read: no list of slots is made for any request.

A page holds `size` tokens, and slot = page x size + place. A CUDA graph keeps the tensors and has new contents copied
into them, so what sizes a grid (ones, longest, reach) are plain numbers that bound what the tensors say.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Table:
    """Requests that have one row each come first."""

    pages: Tensor  # [B, P] int32: pages of each request in order of its text; what is beyond its own is never read
    lengths: Tensor  # [B] int32: tokens in the cache once this step has written its own; 0: rows that stand for nobody
    starts: Tensor  # [B + 1] int32: where each request's rows begin among the step's tokens
    ones: int  # so many leading requests have exactly one row
    longest: int  # an upper bound of the rows of any request
    reach: int  # an upper bound of `lengths`
    size: int  # tokens of a page
