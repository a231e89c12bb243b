"""The last step of a product that cannot do it itself: y times a float32 scale per row and column, plus bias."""

import triton
import triton.language as tl
from torch import Tensor

from fewbit.kernels.triton_early import begin, early
from fewbit.kernels.triton_runtime import cdiv, power

BLOCK = 2048


def scale_(y: Tensor, rows: Tensor | None, columns: Tensor | None, bias: Tensor | None) -> Tensor:
    """y: [M, N], in place; rows: [M, 1] float32, columns: [N] float32, bias: [N]. Computed in float32, rounded once."""
    m, n = y.shape
    if m and n:
        block = min(power(n), BLOCK)
        held = (y if part is None else part for part in (rows, columns, bias))
        _scale[(m, cdiv(n, block))](
            y, *held, n, block, rows is not None, columns is not None, bias is not None, num_warps=4, **early(y.device)
        )
    return y


@triton.jit
def _scale(
    y, rows, columns, bias, n, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(y + row * n + at, mask=inside).to(tl.float32)
    if COLUMNS:
        value *= tl.load(columns + at, mask=inside)
    if ROWS:
        value *= tl.load(rows + row)
    if BIAS:
        value += tl.load(bias + at, mask=inside).to(tl.float32)
    tl.store(y + row * n + at, value.to(y.dtype.element_ty), mask=inside)
