"""smooth (SmoothQuant): outliers of the activations move into the weights, as far as both can still be rounded well.

s = amax|x|^a / amax|w|^(1-a); the strength a is searched per group on sampled inputs, rounded as they will be.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fewbit.algos.algo import Algo, Stats, encode_plainly
from fewbit.algos.scaling import columns, magnitude, search, shared
from fewbit.errors import SpecError
from fewbit.quant.spec import QuantSpec


@dataclass(frozen=True, slots=True)
class Options:
    """alpha: the strength for every group, below 0 = searched. steps: strengths tried."""

    alpha: float = -1.0
    steps: int = 10

    def __post_init__(self) -> None:
        if self.alpha > 1 or self.steps < 1:
            raise SpecError(f"smooth: want alpha <= 1 and steps >= 1, found {self}")


def scale(
    group: Sequence[Tensor],
    specs: Sequence[QuantSpec],
    act: QuantSpec | None,
    stats: Stats,
    options: Options,
    share: Tensor | None = None,
) -> Tensor:
    """-> s [K]. share: [K], channels that must have one s because they come from the same row of the producer."""
    x = shared(magnitude(stats.amax), share, "amax")
    w = shared(magnitude(columns(group, lambda w: w.abs()).amax(0)), share, "amax")
    curve = partial(_curve, x, w)
    return curve(options.alpha) if options.alpha >= 0 else search(group, specs, act, stats, [curve], options.steps)


def _curve(x: Tensor, w: Tensor, strength: float) -> Tensor:
    return (x**strength / w ** (1 - strength)).clamp(1e-5, 1e5)


ALGO = Algo(
    "smooth",
    "outliers of activations moved into the weights",
    Options,
    encode_plainly,
    frozenset({"moments", "sample"}),
    scale,
)
