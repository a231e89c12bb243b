"""Algo: one way to choose codes, as data: what it needs to know, and pure functions of weights, stats and specs.

Linears that read the same input come as one group: their stats are one, engines fuse them, and a two-level format
shares its outer scale among them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from fewbit.errors import SpecError
from fewbit.quant.qtensor import Planes, QTensor, Transform
from fewbit.quant.reference import choose, encode
from fewbit.quant.spec import QuantSpec

Need = Literal["moments", "hessian", "sample"]


@dataclass(slots=True)
class Stats:
    """What calibration saw of one input [tokens, K]: float32, on the device where the layer runs."""

    tokens: int
    amax: Tensor  # [K] largest |x|
    mean: Tensor  # [K] mean of |x|
    square: Tensor  # [K] mean of x^2
    hessian: Tensor | None = None  # [K, K] mean of x x^T
    sample: Tensor | None = None  # [S, K] some of the rows


@dataclass(frozen=True, slots=True)
class Encoded:
    """One weight with its codes chosen."""

    weight: QTensor
    transforms: tuple[Transform, ...] = ()
    log: Mapping[str, Any] = field(default_factory=dict)  # what it did, as numbers and words for the log


Encode = Callable[[Sequence[Tensor], Sequence[QuantSpec], Stats | None, Any], list[Encoded]]
# (weights, specs, activation spec, stats, options, which channels must share a value [K] or None) -> [K]
Scaling = Callable[[Sequence[Tensor], Sequence[QuantSpec], QuantSpec | None, Stats, Any, Tensor | None], Tensor]
Run = Callable[[Mapping[str, Tensor], int], Tensor]  # (weights by name, batch number) -> output of the layer
Tune = Callable[[Run, Mapping[str, Tensor], Mapping[str, QuantSpec], Sequence[Tensor], Any], dict[str, Encoded]]


@dataclass(frozen=True, slots=True)
class Algo:
    """encode: a group of weights [N_i, K] -> their codes. scale: the group's input scaling [K], W * s and x / s.

    tune: a whole layer at once. (run, weights, specs, targets: the layer's outputs by batch, options) -> by name.
    leaves: the kinds of transforms that encode may leave beside the codes, by its options; a dialect must hold them.
    """

    name: str
    summary: str
    options: type  # a frozen dataclass, every field with a default
    encode: Encode
    needs: frozenset[Need] = frozenset()
    scale: Scaling | None = None
    tune: Tune | None = None
    leaves: Callable[[Any], tuple[str, ...]] = lambda _: ()


def options(algo: Algo, given: Mapping[str, Any]) -> Any:
    """The algorithm's options; one it does not have is an error that lists those it has."""
    known = {f.name: f.default for f in fields(algo.options)}
    if unknown := sorted(set(given) - set(known)):
        has = ", ".join(f"{name}={default}" for name, default in known.items()) or "none"
        raise SpecError(f"{algo.name} has no option {', '.join(unknown)}; it has {has}")
    return algo.options(**given)


def shared_planes(group: Sequence[Tensor], specs: Sequence[QuantSpec]) -> list[Planes]:
    """For each weight the planes that the group must share: the outer scale of a two-level format."""
    held: list[Planes] = [{} for _ in group]
    for spec in set(specs):
        members = [i for i, s in enumerate(specs) if s == spec]
        if len(spec.scales) != 2 or spec.scales[1].block != (0, 0) or spec.scales[1].op == "add":
            continue
        outer = torch.stack([choose(group[i].float(), spec, {})["scale1"] for i in members])
        widest = outer.amax(0) if spec.scales[1].op == "mul" else outer.amin(0)
        for i in members:
            held[i] = {"scale1": widest}
    return held


def encode_plainly(
    group: Sequence[Tensor], specs: Sequence[QuantSpec], stats: Stats | None, options: Any
) -> list[Encoded]:
    """The spec's own rule."""
    planes = shared_planes(group, specs)
    return [Encoded(encode(w, spec, given)) for w, spec, given in zip(group, specs, planes, strict=True)]
