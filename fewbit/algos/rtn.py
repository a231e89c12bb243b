"""Round to nearest: each value to the code next to it, with the scales of the format's own rule or searched ones.

mse tries other ranges per block and keeps, of each, what loses least squared error, never more than the rule's own
choice. Where statistics are given, an error in a column counts as much as the mean square of its input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fewbit.algos.algo import Algo, Encoded, Stats, shared_planes
from fewbit.algos.search import TRIALS, encode_searched
from fewbit.errors import SpecError
from fewbit.quant.reference import encode as encode_plain
from fewbit.quant.spec import QuantSpec


@dataclass(frozen=True, slots=True)
class Options:
    scale: Literal["amax", "mse"] = "amax"
    trials: int = TRIALS  # ranges tried by mse

    def __post_init__(self) -> None:
        if self.scale not in ("amax", "mse") or self.trials < 1:
            found = f"scale={self.scale!r}, trials={self.trials}"
            raise SpecError(f"rtn: {found}; want amax or mse, and at least one trial")


def encode(group: Sequence[Tensor], specs: Sequence[QuantSpec], stats: Stats | None, options: Options) -> list[Encoded]:
    weight = stats.square if stats is not None else None
    out = []
    for w, spec, given in zip(group, specs, shared_planes(group, specs), strict=True):
        if options.scale == "amax":
            q = encode_plain(w, spec, given)
        else:
            q = encode_searched(w, spec, weight, given, options.trials)
        out.append(Encoded(q, log={"scale": options.scale}))
    return out


ALGO = Algo("rtn", "round to nearest, with the scales of the format's own rule or searched ones", Options, encode)
