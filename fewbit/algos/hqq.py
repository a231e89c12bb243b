"""HQQ (half-quadratic quantization): scales and zeros that make sum |w - q|**p small for p < 1, from the weights alone.

A power below 1 lets few weights be far off so that the others come close. Each round splits the error into a sparse
part (by shrinkage) and a rest, and fits scale and zero to the weight without its sparse part; of all rounds each block
keeps what loses least, never more than rounding to nearest does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fewbit.algos.algo import Algo, Encoded, Stats, shared_planes
from fewbit.algos.search import TRIALS, Trial, encode_searched, search
from fewbit.errors import SpecError
from fewbit.quant.ggml_rules import GGML_RULES
from fewbit.quant.qtensor import Planes, QTensor, scale_codes
from fewbit.quant.reference import assign, decode
from fewbit.quant.reference import encode as encode_plain
from fewbit.quant.spec import QuantSpec


@dataclass(frozen=True, slots=True)
class Options:
    power: float = 0.7  # p
    beta: float = 10.0  # how little is shrunk away, in units of a block's step
    rounds: int = 20
    trials: int = TRIALS  # ranges tried where the format has no such scales

    def __post_init__(self) -> None:
        if not 0 < self.power <= 1 or self.beta <= 0 or self.rounds < 0 or self.trials < 1:
            raise SpecError(f"hqq: want power in (0, 1], beta above 0, rounds from 0 and trials from 1: {self}")


def encode(group: Sequence[Tensor], specs: Sequence[QuantSpec], stats: Stats | None, options: Options) -> list[Encoded]:
    out = []
    for w, spec, given in zip(group, specs, shared_planes(group, specs), strict=True):
        if _fits(spec):
            out.append(_encode(w.float(), spec, options))
        else:
            why = f"{spec.element.name} codes: scales searched by squared error instead"
            out.append(Encoded(encode_searched(w, spec, None, given, options.trials), log={"why": why}))
    return out


def _fits(spec: QuantSpec) -> bool:
    """Integers with one float scale per block."""
    one_level = len(spec.scales) == 1 and spec.scales[0].element.kind == "native" and spec.rule not in GGML_RULES
    return spec.element.kind == "int" and one_level


def _encode(w: Tensor, spec: QuantSpec, options: Options) -> Encoded:
    plain = encode_plain(w, spec)
    base = {name: scale_codes(plain, name) for name in plain.planes if name != "codes"}
    found = assign(w, spec, search(w, spec, base, None, options.trials, partial(_walk, options=options), options.power))
    losses = {"loss": _loss(w, found, options.power), "rtn_loss": _loss(w, plain, options.power)}
    return Encoded(found, log=losses)


def _loss(w: Tensor, q: QTensor, power: float) -> float:
    return float((decode(q) - w).abs_().pow_(power).sum(dtype=torch.float64))


def _walk(state: Trial, trials: int, options: Options) -> Planes:
    """trials: none, a power below 1 would rather clip the few large weights, which matter most."""
    weight = torch.ones_like(state.x) if state.cost is None else state.cost
    for _ in range(options.rounds):
        scale, units = state.rounded(state.best)
        dense = state.x - _sparse(state.x - units * scale, scale, options)
        if "zero0" in state.best:
            shift = ((units - dense / scale) * weight).sum(0) / weight.sum(0)
            state.consider(state.best["scale0"], state.shifted(shift))
        ideal = (units * dense * weight).sum(0) / (units * units * weight).sum(0)
        state.consider(state.stored(ideal), state.best.get("zero0"))
    return state.planes


def _sparse(error: Tensor, scale: Tensor, options: Options) -> Tensor:
    """The part of an error that a power below 1 lets be: shrinkage of its size in steps."""
    size = (error / scale).abs()
    kept = (size - size.pow(options.power - 1) / options.beta).clamp_(min=0)
    return torch.copysign(kept * scale.abs(), error)


ALGO = Algo("hqq", "scales and zeros by half-quadratic optimisation, without data", Options, encode)
