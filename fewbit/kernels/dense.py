"""Linears with plain weights, by our own loops where they are faster than torch."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from fewbit.kernels import few, packed
from fewbit.kernels.compiled import left


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [..., K], weight: [N, K] -> [..., N]."""
    k = x.shape[-1]
    rows = x.numel() // k if k else 0
    learning = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not rows or learning or x.dtype != weight.dtype or x.device != weight.device or not weight.is_contiguous():
        return linear(x, weight, bias)
    if x.is_cuda:
        if rows > few.TILE or not few.takes(flat := x.reshape(rows, k), weight, bias, x.dtype):
            return linear(x, weight, bias)
        return few.rows(flat, weight, x.dtype, bias=bias).view(*x.shape[:-1], -1)
    if x.dtype != torch.bfloat16 or left() or (run := packed.dense(rows, k)) is None:
        return linear(x, weight, bias)
    y = run(x.reshape(rows, k).contiguous(), weight).view(*x.shape[:-1], -1)
    return y if bias is None else y.add_(bias)
