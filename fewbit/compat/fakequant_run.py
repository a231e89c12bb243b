"""Calibrating a model layer by layer: each is read, given its quantizers, shown the text, and let go.

Layers see what the float model gives them, as ModelOpt's calibration does, so the result is that of quantizing the
model in memory as a whole. Scales of linears that engines fuse are one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.compat.calibrate import calibrate, dynamic, needs_loop, watching
from fewbit.compat.fakequant_ask import Wish
from fewbit.compat.fakequant_state import State, state_of
from fewbit.compat.group import Group, grouped
from fewbit.compat.insert import Place, check_attention, insert, route_attention, weights
from fewbit.compat.methods import NEED_STATS, method_of
from fewbit.compat.modelopt import Found, made, role
from fewbit.compat.modelopt_config import Rounding
from fewbit.models.layers import WHOLE, Layers, Unit
from fewbit.models.layers import State as Batches
from fewbit.quant.qtensor import QTensor

OWN = ("mse", "local_hessian", "awq_clip", "awq_full", "gptq")  # methods that choose each weight's scales themselves
Tell = Callable[[int, int], None]


@dataclass(slots=True)
class Calibrated:
    """state: by ModelOpt's names. codes: of weights for which an algorithm chose more than scales."""

    state: State = field(default_factory=dict)
    codes: dict[str, QTensor] = field(default_factory=dict)


def needs_data(wish: Wish) -> bool:
    """Whether a text must be run through the model."""
    method, _ = method_of(wish.algorithm)
    return method in NEED_STATS or any(waits(place, what, method) for place, what in wish.found.items())


def waits(place: Place, what: Rounding, method: str | None) -> bool:
    kind = role(place)
    static = not what.constant and bool(what.spec.scales) and not what.spec.scales[-1].dynamic
    return static and (kind == "cache" or (kind == "input" and method is not None))


def run(layers: Layers, wish: Wish, batches: Sequence[Tensor], tell: Tell = lambda done, total: None) -> Calibrated:
    """batches: [B, T] ids each; none where no data is needed."""
    if any(role(place) in ("cache", "softmax") for place in wish.found):
        check_attention(layers.model)
    out = Calibrated()
    state = layers.start(batches) if batches else None
    head = outer(wish.found, layers)
    total = len(layers.units) + bool(head)
    for number, unit in enumerate(layers.units):
        tell(number, total)
        with layers.loaded(unit) as module, torch.no_grad():
            outputs = one(layers, unit, module, within(wish.found, unit), wish.algorithm, state, out)
        if unit.name != WHOLE and state is not None:
            for i, hidden in enumerate(outputs):
                state[i] = hidden
    if head:
        tell(total - 1, total)
        with outside(layers, head) as model, torch.no_grad():
            settle(model, "", head, wish.algorithm, out,
                   None if state is None else lambda: [layers.logits(state, i) for i in range(len(state))])  # fmt: skip
    layers.release()
    tell(total, total)
    return out


def within(found: Found, unit: Unit) -> Found:
    if unit.name == WHOLE:
        return found
    return {place: what for place, what in found.items() if f"{place.owner}.".startswith(f"{unit.name}.")}


def outer(found: Found, layers: Layers) -> Found:
    """What is in no layer, such as the output head."""
    inside = {place for unit in layers.units for place in within(found, unit)}
    return {place: what for place, what in found.items() if place not in inside}


def one(layers: Layers, unit: Unit, module: nn.Module, found: Found, algorithm: Any, state: Batches | None,
        out: Calibrated) -> list[Tensor]:  # fmt: skip
    """-> what the float layer gives."""
    outputs: list[Tensor] = []

    def loop() -> None:
        outputs[:] = [layers.run(unit, module, state, i) for i in range(len(state))] if state is not None else []

    for place, what in found.items():
        insert(layers.model, place, quantizer(place, what, found))
    settle(module, "" if unit.name == WHOLE else f"{unit.name}.", found, algorithm, out, loop if state else None)
    if state is not None and not outputs:
        with watching(module, "plain"):
            loop()
    return outputs


def quantizer(place: Place, what: Rounding, found: Found) -> Any:
    held = made(place, what, found)
    held.outer = 0.0  # in memory ModelOpt reaches as far as both scales go, whatever its exporter writes
    return held


def settle(module: nn.Module, prefix: str, found: Found, algorithm: Any, out: Calibrated, loop: Any) -> None:
    """Calibrate the quantizers of a module, and take what they hold."""
    if not found:
        return
    route_attention(module)
    method, _ = method_of(algorithm)
    if method is None and loop is not None:  # caches are calibrated where nothing else is
        for _, _, _, _, inputs in weights(module):
            dynamic(inputs)
    calibrate(module, algorithm, None if loop is None or not (method in NEED_STATS or needs_loop(module))
              else lambda _: loop())  # fmt: skip
    if method not in OWN:
        for group in grouped(module):
            merge(group)
    out.state |= state_of(module, prefix)
    for path, name, _, held, _ in weights(module):
        if held.chosen is not None and held.enabled:
            out.codes[f"{prefix}{path}" if name == "weight" else f"{prefix}{path}.{name}"] = held.chosen


def merge(group: Group) -> None:
    """One scale for the whole weights of a group that engines fuse: that of the largest."""
    whole = [w.quantizer for w in group if w.quantizer.enabled and len(w.quantizer.planes) == 1
             and w.quantizer.spec is not None and [s.block for s in w.quantizer.spec.scales] == [(0, 0)]]  # fmt: skip
    if len(whole) == len(group) > 1:
        top = torch.stack([q.planes["scale0"] for q in whole]).amax(0)
        for q in whole:
            q.planes = {"scale0": top}


@contextmanager
def outside(layers: Layers, found: Found) -> Iterator[nn.Module]:
    """The model with what is outside its layers in place, and quantizers there."""
    layers._load_outer(head=True)
    for place, what in found.items():
        insert(layers.model, place, quantizer(place, what, found))
    yield layers.model
