"""Weights decoded once and kept so, inputs rounded at each call: any format on any device, at the size of floats.

Nothing in a call waits for the device but for inputs that are scaled by what all rows of an expert bring. keep: what
was decoded stays beside it, for who looks at that too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.kernels import triton_experts, triton_runtime
from fewbit.kernels.dense import dense_linear
from fewbit.kernels.humming_linear import emptied
from fewbit.kernels.rounded import rounded
from fewbit.kernels.torch_dequant import expert, listed, low_rank
from fewbit.quant.qtensor import Quantized
from fewbit.quant.reference import decode, transformed


@dataclass(frozen=True, slots=True)
class Emulated:
    source: Quantized
    weight: Tensor  # [N, K]


def prepack(q: Quantized, dtype: torch.dtype, keep: bool = False) -> Emulated:
    return Emulated(q if keep else emptied(q), decode(q.weight).to(dtype))


def seen(x: Tensor, q: Quantized) -> Tensor:
    return rounded(x, q.format.act, q.act) if q.format.act else x


def run_linear(x: Tensor, packed: Emulated, bias: Tensor | None = None) -> Tensor:
    """x: [..., K] -> [..., N]."""
    x = transformed(x, packed.source.transforms)
    return low_rank(x, packed.source.transforms, dense_linear(seen(x, packed.source), packed.weight, bias))


def given(x: Tensor, q: Quantized) -> Tensor:
    """What the weight multiplies."""
    return seen(transformed(x, q.transforms), q)


@dataclass(frozen=True, slots=True)
class EmulatedExperts:
    """shared: how the inputs of all experts are rounded alike, row by row; None where each has its own way."""

    source: Quantized
    weight: Tensor  # [E, N, K]
    each: tuple[Emulated, ...]
    shared: Quantized | None


def prepack_experts(q: Quantized, dtype: torch.dtype, keep: bool = False) -> EmulatedExperts:
    weight, source = decode(q.weight).to(dtype), q if keep else emptied(q)
    each = tuple(Emulated(expert(source, e), weight[e]) for e in range(len(weight)))
    act = q.format.act
    by_row = act is None or all(not s.dynamic or s.block[0] == 1 for s in (*act.scales, *act.zeros))
    alike = by_row and not q.transforms and all(bool((plane == plane[:1]).all()) for plane in q.act.values())
    return EmulatedExperts(source, weight, each, each[0].source if alike else None)


def run_experts(x: Tensor, packed: EmulatedExperts, rows: Sequence[int] | Tensor) -> Tensor:
    """x: [S, K] sorted by expert, rows: how many belong to each -> [S, N]."""
    if packed.shared is not None and isinstance(rows, Tensor) and triton_runtime.lacking(x.device) is None:
        return triton_experts.run_plain(seen(x, packed.shared), packed.weight, False, rows)
    counts = listed(rows)
    over = x.new_zeros(len(x) - sum(counts), packed.weight.shape[1])
    runs = zip(x[: sum(counts)].split(counts), packed.each, strict=True)
    return torch.cat([*(run_linear(run, one) for run, one in runs if len(run)), over])
