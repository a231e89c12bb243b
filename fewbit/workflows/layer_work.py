"""One layer of a quantization: watch what its linears read, fold scalings, choose codes, let the result run."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.algos.algo import Algo, Encoded, Stats
from fewbit.errors import UnsupportedError
from fewbit.models.fill import owner
from fewbit.models.layers import WHOLE, Layers, State, Unit
from fewbit.models.values import sibling_groups
from fewbit.quant.qtensor import Quantized, bits_per_weight
from fewbit.quant.reference import decode
from fewbit.quant.spec import Format
from fewbit.workflows.job import Job, static
from fewbit.workflows.recipe import Target
from fewbit.workflows.stats import WatchedGroup, Watcher, all_tokens
from fewbit.workflows.stats_coverage import Coverage, check_experts, cover, expert_tokens
from fewbit.workflows.stats_gather import Spread
from fewbit.workflows.stats_range import kv_scales, observe_range, static_planes
from fewbit.workflows.weights import ReadAhead, Weights, as_stored


@dataclass(slots=True)
class Group:
    """Modules that read one input; without stats where calibration did not reach them, or was not asked for."""

    names: list[str]
    stats: Stats | None = None
    spread: Spread | None = None
    scale: Tensor | None = None  # stored beside the codes: the linear reads x / scale


@dataclass(slots=True)
class Done:
    """A finished layer. dense: tensors that folding changed. notes: one line per module for the log."""

    values: dict[str, Quantized] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    kv: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    notes: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    coverage: Coverage = field(default_factory=Coverage)
    first: Tensor | None = None  # the float layer's output on the first batch
    error: float | None = None  # what the quantized one's differs by
    seconds: float = 0.0


def quantize_layer(job: Job, unit: Unit, state: State | None, floats: State | None = None) -> Done:
    """state: the calibration batches at the layer's input, or None when no text is needed.

    floats: the same as the float model has them, which then move on to the next layer; what a tuned layer is to give.
    """
    begun = time.monotonic()
    done = Done()
    targets = job.within(unit)
    if state is None:
        encode_unseen(job, targets, done)
    else:
        tuned = any(t.algo.tune for t in targets.values())
        with job.layers.loaded(unit) as module, torch.no_grad():
            groups, outputs = watch(job, unit, module, targets, state, done)
            done.first = outputs[0]
            outputs = passed(job, unit, module, floats) if floats is not None else outputs
            if tuned:
                weights = folded(job, unit, targets, groups, done)
                tune_layer(job, unit, module, targets, groups, weights, state, outputs, done)
        if not tuned:  # the layer itself has gone: codes are chosen with one group's weights in memory
            encode_groups(job, targets, groups, folded(job, unit, targets, groups, done), done)
    # rounded before the quantized layer runs: a resumed run has nothing else
    done.dense = {name: as_stored(job, name, value) for name, value in done.dense.items()}
    done.seconds = time.monotonic() - begun
    return done


def passed(job: Job, unit: Unit, module: nn.Module, floats: State) -> list[Tensor]:
    """The float stream behind a layer, and so its place in `floats`."""
    outputs = [job.layers.run(unit, module, floats, i) for i in range(len(floats))]
    if unit.name != WHOLE:
        for i, out in enumerate(outputs):
            floats[i] = out
    return outputs


def advance(job: Job, unit: Unit, state: State, instead: Mapping[str, Any], first: Tensor | None) -> float | None:
    """Run the quantized layer on every batch, in place. -> its relative output error on the first batch."""
    error = None
    with job.layers.loaded(unit, instead) as module, torch.no_grad():
        for i in range(len(state)):
            out = job.layers.run(unit, module, state, i)
            if i == 0 and first is not None:
                error = float((out.float() - first.float()).norm() / first.float().norm().clamp(min=1e-30))
            if unit.name != WHOLE:
                state[i] = out
    return error


def encode_unseen(job: Job, targets: Mapping[str, Target], done: Done) -> None:
    """By the weights alone."""
    groups = by_name(targets)
    with ReadAhead(job, [name for group in groups for name in group.names]) as weights:
        encode_groups(job, targets, groups, weights, done)


def by_name(targets: Mapping[str, Target]) -> list[Group]:
    """Groups without having seen any input: siblings by their names."""
    siblings = list(sibling_groups(targets).values())
    grouped = {name for names in siblings for name in names}
    return [Group(names) for names in [*siblings, *([name] for name in targets if name not in grouped)]]


def watch(
    job: Job, unit: Unit, module: nn.Module, targets: Mapping[str, Target], state: State, done: Done
) -> tuple[list[Group], list[Tensor]]:
    """Run the batches through the float layer. -> what each group of targets reads; the outputs, where kept."""
    paths = parameter_paths(job, unit, targets)
    keep = len(state) if any(t.algo.tune for t in targets.values()) else 1
    observer = job.calibrate.observer != "max"
    with Watcher(
        module, {path for path, _ in paths}, needs=job.needs or {"moments"}, histogram=observer, kv=job.kv is not None,
        device=job.device,
    ) as watcher:  # fmt: skip
        if job.calibrate.experts == "all-tokens":
            with all_tokens(watcher):
                outputs = _outputs(job, unit, module, state, keep)
        else:
            outputs = _outputs(job, unit, module, state, keep)
    found = watcher.groups
    prefix = "" if unit.name == WHOLE else f"{unit.name}."
    done.coverage = cover(watcher, found, job.calibrate.least_tokens, prefix)
    starved = starved_experts(job, watcher)
    if job.kv is not None:
        per = "head" if job.recipe.kv.endswith("head") else "tensor"
        scales = kv_scales(watcher.kv, per, job.kv.element)
        done.kv = {attention_name(job.layers, unit, path): kv for path, kv in scales.items()}
    return groups_of(found, paths, targets, starved), outputs


def starved_experts(job: Job, watcher: Watcher) -> dict[str, tuple[int, ...]]:
    """Stack -> experts that saw too few tokens to be told by; shown all tokens, none is."""
    if job.calibrate.experts == "all-tokens":
        return {}
    policy: Any = job.calibrate.experts
    return check_experts(expert_tokens(watcher), job.calibrate.least_tokens, policy)


def _outputs(job: Job, unit: Unit, module: nn.Module, state: State, keep: int) -> list[Tensor]:
    out = []
    for i in range(len(state)):
        y = job.layers.run(unit, module, state, i)
        if i < keep:
            out.append(y)
    return out


def parameter_paths(job: Job, unit: Unit, targets: Mapping[str, Target]) -> dict[tuple[str, int | None], list[str]]:
    """(parameter below the unit, expert) -> the modules on disk that make it up, in order."""
    prefix = "" if unit.name == WHOLE else f"{unit.name}."
    found: dict[tuple[str, int | None], list[str]] = defaultdict(list)
    for name in targets:
        place = job.layers.places[f"{name}.weight"]
        for target in place.targets:
            found[target.removeprefix(prefix), place.expert].append(name)
    return found


def groups_of(
    watched: Sequence[WatchedGroup],
    paths: Mapping[tuple[str, int | None], list[str]],
    targets: Mapping[str, Target],
    starved: Mapping[str, tuple[int, ...]],
) -> list[Group]:
    groups, seen = [], set()
    for group in watched:
        names = [n for path in group.paths for n in paths.get((path, group.expert), []) if n not in seen]
        names = list(dict.fromkeys(names))
        if names:
            seen.update(names)
            few = any(group.expert in starved.get(p.rpartition(".")[0], ()) for p in group.paths)
            groups.append(Group(names) if few else Group(names, group.stats, group.spread))
    return groups + by_name({name: targets[name] for name in targets if name not in seen})


def attention_name(layers: Layers, unit: Unit, path: str) -> str:
    """The name on disk of an attention module, by way of its key projection."""
    full = path if unit.name == WHOLE else f"{unit.name}.{path}"
    for name, place in layers.places.items():
        if place.target.rpartition(".")[0].rpartition(".")[0] == full and "." in name:
            return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[0]
    raise UnsupportedError(f"{full}: no tensor on disk belongs to this attention module")


def folded(
    job: Job, unit: Unit, targets: Mapping[str, Target], groups: Sequence[Group], done: Done
) -> Mapping[str, Tensor]:
    """The weights, with the scaling of every group that asks for one in what comes before it or beside its codes."""
    if not any(len(targets[name].chain) > 1 or targets[name].algo.scale for group in groups for name in group.names):
        return Weights(job, tuple(targets))
    from fewbit.workflows.folding import fold_groups

    weights = dict(Weights(job, tuple(targets)))
    fold_groups(job, unit, targets, groups, weights, done)
    return weights


def encode_groups(
    job: Job, targets: Mapping[str, Target], groups: Sequence[Group], weights: Mapping[str, Tensor], done: Done
) -> None:
    for group in groups:
        for algo, options, names in _alike(targets, group.names):
            begun = time.monotonic()
            specs = [targets[name].format.weight for name in names]
            read = [weights[name] for name in names]
            encoded = algo.encode(read, specs, group.stats, options)
            spent = (time.monotonic() - begun) / len(names)
            for name, weight, found in zip(names, read, encoded, strict=True):
                finish(job, name, targets[name], group, weight, found, spent, done)
        group.stats = None  # its Hessian may be the largest thing in memory


def _alike(targets: Mapping[str, Target], names: Sequence[str]) -> list[tuple[Algo, Any, list[str]]]:
    """The names that one call can encode together."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        found[targets[name].algo.name, repr(targets[name].options)].append(name)
    return [(targets[held[0]].algo, targets[held[0]].options, held) for held in found.values()]


