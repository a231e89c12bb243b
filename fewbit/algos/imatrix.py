"""Importance: an error in a column counts as much as the mean square of its input, as llama.cpp's imatrix has it.

The K types and IQ4 weigh it in their own searches of scales of scales; every other format in a search of ranges.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fewbit.algos.algo import Algo, Encoded, Stats, shared_planes
from fewbit.algos.search import TRIALS, encode_searched
from fewbit.errors import SpecError
from fewbit.quant.qtensor import QTensor
from fewbit.quant.reference import decode
from fewbit.quant.spec import QuantSpec


@dataclass(frozen=True, slots=True)
class Options:
    trials: int = TRIALS  # ranges tried per block

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise SpecError(f"imatrix: trials={self.trials}; want at least one")


def encode(group: Sequence[Tensor], specs: Sequence[QuantSpec], stats: Stats | None, options: Options) -> list[Encoded]:
    importance = stats.square if stats is not None else None
    out = []
    for w, spec, given in zip(group, specs, shared_planes(group, specs), strict=True):
        q = encode_searched(w, spec, importance, given, options.trials)
        out.append(Encoded(q, log=_log(w, q, importance)))
    return out


def _log(w: Tensor, q: QTensor, importance: Tensor | None) -> dict[str, Any]:
    error = (decode(q) - w.float()).square_()
    if importance is None:
        return {"loss": error.sum().item(), "why": "no statistics of the input: every column counts the same"}
    return {"loss": (error * importance).sum().item()}


ALGO = Algo(
    "imatrix", "scales searched with errors weighted by the mean square of each input", Options, encode,
    frozenset({"moments"}),
)  # fmt: skip
