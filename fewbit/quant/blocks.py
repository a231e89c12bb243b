"""Blocks: seeing a matrix as a grid of rectangles, and spreading one value per rectangle back over it."""

from collections.abc import Iterable, Sequence
from itertools import product
from math import gcd, lcm

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewbit.errors import SpecError
from fewbit.quant.qtensor import grid
from fewbit.quant.spec import FLAT

Block = tuple[int, int]
At = tuple[int | slice, ...]  # an index of every leading axis, then a range of rows


def blocked(x: Tensor, block: Block) -> Tensor:
    """x: [..., N, K] -> [..., R, rows, C, cols], a view where the blocks divide, padded with zeros where not."""
    n, k = x.shape[-2:]
    if block[0] == FLAT:
        x, n, k, block = x.flatten(-2).unsqueeze(-2), 1, n * k, (1, block[1])
    rows, cols = block[0] or n, block[1] or k
    if n % rows or k % cols:
        x = pad(x, (0, -k % cols, 0, -n % rows))
    return torch.unflatten(torch.unflatten(x, -1, (-1, cols)), -3, (-1, rows))


def unblocked(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse: [..., R, rows, C, cols] -> [..., N, K] of the given shape."""
    n, k = shape[-2:]
    flat = x.flatten(-4, -3).flatten(-2)
    if flat.shape[-2] == 1 and n > 1:  # FLAT
        return torch.unflatten(flat[..., 0, : n * k], -1, (n, k))
    return flat[..., :n, :k]


def per_block(values: Tensor) -> Tensor:
    """values: [..., R, C] -> [..., R, 1, C, 1], which broadcasts over `blocked`."""
    return values.unsqueeze(-1).unsqueeze(-3)


def row_unit(blocks: Iterable[Block], k: int) -> int:
    """The least number of rows of k columns that ends on an edge of every block that has one."""
    rows = [cols // gcd(cols, k) if rows == FLAT else rows for rows, cols in blocks]
    return lcm(*(r for r in rows if r))


def pieces(shape: Sequence[int], blocks: Iterable[Block], size: int) -> list[At]:
    """Cut [*leading, N, K] into runs of rows of about `size` values that end on block edges."""
    *leading, n, k = shape
    unit = row_unit(blocks, k)
    step = max(1, size // max(1, k) // unit) * unit
    runs = [slice(start, min(start + step, n)) for start in range(0, n, step)]
    return [(*index, run) for index in product(*map(range, leading)) for run in runs]


def part(values: Tensor, at: At, block: Block, shape: Sequence[int]) -> Tensor:
    """The values of a grid [*leading, R, C] that belong to one of `pieces`."""
    run, values = at[-1], values[at[:-1]]
    rows, cols = block
    if rows == 0 or not isinstance(run, slice):
        return values
    if rows == FLAT:
        k = shape[-1]
        return values[:, run.start * k // cols : -(-run.stop * k // cols)]
    return values[run.start // rows : -(-run.stop // rows)]


def regrid(values: Tensor, shape: tuple[int, ...], outer: Block, inner: Block) -> Tensor:
    """values: one per outer block -> one per inner block, where each inner block lies inside one outer block."""
    rows, cols = grid(shape, inner)
    if outer == (0, 0):
        return values
    if (outer[0] == FLAT) != (inner[0] == FLAT):
        raise SpecError(f"a block of {outer} cannot hold blocks of {inner}")
    for axis, size in ((-2, rows), (-1, cols)):
        o, i = outer[axis], inner[axis]
        whole = i == 0 or (axis == -2 and i == FLAT)
        if o == 0 or whole or o == i:
            if whole and o not in (0, i):
                raise SpecError(f"a block of {outer} cannot hold blocks of {inner}")
            continue
        if o % i:
            raise SpecError(f"a block of {outer} cannot hold blocks of {inner}")
        values = values.repeat_interleave(o // i, dim=axis).narrow(axis, 0, size)
    return values


def largest(x: Tensor, shape: tuple[int, ...], inner: Block, outer: Block) -> Tensor:
    """x: one value >= 0 per inner block -> the largest per outer block."""
    if outer == (0, 0):
        return x.amax((-2, -1), keepdim=True)
    if outer[0] == FLAT:
        return blocked(x, (1, outer[1] // inner[1])).amax((-3, -1))
    n, k = shape[-2:]
    step = tuple(0 if not o else -(-o // (i or size)) for o, i, size in zip(outer, inner, (n, k), strict=True))
    return blocked(x, (step[0], step[1])).amax((-3, -1))


def over(x: Tensor, number: float) -> Tensor:
    """x / number, rounded once on every device: CUDA divides by a scalar as a product with its reciprocal."""
    return x / torch.full((), number, dtype=x.dtype, device=x.device)


def finite_or_raise(w: Tensor) -> float:
    """-> the largest magnitude. NaN, Inf, and values that rounding up could make Inf, are errors naming the element."""
    low, high = torch.aminmax(w)
    top = 2 * torch.maximum(-low, high)
    if bool(torch.isfinite(top)):
        return top.item() / 2
    bad = (~torch.isfinite(2 * w)).nonzero()
    where = bad[0].tolist()
    raise SpecError(
        f"cannot encode: element {where} of {list(w.shape)} is {w[tuple(where)].item()}"
        f" ({len(bad)} such elements); weights must be finite, and below half of what float32 holds"
    )