def finish(
    job: Job, name: str, target: Target, group: Group, weight: Tensor, found: Encoded, spent: float, done: Done
) -> None:
    """The encoded weight with its activation planes and transforms, and a line about it."""
    transforms = found.transforms
    if group.scale is not None:
        from fewbit.workflows.folding import stored_scale

        transforms = (stored_scale(group.scale), *transforms)
    form = Format(target.format.weight, target.format.act, tuple(t.kind for t in transforms))
    q = Quantized(form, found.weight, act_planes(job, name, target, group), transforms)
    done.values[name] = q
    gap = decode(found.weight).sub_(weight) if not found.transforms else None
    note = {"name": name, "format": target.row, "algo": target.algo.name, "shape": list(weight.shape),
            "bytes": found.weight.nbytes, "bits": bits_per_weight(form.weight, weight.shape), "seconds": spent,
            "rule": target.rule, "transforms": list(form.transforms), **found.log}  # fmt: skip
    if gap is not None:
        note["error"] = output_error(gap, weight, group.stats)
    done.notes.append(note)


def output_error(gap: Tensor, weight: Tensor, stats: Stats | None) -> float:
    """Relative error of the module's output on the calibration text, inputs unrounded; of the weight without one."""

    def size(x: Tensor) -> Tensor:
        if stats is None:
            return torch.linalg.vector_norm(x).square()
        if stats.hessian is not None:
            return ((x @ stats.hessian) * x).sum()
        return torch.linalg.vector_norm(x, dim=0).square() @ stats.square  # column by column: nothing as large as x

    total = size(weight)
    return float((size(gap).clamp(min=0) / total).sqrt()) if total > 0 else 0.0


