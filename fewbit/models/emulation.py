"""Emulation: how a float model is rounded as it is served, as a value and as the file that ranks read it from.

Weights are rounded once, as they arrive, and kept in the type of the model; inputs, keys and values at each call. It is
of the whole model: what a rank holds is cut from it, so no value depends on how many there are.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fewbit.files.safetensors import open_safetensors
from fewbit.models.arrival import Arrival
from fewbit.modules.attention_sides import Side, Sides
from fewbit.quant.elements import ELEMENTS
from fewbit.quant.qtensor import Transform
from fewbit.quant.spec import Format, QuantSpec, Scale

KEY = "fewbit_emulation"


@dataclass(frozen=True, slots=True)
class Emulation:
    """arrivals: by the path of a linear or of a stack's projection. sides: by the path of an attention module."""

    arrivals: Mapping[str, Arrival] = field(default_factory=dict)
    sides: Mapping[str, Sides] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        tensors: dict[str, Tensor] = {}
        told = {"arrivals": {name: _arrival_out(name, each, tensors) for name, each in self.arrivals.items()},
                "sides": {name: _sides_out(name, each, tensors) for name, each in self.sides.items()}}  # fmt: skip
        save_file(tensors, path, {KEY: json.dumps(told)})


def read(path: str | Path) -> Emulation:
    with open_safetensors(path) as file:
        told = json.loads(file.metadata[KEY])
        tensors = {name: file.read(name) for name in file.tensors}
    arrivals = {name: _arrival_in(name, each, tensors) for name, each in told["arrivals"].items()}
    return Emulation(arrivals, {name: _sides_in(name, each, tensors) for name, each in told["sides"].items()})


def _arrival_out(name: str, a: Arrival, tensors: dict[str, Tensor]) -> dict[str, Any]:
    for part, planes in (
        ("weight", a.weight),
        ("act", a.act),
        *((str(i), t.tensors) for i, t in enumerate(a.transforms)),
    ):
        tensors |= {f"{name}|{part}|{plane}": t.clone().contiguous() for plane, t in planes.items()}
    act = a.format.act
    return {"weight": spec_out(a.format.weight), "act": act and spec_out(act), "rewrite": a.rewrite,
            "transforms": a.format.transforms}  # fmt: skip


def _arrival_in(name: str, told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Arrival:
    kinds = tuple(told["transforms"])
    form = Format(spec_in(told["weight"]), spec_in(told["act"]) if told["act"] else None, kinds)
    transforms = tuple(Transform(kind, dict(_part(f"{name}|{i}|", tensors))) for i, kind in enumerate(kinds))
    weight, act = (dict(_part(f"{name}|{part}|", tensors)) for part in ("weight", "act"))
    return Arrival(form, weight, act, transforms, told["rewrite"])


def _sides_out(name: str, sides: Sides, tensors: dict[str, Tensor]) -> dict[str, Any]:
    told: dict[str, Any] = {"p": sides.p}
    for of, side in (("q", sides.q), ("k", sides.k), ("v", sides.v)):
        if side is not None:
            held = {**side.planes, "bias": side.bias}
            tensors |= {f"{name}|{of}|{n}": t.clone().contiguous() for n, t in held.items() if t is not None}
            told[of] = {"spec": spec_out(side.spec), "turned": side.turned}
    return told


def _sides_in(name: str, told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Sides:
    def side(of: str) -> Side | None:
        if of not in told:
            return None
        held = dict(_part(f"{name}|{of}|", tensors))
        bias = held.pop("bias", None)
        return Side(spec_in(told[of]["spec"]), held, bias, told[of]["turned"])

    return Sides(side("q"), side("k"), side("v"), told["p"])


def _part(prefix: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name.removeprefix(prefix), t) for name, t in tensors.items() if name.startswith(prefix))


def spec_out(s: QuantSpec) -> dict[str, Any]:
    def chain(scales: tuple[Scale, ...]) -> list[Any]:
        return [[scale.element.name, scale.block, scale.op, scale.dynamic] for scale in scales]

    return {"element": s.element.name, "scales": chain(s.scales), "zeros": chain(s.zeros), "rule": s.rule}


def spec_in(told: Mapping[str, Any]) -> QuantSpec:
    def chain(scales: list[Any]) -> tuple[Scale, ...]:
        return tuple(Scale(ELEMENTS[name], tuple(block), op, dynamic) for name, block, op, dynamic in scales)

    return QuantSpec(ELEMENTS[told["element"]], chain(told["scales"]), chain(told["zeros"]), told["rule"])
