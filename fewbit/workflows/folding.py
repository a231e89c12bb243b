"""Folding: input scalings of a layer's groups, taken out of what makes their input where that is exact, else stored.

What makes an input is what observation proved on the twin. A scaling that can neither be folded nor stored by the
dialect is left out, and the log says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewbit.algos.algo import Algo, Stats
from fewbit.errors import FewbitError, UnsupportedError
from fewbit.models import rewrite
from fewbit.models.layers import WHOLE, Unit
from fewbit.models.observe import observe
from fewbit.models.observe_values import Group as Wired
from fewbit.quant.qtensor import Transform
from fewbit.workflows.job import Job
from fewbit.workflows.layer_weights import LayerWeights
from fewbit.workflows.layer_work import Done, Group
from fewbit.workflows.recipe import Target

INPUT_SCALE = "input_scale"


def fold_groups(
    job: Job, unit: Unit, targets: Mapping[str, Target], groups: Sequence[Group], weights: dict[str, Tensor], done: Done
) -> None:
    """Scale every group that its chain wants scaled; weights, stats and done.dense change in place."""
    held = LayerWeights(job.layers, unit, lambda name: _read(job, weights, done, name))
    for wired, members in paired(job, unit, held, groups):
        scalers = scalers_of(targets, members)
        if not scalers or any(m.stats is None for m in members):
            continue
        begin = {name: weights[name] for m in members for name in m.names}
        s = scaling(targets, members, begin, scalers, wired, held)
        if bool((s == 1).all()):
            continue
        if wired is not None and wired.source is not None:
            changed = rewrite.fold(held, wired, s)
            place(job, held.apart(changed), weights, done)
        elif storable(job, targets, members):
            for member in members:
                member.scale = s
                weights |= {name: weights[name] * s for name in member.names}
        else:
            done.warnings.append(f"{', '.join(members[0].names)}: not scaled: nothing to fold it into, no place for it")
            continue
        for i, member in enumerate(members):
            own = s[i] if s.dim() == 2 else s
            assert member.stats is not None
            member.stats = rescaled(member.stats, own)
            if member.spread is not None:
                top = float(member.stats.amax.max())
                member.spread = replace(member.spread, low=-top, high=top, counts=None)


def paired(job: Job, unit: Unit, held: LayerWeights, groups: Sequence[Group]) -> list[tuple[Wired | None, list[Group]]]:
    """Observed groups with the watched ones in them; a watched group that was not observed stands alone."""
    wired = wiring_of(job, unit)
    paths = {name: path for path, names in held.names.items() for name in names}
    found: dict[int, list[Group]] = {}
    alone: list[tuple[Wired | None, list[Group]]] = []
    for group in groups:
        path = paths[f"{group.names[0]}.weight"].removesuffix(".weight")
        at = next((i for i, w in enumerate(wired) if path in w.linears), None)
        if at is None:
            alone.append((None, [group]))
        else:
            found.setdefault(at, []).append(group)
    return [(wired[i], members) for i, members in found.items()] + alone


def wiring_of(job: Job, unit: Unit) -> tuple[Wired, ...]:
    if unit.name == WHOLE:
        return ()
    try:
        return observe(job.layers.config).for_layer(unit.index, job.layers.config).groups
    except UnsupportedError:
        return ()


def scalers_of(targets: Mapping[str, Target], members: Sequence[Group]) -> list[tuple[Algo, Any]]:
    """The algorithms of the chain that scale; all members must agree on them."""
    chains = {tuple(a.name for a in targets[n].chain if a.scale) for m in members for n in m.names}
    if len(chains) != 1:
        return []
    target = targets[members[0].names[0]]
    return [(a, target.options if a is target.algo else a.options()) for a in target.chain if a.scale]


def scaling(
    targets: Mapping[str, Target],
    members: Sequence[Group],
    weights: Mapping[str, Tensor],
    scalers: Sequence[tuple[Algo, Any]],
    wired: Wired | None,
    held: LayerWeights,
) -> Tensor:
    """[K], or [E, K] where each expert's input is made by itself."""
    source = wired.source if wired is not None else None
    apart = len(members) > 1 and source is not None and source.kind == "linear"
    share = None
    if source is not None and source.repeat > 1:
        producer = held[rewrite.parameter(held, source.path)]
        share = source.rows(producer.shape[-2], weights[members[0].names[0]].shape[-1]).to(producer.device)
    if apart:
        return torch.stack([_one(targets, [m], weights, scalers, share) for m in members])
    return _one(targets, members, weights, scalers, share)


def _one(
    targets: Mapping[str, Target],
    members: Sequence[Group],
    weights: Mapping[str, Tensor],
    scalers: Sequence[tuple[Algo, Any]],
    share: Tensor | None,
) -> Tensor:
    names = [name for member in members for name in member.names]
    stats = merged([m.stats for m in members if m.stats is not None])
    group = [weights[name] for name in names]
    total = torch.ones_like(stats.amax)
    for algo, options in scalers:
        assert algo.scale is not None
        specs = [targets[name].format.weight for name in names]
        s = algo.scale(group, specs, targets[names[0]].format.act, stats, options, share).to(total)
        total, group, stats = total * s, [w * s for w in group], rescaled(stats, s)
    return total


def merged(stats: Sequence[Stats]) -> Stats:
    """The stats of several inputs together."""
    if len(stats) == 1:
        return stats[0]
    share = torch.tensor([float(s.tokens) for s in stats])
    share = share / share.sum().clamp(min=1)

    def mean(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([v * w for v, w in zip(values, share.tolist(), strict=True)]).sum(0)

    hessians = [s.hessian for s in stats if s.hessian is not None]
    samples = [s.sample for s in stats if s.sample is not None]
    return Stats(
        sum(s.tokens for s in stats),
        torch.stack([s.amax for s in stats]).amax(0),
        mean([s.mean for s in stats]),
        mean([s.square for s in stats]),
        mean(hessians) if len(hessians) == len(stats) else None,
        torch.cat(samples) if len(samples) == len(stats) else None,
    )


def rescaled(stats: Stats, s: Tensor) -> Stats:
    """The stats of x / s."""
    hessian = stats.hessian / s[:, None] / s if stats.hessian is not None else None
    sample = stats.sample / s if stats.sample is not None else None
    return Stats(stats.tokens, stats.amax / s, stats.mean / s, stats.square / s.square(), hessian, sample)


def _read(job: Job, weights: Mapping[str, Tensor], done: Done, name: str) -> Tensor:
    module = name.removesuffix(".weight")
    if module in weights and name.endswith(".weight"):
        return weights[module]
    value = done.dense.get(name)
    return (job.floats.read(name) if value is None else value).to(job.device, torch.float32)


def place(job: Job, changed: Mapping[str, Tensor], weights: dict[str, Tensor], done: Done) -> None:
    """Tensors that changed: those still to be quantized go on, the others are finished."""
    for name, value in changed.items():
        module = name.removesuffix(".weight")
        if module in weights and name.endswith(".weight"):
            weights[module] = value
        else:
            done.dense[name] = value


def storable(job: Job, targets: Mapping[str, Target], members: Sequence[Group]) -> bool:
    """Whether the dialect keeps an input scale beside these formats."""
    for name in (name for member in members for name in member.names):
        form = targets[name].format
        try:
            job.codec.fit(replace(form, transforms=(*form.transforms, INPUT_SCALE)))
        except FewbitError:
            return False
    return True


def stored_scale(s: Tensor) -> Transform:
    """W was multiplied by s, so the linear reads x / s."""
    return Transform(INPUT_SCALE, {"scale": 1 / s})
