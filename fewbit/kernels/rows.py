"""Rows of a tensor that may be a strided view, as kernels are told of them."""

import torch
from torch import Tensor


def leading(x: Tensor, y: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of the axes before the last, as three; one where both lie without gaps."""
    if x.is_contiguous():
        return (1, 1, x.numel() // x.shape[-1]), (0, 0, x.shape[-1]), (0, 0, x.shape[-1])
    pad = 4 - x.dim()
    return ((1,) * pad + tuple(x.shape[:-1]), (0,) * pad + x.stride()[:-1], (0,) * pad + y.stride()[:-1])


def widest(x: Tensor, *others: Tensor | None) -> torch.dtype:
    found = x.dtype
    for other in others:
        found = found if other is None else torch.promote_types(found, other.dtype)
    return found


def times(x: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """x: [..., N] times float32 scales of its rows, [M, 1], and of its columns, [N]; rounded once."""
    if rows is None and columns is None:
        return x
    wide = x.float() if columns is None else x.float() * columns
    return (wide if rows is None else wide * rows.view(*x.shape[:-1], 1)).to(x.dtype)
