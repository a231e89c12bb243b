"""mixed: a format for each group of modules, so that a size is kept and as little as possible is lost.

Two things are measured, layer by layer, on the calibration text. What each format of each group does to the layer's
output, relative to the stream; and what an error of the stream at that layer does to the last logits, by carrying one
wrong copy per layer to the end. Their product is the KL divergence to expect. Groups are linears that read one tensor:
engines fuse them.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from fewbit.algos import get
from fewbit.errors import RequestError, UnsupportedError
from fewbit.models.layers import WHOLE, State, Unit
from fewbit.quant.qtensor import Quantized
from fewbit.quant.reference import decode
from fewbit.workflows import job as jobs
from fewbit.workflows import recipe as recipes
from fewbit.workflows.job import Job
from fewbit.workflows.layer_work import Done, Group, encode_groups, run_with, watch
from fewbit.workflows.plan import FLOATS, module_bytes, sizes
from fewbit.workflows.recipe import Recipe, Rule, Target
from fewbit.workflows.schemes import DENSE, resolve
from fewbit.workflows.weights import Weights

FROM = ("int3-g128", "int4-g128", "int8-channel")
TOKENS = 2048  # measured on; each layer carries a copy of them
Targets = Mapping[str, Target]


@dataclass(frozen=True, slots=True)
class Wrong:
    """A copy of the stream that went wrong behind one layer, and by how much: squared, relative."""

    state: State
    error: float


@dataclass(slots=True)
class Choice:
    """One group and what each candidate would cost and lose."""

    names: tuple[str, ...]
    layer: int
    nbytes: dict[str, int] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)  # squared, of the layer's output, relative
    chosen: str = ""


def choose(
    src: str | Path,
    *,
    bits: float | None = None,
    size: int | None = None,
    formats: Sequence[str] = (),
    base: str | None = None,
    show: bool = False,
    **asked: Any,
) -> Recipe:
    """The recipe that loses least at `bits` per quantized weight, or at `size` bytes for the whole checkpoint.

    formats: the candidates; "dense" may be one. base: a recipe or format whose rules stay as they are.
    """
    if (bits is None) == (size is None):
        raise RequestError("a target is either bits per weight or a size: give one of --target-bits and --target-size")
    names = list(dict.fromkeys([*formats, *([base] if base and not base.endswith((".yaml", ".yml")) else [])] or FROM))
    algo, options = asked.pop("algo", None), asked.pop("options", None)
    group = asked.get("group_size")
    first = next((n for n in names if n != DENSE), None)
    if first is None or len(names) < 2:
        raise RequestError(f"--from {','.join(names)}: name two formats or more to choose from, not all of them dense")
    job = jobs.prepared(src, Recipe(first, "rtn"), **asked)
    try:
        candidates = {name: _targets(job, name, group) for name in names}
        with torch.no_grad():
            choices, gains = measure(job, candidates)
        budget = _budget(job, choices, bits, size)
        fill(choices, gains, budget)
        return recipe_of(choices, algo, options, job.recipe.kv)
    finally:
        job.close()


def _targets(job: Job, name: str, group: int | None) -> Targets:
    if name == DENSE:
        return {}
    row = resolve(name)
    fitting = group if isinstance(row, str) and re.search(r"-g\d+", row) else None
    return recipes.targets(Recipe(name, "rtn", group_size=fitting), job.places.values(), job.codec)


def _budget(job: Job, choices: Sequence[Choice], bits: float | None, size: int | None) -> float:
    """Bytes for the groups."""
    weights = sum(prod(job.places[name].shape) for choice in choices for name in choice.names)
    if bits is not None:
        budget = bits * weights / 8
    else:
        held = {name for choice in choices for name in choice.names}
        assert size is not None
        budget = size - sum(n for name, n in sizes(job).items() if name not in held)
    least = sum(min(choice.nbytes.values()) for choice in choices)
    if budget < least:
        found = f"{least * 8 / weights:.3f} bits per weight, {least} bytes"
        raise RequestError(f"the target is below what the smallest candidates give: {found}; add a smaller format")
    return budget


def measure(job: Job, candidates: Mapping[str, Targets]) -> tuple[list[Choice], dict[int, float]]:
    """-> the groups with what each candidate costs and loses, and what an error at each layer's end does at the end."""
    job.calibrate = replace(job.calibrate, samples=max(1, TOKENS // job.calibrate.length), batch_tokens=TOKENS)
    state = jobs.start(job)
    if job.units[0].name == WHOLE:
        raise UnsupportedError("mixed precision is measured layer by layer", ["this model does not run that way"])
    copies: dict[int, Wrong] = {}
    choices: list[Choice] = []
    for unit in job.units:
        found, wrong = _layer(job, unit, candidates, state)
        choices += found
        with job.layers.loaded(unit) as module:
            for run in [state, *(copy.state for copy in copies.values())]:
                for i in range(len(run)):
                    run[i] = job.layers.run(unit, module, run, i)
        if wrong is not None:
            copies[unit.index] = wrong
    return choices, gains_of(job, state, copies)


def _layer(job: Job, unit: Unit, candidates: Mapping[str, Targets], state: State) -> tuple[list[Choice], Wrong | None]:
    """The groups of one layer, and the state after it with all of them in the smallest format."""
    targets = {n: t for held in candidates.values() for n, t in held.items() if f"{n}.weight" in unit.names}
    if not targets:
        return [], None
    with job.layers.loaded(unit) as module:
        groups, (wanted,) = watch(job, unit, module, targets, state, Done())
        weights = dict(Weights(job, tuple(targets)))
        choices = [Choice(names, unit.index) for names in merged(job, groups)]
        for choice in choices:
            members = [Group([n for n in g.names if n in choice.names], g.stats, g.spread) for g in groups]
            members = [g for g in members if g.names]
            for name, held in candidates.items():
                choice.nbytes[name] = sum(_bytes(job, held.get(n), n) for n in choice.names)
                instead = _encoded(job, held, members, weights) if name != DENSE else {}
                choice.error[name] = _relative(_output(job, unit, module, instead, state), wanted) if instead else 0.0
    smallest = {n: held for choice in choices for n, held in _least(choice, candidates).items()}
    instead = _encoded(job, smallest, groups, weights)
    wrong = State(state.ids[:1], type(state.hidden)(1), state.calls)
    with job.layers.loaded(unit, instead) as module:
        wrong[0] = job.layers.run(unit, module, state, 0)
    return choices, Wrong(wrong, _relative(wrong.hidden[0], wanted))


def _output(job: Job, unit: Unit, module: nn.Module, instead: Mapping[str, Quantized], state: State) -> Tensor:
    """Of the layer with some modules quantized; only where inputs are rounded must it be put together anew."""
    if any(q.format.act for q in instead.values()):
        with job.layers.loaded(unit, instead) as other:
            return job.layers.run(unit, other, state, 0)
    return run_with(job, unit, module, {name: decode(q.weight) for name, q in instead.items()}, state, 0)


def _least(choice: Choice, candidates: Mapping[str, Targets]) -> dict[str, Target]:
    """The targets of a group's smallest candidate that is not dense."""
    name = min((n for n in choice.nbytes if n != DENSE), key=choice.nbytes.__getitem__)
    return {n: candidates[name][n] for n in choice.names}


def _encoded(
    job: Job, targets: Targets, groups: Sequence[Group], weights: Mapping[str, Tensor]
) -> dict[str, Quantized]:
    done = Done()
    nearest = get("rtn")
    plain = {n: Target(t.format, t.row, (nearest,), nearest.options(), t.rule) for n, t in targets.items()}
    held = [Group([n for n in g.names if n in targets], g.stats, g.spread) for g in groups]
    encode_groups(job, plain, [g for g in held if g.names], weights, done)
    return done.values


def _bytes(job: Job, target: Target | None, name: str) -> int:
    shape = job.places[name].shape
    if target is None:
        return prod(shape) * FLOATS.get(job.floats.dense[f"{name}.weight"].dtype, 2)
    return module_bytes(job, target.format, shape)


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted.float()).square().sum() / wanted.float().square().sum())


