"""One algorithm: of a few scales a little smaller than the rule's, the one that loses least."""

from typing import Any

from torch import Tensor

from fewbit.quant.qtensor import QTensor
from fewbit.quant.reference import assign, choose, decode
from fewbit.quant.spec import QuantSpec


def shrink(w: Tensor, stats: Any, spec: QuantSpec) -> QTensor:
    """Try 1, 0.95, 0.9 and 0.85 of the scale of the whole tensor's blocks."""
    planes = choose(w.float(), spec, {})
    tried = [assign(w.float(), spec, planes | {"scale0": planes["scale0"] * f}) for f in (1.0, 0.95, 0.9, 0.85)]
    return min(tried, key=lambda q: float((decode(q) - w).square().sum()))
