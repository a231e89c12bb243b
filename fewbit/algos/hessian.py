"""The Hessian of a linear's output error, H = E[x x^T], made ready for column loops: tr(E H E^T) is what E costs.

With H = A D A^T, A unit upper triangular, tr(E H E^T) = sum_j D_j |(E A)_j|^2, and (E A)_j = e_j + sum_{i<j} e_i A_ij:
rounding w_j + sum_{i<j} e_i A_ij to nearest is GPTQ (arXiv 2210.17323) without an inverse; see QuIP (2307.13304).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewbit.quant.qtensor import Transform

Order = Literal["off", "weight", "group", "static"]


@dataclass(frozen=True, slots=True)
class Factor:
    """H + damp * mean(diag H) I = A D A^T."""

    a: Tensor  # [K, K] float32, unit upper triangular
    h: Tensor  # [K, K] float32: the damped H


def dead_columns(h: Tensor) -> Tensor:
    """-> [K] bool: inputs that were always zero."""
    return h.diagonal() <= 0


def factor(h: Tensor, damp: float, index: Tensor | None = None) -> Factor | None:
    """h: [K, K], dead columns included, taken in the order of index -> its factors, or None where it has none.

    Of a wide layer each copy is a quarter of a gigabyte: the one in float64 is worked on in place.
    """
    index = torch.arange(len(h), device=h.device) if index is None else index
    back = index.flip(0)  # lower factors of the reverse are upper ones
    full = h[back[:, None], back].double()
    diagonal, dead = full.diagonal(), dead_columns(full)
    mean = diagonal[~dead].mean() if not bool(dead.all()) else diagonal.new_ones(())
    diagonal += damp * mean
    diagonal[dead] = mean  # nothing reads them: any weight does, and 1 keeps the factors finite
    kept = diagonal.flip(0).float()
    lower, info = full.mT, torch.empty((), dtype=torch.int32, device=h.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))  # column-major, so nothing is copied
    if int(info) or not bool(torch.isfinite(lower.diagonal()).all()):
        return None
    lower /= lower.diagonal().clone()
    a = lower.float()
    del full, lower, diagonal
    a = a.flip(0, 1)
    damped = h[index[:, None], index]
    damped.diagonal().copy_(kept)
    return Factor(a, damped) if bool(torch.isfinite(a).all()) else None


def usable(h: Tensor) -> Tensor:
    """Symmetric to the bit, and without what rows of dead columns may hold; h itself where it is that already."""
    if not torch.equal(h, h.T):
        h = (h + h.T) / 2
    alive = (~dead_columns(h)).to(h.dtype)
    return h if bool(alive.all()) else (h * alive).mul_(alive[:, None])


def cost(error: Tensor, h: Tensor) -> float:
    """tr(E H E^T) of an error [N, K]."""
    return float(((error @ h) * error).sum(dtype=torch.float64))


def order(h: Tensor, how: Order, cols: int) -> Tensor | None:
    """-> the order [K] in which columns are taken, None: as they are. cols: of a block, 0 = all."""
    importance = h.diagonal()
    if how == "off":
        return None
    if how == "weight" and cols:
        return _by_block(importance, cols)
    return torch.argsort(importance, descending=True, stable=True)


def _by_block(importance: Tensor, cols: int) -> Tensor:
    """Blocks by their largest column, columns by size within their block; a ragged last block stays last."""
    k = importance.numel()
    whole = k // cols * cols
    parts = importance[:whole].view(-1, cols)
    inner = torch.argsort(parts, dim=1, descending=True, stable=True)
    outer = torch.argsort(parts.amax(1), descending=True, stable=True)
    index = (inner + torch.arange(0, whole, cols, device=inner.device)[:, None])[outer].reshape(-1)
    rest = whole + torch.argsort(importance[whole:], descending=True, stable=True)
    return torch.cat([index, rest])


def hadamard(size: int, device: torch.device) -> Tensor:
    """Sylvester's matrix, orthonormal: [size, size], size a power of two."""
    m = torch.ones(1, 1, device=device)
    while m.shape[0] < size:
        m = torch.cat([torch.cat([m, m], 1), torch.cat([m, -m], 1)])
    return m.div(size**0.5)


def rotation(size: int, device: torch.device) -> Transform:
    return Transform("rotate", {"matrix": hadamard(size, device)})


def rotated(group: Sequence[Tensor], h: Tensor, size: int) -> tuple[list[Tensor], Tensor]:
    """W M and M^T H M, M the block-diagonal Hadamard matrix."""
    m = hadamard(size, h.device)
    right = _times(h, m)
    return [_times(w.float(), m) for w in group], _times(right.T, m)


def _times(x: Tensor, m: Tensor) -> Tensor:
    return (x.reshape(*x.shape[:-1], -1, m.shape[0]) @ m).flatten(-2)
