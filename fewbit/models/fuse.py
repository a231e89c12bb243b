"""fuse: a model as transformers defines it, with what is simple in it done by fused modules.

No architecture is named. A twin at work shows which linears read one tensor and what the values of small modules are;
each rewrite that follows is kept where the twin's logits stay what they were. `plan` never raises: it refuses.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from fewbit.kernels.triton_runtime import lacking
from fewbit.models import twin
from fewbit.models.fuse_look import look, proposals
from fewbit.models.fuse_place import place
from fewbit.models.fuse_values import Decision, Fused, Plan, Rewrite
from fewbit.models.shrink import shrink

LIMIT = 1e-6  # of the twin's logits, relative

_PLANS: dict[str, Plan] = {}  # by class and shrunk config


def plan(config: Any) -> Plan:
    """What can be fused in models of a config's architecture; the same for all of its sizes."""
    name = str(getattr(config, "model_type", ""))
    try:
        small = shrink(config)
        key = type(config).__name__ + small.to_json_string(use_diff=False)
        if key not in _PLANS:
            _PLANS[key] = planned(name, small, twin.require(config))
        return _PLANS[key]
    except Exception as error:  # whatever a model definition raises on this config is the finding
        return Plan(name, (), (Decision(name, "merged", "anything", told(error)),))


def planned(name: str, small: Any, attention: str) -> Plan:
    _, model = twin.filled(small, attention)
    wanted = twin.logits(model, small)
    kept: list[Rewrite] = []
    refused: list[Decision] = []
    for proposal in proposals(look(model, small)):
        if isinstance(proposal, Decision):
            refused.append(proposal)
        elif reason := disproof(model, small, wanted, [*kept, proposal]):
            refused.append(Decision(proposal.target.module, proposal.kind, str(proposal.form), reason))
        else:
            kept.append(proposal)
    return Plan(name, tuple(kept), tuple(dict.fromkeys(refused)))


def disproof(model: nn.Module, small: Any, wanted: list[torch.Tensor], rewrites: Sequence[Rewrite]) -> str:
    """Why the twin does not agree with the last of these rewrites, "" where it does."""
    try:
        copy = deepcopy(model)
        decisions = list(place(copy, rewrites))
        got = twin.logits(copy, small)
    except Exception as error:  # code that reads what is no longer there
        return told(error)
    kind, what = rewrites[-1].kind, str(rewrites[-1].form)
    for decision in decisions:
        if (decision.kind, decision.what) == (kind, what) and not decision.kept:
            return decision.reason
    error = max(twin.relative(a, b) for a, b in zip(got, wanted, strict=True))
    return "" if error <= LIMIT else f"the twin's logits differ by {error:.2g}, allowed {LIMIT:.0e}"


def apply(model: nn.Module, plan: Plan) -> Fused:
    """Rewrite a filled model whose quantized linears are not settled."""
    return Fused(plan.model_type, tuple(placed(model, plan)))


def placed(model: nn.Module, plan: Plan) -> Iterator[Decision]:
    yield from plan.refused
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    why = lacking(device) if device.type == "cuda" else None
    yield from place(model, [r for r in plan.rewrites if why is None or r.kind == "merged"])
    if why is not None:
        names = {r: r.target.module.rpartition(".")[2] for r in plan.rewrites if r.kind != "merged"}
        yield from (Decision(where, r.kind, str(r.form), why) for r, where in names.items())


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {twin.first_line(error)}"
