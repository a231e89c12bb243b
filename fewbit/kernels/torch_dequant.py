"""The reference kernel: decode the weight at each call, round activations as the format says, multiply in x's dtype.

On a CPU the weight is decoded in runs of rows small enough that the decoded values are still in cache when they are
multiplied. Where that happens to whole tensors, it is quant.reference.linear.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear

from fewbit.kernels.rounded import rounded
from fewbit.quant.blocks import row_unit
from fewbit.quant.qtensor import QTensor, Quantized, Transform, slice
from fewbit.quant.reference import decode, transformed

CHUNK = 1 << 20  # weights decoded at a time; int4 4096 x 4096, one row: 12 ms, and 54 ms when decoded whole


@dataclass(frozen=True, slots=True)
class Rows:
    """A Quantized whose weight is cut in runs of rows."""

    source: Quantized
    runs: tuple[QTensor, ...]


def prepack_linear(q: Quantized) -> Rows:
    """Cut the weight; every plane stays a view of the original where its rows are whole bytes."""
    step = run_length(q.weight)
    n = q.weight.shape[-2]
    if step >= n:
        return Rows(q, (q.weight,))
    return Rows(q, tuple(slice(q.weight, -2, i, min(i + step, n)) for i in range(0, n, step)))


def run_linear(x: Tensor, packed: Rows, bias: Tensor | None = None) -> Tensor:
    """x: [..., K] -> [..., N]."""
    q = packed.source
    x = transformed(x, q.transforms)
    seen = rounded(x, q.format.act, q.act) if q.format.act else x
    if len(packed.runs) == 1:
        y = linear(seen, decode(packed.runs[0]).to(x.dtype), bias)
    else:
        y = _by_runs(seen, packed.runs, q.weight.shape[-2])
        y = y if bias is None else y.add_(bias)
    return low_rank(x, q.transforms, y)


def _by_runs(x: Tensor, runs: Sequence[QTensor], n: int) -> Tensor:
    y = x.new_empty(*x.shape[:-1], n)
    start = 0
    for run in runs:
        stop = start + run.shape[-2]
        y[..., start:stop] = linear(x, decode(run).to(x.dtype))
        start = stop
    return y


def low_rank(x: Tensor, transforms: Sequence[Transform], y: Tensor) -> Tensor:
    for transform in transforms:
        if transform.kind == "low_rank":
            a, b = (transform.tensors[name].to(x.dtype) for name in ("a", "b"))
            y = y + linear(linear(x, a), b)
    return y


def run_length(q: QTensor) -> int:
    """Rows to decode at a time: about CHUNK weights, cut where no scale is shared."""
    n, k = q.shape[-2:]
    if q.device.type != "cpu":
        return n
    unit = row_unit([scale.block for scale in (*q.spec.scales, *q.spec.zeros)], k)
    return max(unit, CHUNK // max(k, 1) // unit * unit)


def prepack_experts(q: Quantized) -> Quantized:
    return q


def listed(rows: Sequence[int] | Tensor) -> list[int]:
    """How many rows belong to each expert; waits for the device where only it knows."""
    return rows.tolist() if isinstance(rows, Tensor) else list(rows)


def run_experts(x: Tensor, packed: Quantized, rows: Sequence[int] | Tensor) -> Tensor:
    """x: [S, K] sorted by expert, rows: how many belong to each -> [S, N]."""
    y = x.new_empty(x.shape[0], packed.weight.shape[-2])
    start = 0
    for e, count in enumerate(listed(rows)):
        if count:
            stop = start + count
            y[start:stop] = run_linear(x[start:stop], prepack_linear(expert(packed, e)))
            start = stop
    return y


def expert(q: Quantized, e: int) -> Quantized:
    """The Quantized of one expert: views of [E, ...] planes."""
    weight = QTensor(q.weight.spec, q.weight.shape[1:], {name: plane[e] for name, plane in q.weight.planes.items()})
    act = {name: plane[e] for name, plane in q.act.items()}
    transforms = tuple(Transform(t.kind, {name: p[e] for name, p in t.tensors.items()}) for t in q.transforms)
    return Quantized(q.format, weight, act, transforms)
