"""What attention rounds before it computes: queries, keys, values, and probabilities. Values that stand at a module.

A cache's own rounding is `attention.KV`; this is for what a cache alone does not do: another spec for each of them, a
mean that is taken out first, a basis in which outliers spread, arithmetic in 8 bits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor, nn

from fewbit.errors import UnsupportedError
from fewbit.kernels.rounded import rounded
from fewbit.quant.elements import E4M3
from fewbit.quant.qtensor import Planes
from fewbit.quant.spec import QuantSpec

SIDES = "fewbit_sides"  # attribute of an attention module: its Sides
CAST = QuantSpec(E4M3)  # no scale: what a direct cast keeps, saturating


@dataclass(frozen=True, slots=True)
class Side:
    """One of queries, keys and values, [B, G, T, D].

    planes: static scales, with an axis of heads or for all. bias: [G, 1, D], taken away before and added after.
    turned: rounded in the basis that a Hadamard matrix turns to, and turned back: what queries turned alike would see.
    """

    spec: QuantSpec
    planes: Planes = field(default_factory=dict)
    bias: Tensor | None = None
    turned: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        y = x if self.bias is None else x - self.bias.to(x.dtype)
        y = y @ hadamard(x.shape[-1], x.device, x.dtype) if self.turned else y
        y = heads(y, self.spec, self.planes)
        y = y @ hadamard(x.shape[-1], x.device, x.dtype) if self.turned else y
        return y if self.bias is None else y + self.bias.to(x.dtype)


@dataclass(frozen=True, slots=True)
class Sides:
    """p: probabilities are e4m3 after this factor, before they are divided by their sum; a row's largest is 1 there."""

    q: Side | None = None
    k: Side | None = None
    v: Side | None = None
    p: float = 0.0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (
            x if side is None else side(x) for side, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        return query, key, value


def of(module: nn.Module) -> Sides:
    found: Sides = getattr(module, SIDES, NOTHING)
    return found


NOTHING = Sides()


def mapped(sides: Sides, change: Callable[[Tensor], Tensor]) -> Sides:
    """With every tensor changed."""

    def one(side: Side | None) -> Side | None:
        if side is None:
            return None
        bias = None if side.bias is None else change(side.bias)
        return replace(side, planes={n: change(p) for n, p in side.planes.items()}, bias=bias)

    return Sides(one(sides.q), one(sides.k), one(sides.v), sides.p)


def heads(x: Tensor, spec: QuantSpec, planes: Planes) -> Tensor:
    """x: [B, G, T, D]; planes with an axis of heads are each head's own."""
    if all(plane.dim() == 2 for plane in planes.values()):
        return rounded(x, spec, planes)
    each = [rounded(x[:, h], spec, {n: p[h] for n, p in planes.items()}) for h in range(x.shape[1])]
    return torch.stack(each, 1)


@cache
def hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[size, size], symmetric and orthogonal, its own inverse."""
    if size & (size - 1):
        raise UnsupportedError(f"a Hadamard matrix of {size}", ["heads of 2, 4, 8 ... channels can be turned"])
    with torch.inference_mode(False):
        made = torch.ones(1, 1)
        while len(made) < size:
            made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
        return (made / size**0.5).to(device, dtype)


def weighed(scores: Tensor, value: Tensor, p: float, extra: int = 0) -> Tensor:
    """Softmax of scores [..., T + extra] over values [..., T, Dv], its numerators rounded to e4m3."""
    scores = scores.float()
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
    kept = weights[..., : weights.shape[-1] - extra]
    codes = (kept * p).to(torch.float8_e4m3fn).to(value.dtype)  # at most p, and e4m3 holds 448
    return ((codes @ value).float() / (total * p)).to(value.dtype)
