"""Experts on a GPU in one launch, quantized or plain; x is sorted by expert.

How many rows each expert has only the device need know. The grid has room for the most tiles that so many rows can
fall into, so its size follows from shapes alone and a call can stand in a CUDA graph. A row of y depends on no other
row while the mean of rows to an expert keeps its tile height.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fewbit.kernels import torch_dequant, triton_linear
from fewbit.kernels.coded import Coded, coded, plain
from fewbit.kernels.rounded import rounded
from fewbit.kernels.torch_dequant import listed
from fewbit.quant.qtensor import Quantized
from fewbit.quant.spec import Format, QuantSpec


def supports(format: Format, device: torch.device, dtype: torch.dtype) -> str | None:
    if format.act is not None and not by_row(format.act):
        return "takes activations whose scales are chosen for each row, not one for all rows of an expert"
    if format.transforms:
        return f"takes no transforms, not {', '.join(format.transforms)}"
    return triton_linear.supports(format, device, dtype)


def by_row(act: QuantSpec) -> bool:
    """Rounding a row looks at nothing but the row, so all experts' rows are rounded at once."""
    return all(scale.dynamic and scale.block[0] == 1 for scale in (*act.scales, *act.zeros))


def prepack_experts(q: Quantized) -> Coded | None:
    """Transforms are each expert's own: such a stack is left."""
    return None if q.transforms else coded(q)


def run_experts(x: Tensor, packed: Coded, rows: Sequence[int] | Tensor, token: Tensor | None = None) -> Tensor:
    """x: [S, K] sorted by expert; rows: how many belong to each, in all S or fewer -> [S, N], undefined beyond them.

    token: [S], which row of x [T, K] each of them is; x is not sorted then.
    """
    q = packed.source
    assert q is not None
    if torch.is_grad_enabled() and x.requires_grad:
        return torch_dequant.run_experts(x if token is None else x[token], q, listed(rows))
    seen = rounded(x, q.format.act, {}) if q.format.act else x
    counts = rows if isinstance(rows, Tensor) else torch.tensor(rows, device=x.device)
    return grouped(seen.contiguous(), packed, counts, token)


def run_plain(x: Tensor, weight: Tensor, transposed: bool, counts: Tensor, token: Tensor | None = None) -> Tensor:
    """weight: [E, N, K], or [E, K, N] transposed; x, counts and token as in run_experts."""
    return grouped(x.contiguous(), plain(weight, transposed), counts, token)


def grouped(x: Tensor, w: Coded, counts: Tensor, token: Tensor | None) -> Tensor:
    """x: [S, K], or [T, K] and token: [S]; counts: [E] -> [S, N]."""
    size, experts = len(x if token is None else token), len(counts)
    y = x.new_empty(size, w.n)
    if size:
        tiling = triton_linear.tiling_for(-(-size // experts), x.dtype)
        high = min(size, (size + min(experts, size) * (tiling.m - 1)) // tiling.m)
        triton_linear.launch(x, y, w, None, counts, tiling, (high, 1, -(-w.k // tiling.k)), token)
    return y
