"""One algorithm: of a few scales a little smaller than the rule's, the one that loses least."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fewbit.algos.algo import Algo, Encoded, Stats
from fewbit.quant.qtensor import QTensor
from fewbit.quant.reference import assign, choose, decode
from fewbit.quant.spec import QuantSpec


@dataclass(frozen=True, slots=True)
class Options:
    """least: the smallest factor tried."""

    least: float = 0.85


def shrink(w: Tensor, spec: QuantSpec, least: float) -> QTensor:
    """Try the scale of each block, and three smaller ones for all blocks together."""
    planes = choose(w, spec, {})
    factors = [1 - (1 - least) * i / 3 for i in range(4)]
    tried = [assign(w, spec, planes | {"scale0": planes["scale0"] * f}) for f in factors]
    return min(tried, key=lambda q: float((decode(q) - w).square().sum()))


def encode(group: Sequence[Tensor], specs: Sequence[QuantSpec], stats: Stats | None, options: Options) -> list[Encoded]:
    """Every weight by itself; what calibration saw is not looked at."""
    return [Encoded(shrink(w.float(), spec, options.least)) for w, spec in zip(group, specs, strict=True)]


ALGO = Algo("toy-shrink", "tries four scales", Options, encode)
