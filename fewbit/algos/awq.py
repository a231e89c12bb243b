"""awq: input channels that carry much are scaled up before rounding, then each block's range is clipped where it pays.

s = mean|x|^a / mean|w|^(1-a) or mean|x|^a, the strength a searched per group on the Hessian: no forward pass is run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fewbit.algos.algo import Algo, Encoded, Stats, shared_planes
from fewbit.algos.clip import clipped, factors
from fewbit.algos.ranges import block_of
from fewbit.algos.scaling import balanced, magnitude, search, shared
from fewbit.errors import SpecError
from fewbit.quant.blocks import blocked, per_block, unblocked
from fewbit.quant.reference import encode
from fewbit.quant.spec import QuantSpec

DUO = ("both", "on", "off")


@dataclass(frozen=True, slots=True)
class Options:
    """steps: strengths tried. duo: whether s looks at weights too. clip: the least range tried, 1 = no clipping."""

    steps: int = 10
    duo: str = "both"
    clip: float = 0.5
    clip_steps: int = 10

    def __post_init__(self) -> None:
        if self.duo not in DUO:
            raise SpecError(f"awq: duo={self.duo!r}; known: {', '.join(DUO)}")
        if not (self.steps >= 1 and self.clip_steps >= 1 and 0 < self.clip <= 1):
            raise SpecError(f"awq: want steps >= 1, clip_steps >= 1 and clip in (0, 1], found {self}")


def scale(
    group: Sequence[Tensor],
    specs: Sequence[QuantSpec],
    act: QuantSpec | None,
    stats: Stats,
    options: Options,
    share: Tensor | None = None,
) -> Tensor:
    """-> s [K]. share: [K], channels that must have one s because they come from the same row of the producer."""
    x = shared(magnitude(stats.mean), share, "mean")
    parts = [weight_mean(w.float(), spec) for w, spec in zip(group, specs, strict=True)]
    rows = [w.shape[0] for w in group]
    mean = torch.stack([p * n for p, n in zip(parts, rows, strict=True)]).sum(0) / sum(rows)
    w = shared(magnitude(mean), share, "mean")
    curves = [partial(_curve, x, w, duo) for duo in (False, True) if options.duo in ("both", "on" if duo else "off")]
    return search(group, specs, act, stats, curves, options.steps)


def _curve(x: Tensor, w: Tensor, duo: bool, strength: float) -> Tensor:
    return balanced(x**strength / w ** (1 - strength) if duo else x**strength)


def weight_mean(w: Tensor, spec: QuantSpec) -> Tensor:
    """[K]: the mean of |w| in units of its block's largest."""
    x = blocked(w.abs(), block_of(spec))
    top = x.amax((-3, -1)).clamp(min=torch.finfo(torch.float32).tiny)
    return unblocked(x / per_block(top), tuple(w.shape)).mean(0)


def encode_group(
    group: Sequence[Tensor], specs: Sequence[QuantSpec], stats: Stats | None, options: Options
) -> list[Encoded]:
    """Ranges clipped by the stats; without stats the spec's own rule."""
    out = []
    for w, spec, given in zip(group, specs, shared_planes(group, specs), strict=True):
        if stats is None or options.clip == 1:
            out.append(Encoded(encode(w, spec, given)))
        else:
            grid = factors(options.clip, options.clip_steps, spec)
            out.append(Encoded(clipped(w.float(), spec, given, stats, grid)))
    return out


ALGO = Algo(
    "awq",
    "scales of input channels and clipped ranges, searched on what the activations say",
    Options,
    encode_group,
    frozenset({"moments", "hessian", "sample"}),
    scale,
)
