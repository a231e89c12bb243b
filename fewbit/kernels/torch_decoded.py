"""The reference with its weights decoded once, for work that runs a layer many times and then lets it go.

Never chosen by itself: it holds the weight in the float type of the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from fewbit.kernels.rounded import rounded
from fewbit.kernels.torch_dequant import expert, listed, low_rank
from fewbit.quant.qtensor import Quantized
from fewbit.quant.reference import decode, transformed


@dataclass(slots=True)
class Decoded:
    """A Quantized and its values, decoded when the dtype of the input is known."""

    source: Quantized
    weight: Tensor | None = None

    def values(self, dtype: torch.dtype) -> Tensor:
        if self.weight is None or self.weight.dtype != dtype:
            self.weight = decode(self.source.weight).to(dtype)
        return self.weight


def prepack_linear(q: Quantized) -> Decoded:
    return Decoded(q)


def run_linear(x: Tensor, packed: Decoded, bias: Tensor | None = None) -> Tensor:
    """x: [..., K] -> [..., N]."""
    q = packed.source
    x = transformed(x, q.transforms)
    seen = rounded(x, q.format.act, q.act) if q.format.act else x
    return low_rank(x, q.transforms, linear(seen, packed.values(x.dtype), bias))


def prepack_experts(q: Quantized) -> tuple[Decoded, ...]:
    return tuple(Decoded(expert(q, e)) for e in range(q.weight.shape[0]))


def run_experts(x: Tensor, packed: Sequence[Decoded], rows: Sequence[int] | Tensor) -> Tensor:
    """x: [S, K] sorted by expert, rows: how many belong to each -> [S, N]."""
    counts = listed(rows)
    over = x.new_zeros(len(x) - sum(counts), packed[0].source.weight.shape[-2])
    runs = zip(x[: sum(counts)].split(counts), packed, strict=True)
    return torch.cat([*(run_linear(run, one) for run, one in runs if len(run)), over])