def act_planes(job: Job, name: str, target: Target, group: Group) -> dict[str, Tensor]:
    act = target.format.act
    if act is None or not static(act):
        return {}
    if group.stats is None or group.spread is None:
        reason = "calibration sent it too few tokens: more samples, or experts='all-tokens'"
        raise UnsupportedError(f"{name}: its input needs a static scale", [reason])
    how: Any = job.calibrate.observer
    spread = group.spread
    if group.scale is not None:
        top = float(group.stats.amax.max())
        spread, how = replace(spread, low=-top, high=top, counts=None), "max"
    return static_planes(act, observe_range(spread, act, how))


def tune_layer(
    job: Job,
    unit: Unit,
    module: nn.Module,
    targets: Mapping[str, Target],
    groups: Sequence[Group],
    weights: Mapping[str, Tensor],
    state: State,
    outputs: Sequence[Tensor],
    done: Done,
) -> None:
    """The algorithms that look at a whole layer."""
    tuned = {name: target for name, target in targets.items() if target.algo.tune}
    rest = [Group([n for n in g.names if n not in tuned], g.stats, g.spread, g.scale) for g in groups]
    encode_groups(job, targets, [g for g in rest if g.names], weights, done)
    first = next(iter(tuned.values()))
    begun = time.monotonic()

    def run(changed: Mapping[str, Tensor], i: int) -> Tensor:
        return run_with(job, unit, module, changed, state, i)

    specs = {name: target.format.weight for name, target in tuned.items()}
    assert first.algo.tune is not None
    with torch.enable_grad():
        found = first.algo.tune(run, {name: weights[name] for name in tuned}, specs, outputs, first.options)
    spent = (time.monotonic() - begun) / len(tuned)
    group_of = {name: group for group in groups for name in group.names}
    for name, encoded in found.items():
        finish(job, name, tuned[name], group_of[name], weights[name], encoded, spent, done)


def run_with(job: Job, unit: Unit, module: nn.Module, changed: Mapping[str, Tensor], state: State, i: int) -> Tensor:
    """The layer with other weights, differentiable in them."""
    held = joined(job, unit, module, changed)
    kept = {}
    for path, value in held.items():
        host, leaf = owner(module, path)
        kept[path] = host._parameters.pop(leaf)
        setattr(host, leaf, value)
    try:
        return job.layers.run(unit, module, state, i)
    finally:
        for path, old in kept.items():
            host, leaf = owner(module, path)
            delattr(host, leaf)
            host._parameters[leaf] = old


def joined(job: Job, unit: Unit, module: nn.Module, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by disk name -> parameters of the module, in its dtype; the rest of a parameter stays as it is."""
    from fewbit.workflows.layer_weights import LayerWeights

    def read(name: str) -> Tensor:
        value = changed.get(name.removesuffix(".weight"))
        return job.floats.read(name).to(job.device, torch.float32) if value is None else value

    held = LayerWeights(job.layers, unit, read)
    paths = [path for path, names in held.names.items() if any(n.removesuffix(".weight") in changed for n in names)]
    out = {}
    for path in paths:
        host, _ = owner(module, path)
        value = held[path].to(job.layers.options.dtype)
        out[path] = value.mT if value.dim() == 3 and getattr(host, "is_transposed", False) else value
    return out