def merged(job: Job, groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """Groups whose parameters are one stack belong together: experts of a projection share a format."""
    owner: dict[str, int] = {}
    held: dict[int, list[str]] = defaultdict(list)
    for i, group in enumerate(groups):
        paths = [t for name in group.names for t in job.layers.places[f"{name}.weight"].targets]
        at = next((owner[path] for path in paths if path in owner), i)
        owner |= dict.fromkeys(paths, at)
        held[at] += group.names
    return [tuple(names) for names in held.values()]


def gains_of(job: Job, state: State, copies: Mapping[int, Wrong]) -> dict[int, float]:
    """Layer -> KL divergence at the end for each unit of squared relative error of the stream behind that layer."""
    wanted = job.layers.logits(state, 0).log_softmax(-1)
    gains = {}
    for layer, copy in copies.items():
        got = job.layers.logits(copy.state, 0).log_softmax(-1)
        divergence = float(kl_div(got, wanted, log_target=True, reduction="sum")) / prod(wanted.shape[:-1])
        gains[layer] = divergence / max(copy.error, 1e-12)
    return gains


def fill(choices: Sequence[Choice], gains: Mapping[int, float], budget: float) -> None:
    """Begin with the smallest everywhere, then spend where a byte saves most, along each group's convex hull."""
    steps = []
    for choice in choices:
        hull = hull_of(choice)
        choice.chosen = hull[0]
        for before, after in pairwise(hull):
            cost = choice.nbytes[after] - choice.nbytes[before]
            saved = (choice.error[before] - choice.error[after]) * gains.get(choice.layer, 1.0)
            steps.append((saved / cost, cost, choice, after))
    left = budget - sum(choice.nbytes[choice.chosen] for choice in choices)
    for _, cost, choice, after in sorted(steps, key=lambda step: -step[0]):
        current = choice.nbytes[after] - choice.nbytes[choice.chosen]
        if current == cost and cost <= left:  # a step whose forerunner was left out is left out too
            left -= cost
            choice.chosen = after


def hull_of(choice: Choice) -> list[str]:
    """The candidates from small to large of which each saves more for a byte than the ones after it."""
    names = sorted(choice.nbytes, key=lambda n: (choice.nbytes[n], choice.error[n]))
    hull: list[str] = []
    for name in names:
        if hull and choice.error[name] >= choice.error[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(choice, hull[-2], hull[-1]) <= _slope(choice, hull[-2], name):
            hull.pop()
        hull.append(name)
    return hull


def _slope(choice: Choice, a: str, b: str) -> float:
    return (choice.error[a] - choice.error[b]) / max(1, choice.nbytes[b] - choice.nbytes[a])


def recipe_of(choices: Sequence[Choice], algo: str | None, options: Any, kv: str) -> Recipe:
    """One rule for each group that does not get the most common format."""
    common = Counter(choice.chosen for choice in choices if choice.chosen != DENSE).most_common(1)
    base = common[0][0] if common else DENSE
    rules = tuple(Rule(pattern(c.names), c.chosen) for c in choices if c.chosen != base)
    return Recipe(base, algo or recipes.AUTO, dict(options or {}), rules, kv)


def pattern(names: Sequence[str]) -> str:
    """A regular expression for just these names."""
    if len(names) == 1:
        return names[0]
    parents = {name.rpartition(".")[0] for name in names}
    leaves = "|".join(dict.fromkeys(re.escape(name.rpartition(".")[2]) for name in names))
    if len(parents) == 1:
        return f"re:{re.escape(parents.pop())}[.]({leaves})"
    numbered = {re.sub(r"\d+$", "#", parent) for parent in parents}
    if len(numbered) == 1:
        return f"re:{re.escape(numbered.pop()).replace(re.escape('#'), '[0-9]+')}[.]({leaves})"
    return "re:" + "|".join(re.escape(name) for name in names)
