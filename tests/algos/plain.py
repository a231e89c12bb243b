"""What the tests of algorithms share: weights and inputs hard on purpose, and every format that can be encoded."""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from fewbit.algos.algo import Stats
from fewbit.errors import SpecError
from fewbit.quant.formats import ROWS
from fewbit.quant.qtensor import QTensor, make
from fewbit.quant.reference import decode, encode
from fewbit.quant.spec import QuantSpec

SHAPES = ((12, 256), (1, 256), (5, 301))


@cache
def specs() -> dict[str, QuantSpec]:
    """One row for each weight spec; rows that differ only in their inputs are one."""
    rows = {row.weight: name for name, row in reversed(ROWS.items()) if row.weight.element.kind != "run"}
    return {name: spec for spec, name in rows.items()}


def weight(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """An outlier column, a row of zeros and a block of zeros."""
    n, k = shape
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02
    w[:, 7] *= 20
    w[n // 2, :64] = 0
    if n > 2:
        w[2] = 0
    return w


def stats(k: int, seed: int = 1, tokens: int = 600) -> Stats:
    """Correlated inputs with a large one, a faint one and one that is never active."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=g) + 0.7 * torch.randn(tokens, 8, generator=g) @ torch.randn(8, k, generator=g)
    x[:, 5] *= 30
    x[:, 9] = 0
    x[:, 11] *= 1e-4
    return Stats(tokens, x.abs().amax(0), x.abs().mean(0), x.square().mean(0), x.T @ x / tokens, x[:64])


def cases(shapes: tuple[tuple[int, int], ...] = SHAPES) -> Iterator[tuple[str, QuantSpec, Tensor]]:
    """Every format with every shape that it takes."""
    for name, spec in specs().items():
        for shape in shapes:
            try:
                encode(torch.zeros(shape), spec)
            except SpecError:
                continue
            yield name, spec, weight(shape)


def loss(q: QTensor, w: Tensor, h: Tensor) -> float:
    e = (decode(q) - w).double()
    return float(((e @ h.double()) * e).sum())


def same(a: QTensor, b: QTensor) -> bool:
    return a.planes.keys() == b.planes.keys() and all(torch.equal(a.planes[n], b.planes[n]) for n in a.planes)


def sound(q: QTensor, spec: QuantSpec, w: Tensor) -> None:
    make(q.spec, q.shape, q.planes)
    assert q.spec == spec
    assert q.shape == tuple(w.shape)
    assert bool(torch.isfinite(decode(q)).all())
