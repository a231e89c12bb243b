"""fuse: a model as transformers defines it, with what is simple in it done by fused modules.

No architecture is named. A twin at work shows which linears read one tensor and what the values of small modules are;
each rewrite that follows is kept where the twin's logits stay what they were. `plan` never raises: it refuses.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.kernels.compiled import left_to_torch
from fewbit.kernels.triton_runtime import lacking
from fewbit.models import twin
from fewbit.models.fuse_look import look, proposals
from fewbit.models.fuse_place import place
from fewbit.models.fuse_sums import additions
from fewbit.models.fuse_values import Decision, Fused, Plan, Rewrite
from fewbit.models.shrink import shrink

LIMIT = 1e-6  # of the twin's logits, relative
ATTRIBUTE = "fewbit_fused"  # where a model holds what became of it

_PLANS: dict[str, Plan] = {}  # by class and shrunk config


def plan(config: Any) -> Plan:
    """What can be fused in models of a config's architecture; the same for all of its sizes."""
    name = str(getattr(config, "model_type", ""))
    try:
        small = shrink(config)
        key = type(config).__name__ + small.to_json_string(use_diff=False)
        if key not in _PLANS:
            with left_to_torch():
                _PLANS[key] = planned(name, small, twin.require(config))
        return _PLANS[key]
    except Exception as error:  # whatever a model definition raises on this config is the finding
        return Plan(name, (), (Decision(name, "merged", "anything", twin.told(error)),))


def planned(name: str, small: Any, attention: str) -> Plan:
    _, model = twin.filled(small, attention)
    found = list(proposals(look(model, small)))
    found += additions(deepcopy(model), small, [r for r in found if isinstance(r, Rewrite)])
    proposed = [p for p in found if isinstance(p, Rewrite)]
    bench = Bench(model, small, (True, False) if any(p.kind == "latent" for p in proposed) else (True,))
    refused = [p for p in found if isinstance(p, Decision)]
    kept = proposed if not bench.disproof(proposed) else []
    for several in together(proposed) if not kept else ():
        if reason := bench.disproof([*kept, *several]):
            refused += [Decision(r.target.name, r.kind, str(r.form), reason) for r in several]
        else:
            kept += several
    once = {(d.where, d.kind, d.what, d.reason.partition(", ")[0]): d for d in reversed(refused)}
    return Plan(name, tuple(kept), tuple(reversed(once.values())))  # those of other random weights have other figures


def together(proposed: Sequence[Rewrite]) -> Iterator[list[Rewrite]]:
    """One by one, but sums of all layers at once."""
    sums = [r for r in proposed if r.kind == "sums"]
    yield from ([r] for r in proposed if r not in sums)
    if sums:
        yield sums


@dataclass(slots=True)
class Bench:
    """A twin. cached: whether a cache goes through it, each way that it is to be run."""

    model: nn.Module
    config: Any
    cached: tuple[bool, ...]
    wanted: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.wanted = self.logits(self.model)

    def logits(self, model: nn.Module) -> list[Tensor]:
        return [found for cached in self.cached for found in twin.logits(model, self.config, cached)]

    def disproof(self, rewrites: Sequence[Rewrite]) -> str:
        """Why the twin does not agree with these rewrites, "" where it does."""
        try:
            copy = deepcopy(self.model)
            left = [d.reason for d in place(copy, rewrites) if not d.kept]
            got = self.logits(copy)
        except Exception as error:  # code that reads what is no longer there
            return twin.told(error)
        error = max(twin.relative(a, b) for a, b in zip(got, self.wanted, strict=True))
        if left or error <= LIMIT:
            return left[0] if left else ""
        return f"the twin's logits differ by {error:.2g}, allowed {LIMIT:.0e}"


def apply(model: nn.Module, plan: Plan) -> Fused:
    """Rewrite a filled model whose quantized linears are not settled."""
    return Fused(plan.model_type, tuple(placed(model, plan)))


def placed(model: nn.Module, plan: Plan) -> Iterator[Decision]:
    yield from plan.refused
    idle = [r for r in plan.rewrites if not any(r.fits(module) for module in model.modules())]
    yield from (
        Decision(r.target.name, r.kind, str(r.form), "no module of the model is as the twin's was") for r in idle
    )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    why = lacking(device) if device.type == "cuda" else None
    yield from place(model, [r for r in plan.rewrites if why is None or r.kind == "merged"])
    if why is not None:
        left = [r for r in plan.rewrites if r.kind != "merged" and r not in idle]
        yield from (Decision(r.target.name, r.kind, str(r.form), why) for r in left)
