"""diff: two models on the same tokens, layer by layer: which module is the first that its format does not explain.

Each runs on its own hidden states. Every module that holds weights is also given the other's inputs, so that its error
is its own and not what it inherited.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbit import codecs
from fewbit.errors import RequestError
from fewbit.kernels.registry import DECODED
from fewbit.models.finding import refuse_on_errors
from fewbit.models.hidden import Hidden
from fewbit.models.layers import WHOLE, Layers, State, Unit
from fewbit.models.verify import verify_source
from fewbit.quant.plan import Plan
from fewbit.quant.spec import Format
from fewbit.workflows import diff_tally
from fewbit.workflows.diff_calls import Call, loose, taped
from fewbit.workflows.diff_folds import Fold, folds
from fewbit.workflows.diff_tally import FACTOR, ModuleDifference, Tally, relative, squared, vectors
from fewbit.workflows.evaluate import (
    DTYPES,
    FIGURES,
    by_document,
    chosen_windows,
    quiet,
    row,
    told,
)
from fewbit.workflows.evaluate_format import rounded
from fewbit.workflows.evaluate_intervals import Estimate, estimates
from fewbit.workflows.evaluate_stream import COLUMNS, Progress, Run, check_ids, score, targets
from fewbit.workflows.evaluate_text import Windows

ALIVE = 4  # logits at a time, beside those that evaluation holds


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """Relative error of what a decoder layer gives: with its own inputs, and with a's."""

    name: str
    own: float
    same: float


@dataclass(frozen=True, slots=True)
class Difference:
    """modules: in the order in which they run. guilty: the first whose error its format does not explain."""

    a: str
    b: str
    format: str | None
    kernels: tuple[str, str]
    activations: tuple[str, str]
    text: str
    digest: str
    windows: int
    tokens: int
    dtype: str
    modules: tuple[ModuleDifference, ...]
    layers: tuple[LayerDifference, ...]
    perplexity: Estimate  # of b
    base_perplexity: Estimate  # of a
    kl: Estimate  # nats per token, KL(a || b)
    agreement: Estimate
    difference: Estimate  # of log-perplexity, b - a

    @property
    def guilty(self) -> ModuleDifference | None:
        return next((m for m in self.modules if m.exceeded), None)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"guilty": asdict(self.guilty) if self.guilty else None}


def diff(
    a: str | Path,
    b: str | Path | None = None,
    *,
    text: str | Path | None = None,
    ids: Tensor | Sequence[Tensor] | None = None,
    tokenizer: Any = None,
    tokens: int = 2048,
    context: int = 512,
    format: str | Format | Plan | None = None,
    kernels: tuple[str, str] = (DECODED, DECODED),
    activations: tuple[str, str] = ("declared", "declared"),
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress = quiet,
) -> Difference:
    """Compare b with a. b: another checkpoint, or a itself (None) under another format, kernel or activations.

    kernels, activations: of a and of b, as `load` takes them. format: rounds b's float weights as they are read.
    dtype: of both; None = as a says. trust_remote_code: of both.
    """
    if b is None and format is None and kernels[0] == kernels[1] and activations[0] == activations[1]:
        raise RequestError(f"{a}: compared with what? Name another checkpoint, or a format, kernels or activations")
    with ExitStack() as stack, torch.no_grad():
        sources = [stack.enter_context(codecs.open(p, trust_remote_code)) for p in (a, a if b is None else b)]
        for source in sources:
            refuse_on_errors(source.path, verify_source(source))
        other: Any = sources[1] if format is None else rounded(sources[1], format)
        mine = Layers(sources[0], dtype=DTYPES.get(str(dtype), dtype), device=device, activations=activations[0])
        theirs = Layers(other, dtype=mine.options.dtype, device=device, activations=activations[1])
        for layers, kernel in zip((mine, theirs), kernels, strict=True):
            layers.options = replace(layers.options, kernels=kernel)
        check_same(mine, theirs)
        cut = chosen_windows(text, ids, tokenizer, sources[0], context, max(1, -(-tokens // context)))
        check_ids(mine, cut.largest, max(map(len, cut.rows)))
        pair = Pair(mine, theirs, cut)
        pair.run(stack, progress)
    found = estimates(by_document(pair.sums, cut), FIGURES, seed)
    return Difference(
        str(a), str(a if b is None else b), None if format is None else told(format), kernels, activations, cut.label,
        cut.digest, len(cut.rows), cut.scored, str(mine.options.dtype)[6:], pair.modules(), tuple(pair.layers), **found,
    )  # fmt: skip


def check_same(a: Layers, b: Layers) -> None:
    """Both must be one architecture of one size."""
    shapes = a.rules.parameters, b.rules.parameters
    types = [getattr(layers.config, "model_type", "") for layers in (a, b)]
    for name in sorted({*shapes[0], *shapes[1]}):
        found = [list(s[name]) if name in s else "not there" for s in shapes]
        if found[0] != found[1]:
            text = f"{name} is {found[0]} in {a.source.path}, {found[1]} in {b.source.path}"
            raise RequestError(f"not the same architecture ({types[0]} and {types[1]}): {text}")
    if a.path != b.path:
        raise RequestError(f"{a.source.path} runs by layers at {a.path!r}, {b.source.path} at {b.path!r}")


def head_of(layers: Layers) -> int:
    """The width of an attention head."""
    text = layers.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    return getattr(text, "head_dim", None) or max(1, getattr(text, "hidden_size", heads) // heads)


class Pair:
    """Two models on their way through the same tokens, and what was seen of them."""

    def __init__(self, a: Layers, b: Layers, cut: Windows):
        self.a, self.b = a, b
        self.batches = cut.batches(1)
        self.ids = cut.stacked(self.batches)
        self.tallies: dict[str, Tally] = {}
        self.first: set[str] = set()  # modules that run before the layers
        self.folds: dict[str, Fold] = {}  # of the unit that is loaded
        self.layers: list[LayerDifference] = []
        self.sums = torch.zeros(len(cut.rows), len(COLUMNS), dtype=torch.float64)

    def run(self, stack: ExitStack, progress: Progress) -> None:
        states = self.a.start(self.ids), self.b.start(self.ids)
        units = {unit.name: (unit, other) for unit, other in zip(self.a.units, self.b.units, strict=True)}
        runs = Run(self.a, states[0]), Run(self.b, states[1])
        for name in progress(units, "layers"):
            context = stack if name == WHOLE else ExitStack()
            loaded = [context.enter_context(m.loaded(u)) for m, u in zip((self.a, self.b), units[name], strict=True)]
            self._unit(units[name], loaded, states)
            if name == WHOLE:
                runs = Run(self.a, states[0], loaded[0]), Run(self.b, states[1], loaded[1])
            else:
                context.close()
        for name in progress([str(i) for i in range(len(self.ids))], "scoring"):
            self._score(runs, int(name))

    def _unit(self, units: tuple[Unit, Unit], loaded: list[nn.Module], states: tuple[State, State]) -> None:
        name = units[0].name
        prefix = "" if name == WHOLE else name
        sums = {"norm": 0.0, "own": 0.0, "same": 0.0}
        for i in range(len(self.ids)):
            with taped(loaded[0], prefix) as mine:
                out = self.a.run(units[0], loaded[0], states[0], i)
            with taped(loaded[1], prefix) as theirs:
                own = self.b.run(units[1], loaded[1], states[1], i)
            if i == 0:
                self.folds = folds(mine, {call.path: self._modules(call) for call in mine}, head_of(self.a))
            same = own if name == WHOLE else self._with_inputs(units[1], loaded[1], states, i)
            for key, value in (("norm", out), ("own", own.float() - out), ("same", same.float() - out)):
                sums[key] += squared(value)
            self._count(mine, theirs)
            if name != WHOLE:
                states[0][i], states[1][i] = out, own
        self.layers.append(LayerDifference(name, *(relative(sums[k], sums["norm"]) for k in ("own", "same"))))
        self._loose(loaded, prefix)
        self._forget()

    def _with_inputs(self, unit: Unit, module: nn.Module, states: tuple[State, State], i: int) -> Tensor:
        """What b's unit gives for a's hidden states."""
        state = State(states[1].ids, Hidden(len(self.ids)), states[1].calls)
        state[i] = states[0].hidden[i]
        return self.b.run(unit, module, state, i)

    def _count(self, mine: Sequence[Call], theirs: Sequence[Call]) -> None:
        """Pair the calls of one batch: the n-th of a module with its n-th."""
        held: dict[str, list[Call]] = {}
        for call in theirs:
            held.setdefault(call.path, []).append(call)
        for call in mine:
            others = held.get(call.path, [])
            other = others.pop(0) if others else None
            modules, fold = self._modules(call), self.folds.get(call.path, Fold())
            moved = fold.call(call)
            tally = self.tallies.get(call.path)
            if tally is None:
                tally = self.tallies[call.path] = Tally(call.path)
                diff_tally.begin(tally, moved, *modules, fold)
            diff_tally.add(tally, moved, other, *modules, fold)

    def _modules(self, call: Call) -> tuple[nn.Module, nn.Module]:
        path = call.path.removesuffix(f".{call.projection}") if call.projection else call.path
        return self.a.model.get_submodule(path), self.b.model.get_submodule(path)

    def _loose(self, roots: Sequence[nn.Module], prefix: str, without: str = "") -> None:
        """Parameters that stand beside modules."""
        for (path, x), (_, y) in zip(*(loose(root, without) for root in roots), strict=True):
            name = ".".join(part for part in (prefix, path) if part)
            gap, norm = vectors(x, y)
            self.tallies[name] = Tally(name, type(x).__name__, weight=relative(gap, norm))

    def _forget(self) -> None:
        self.folds = {}
        for tally in self.tallies.values():
            tally.roundings.clear()

    def _score(self, runs: tuple[Run, Run], i: int) -> None:
        """Logits of both a piece at a time; what is outside the layers is compared on the way."""
        step = runs[0].step(i, ALIVE)
        columns = torch.zeros(len(self.batches[i]), len(COLUMNS), dtype=torch.float64)
        for (mine, logits), (theirs, others), wanted in zip(
            *(self._heard(run, i, step) for run in runs), targets(runs[0].state.ids[i], step), strict=True
        ):
            self._count(mine, theirs)
            columns += score([others, logits], wanted)
        self.sums[self.batches[i]] = columns
        if i == len(self.ids) - 1:
            if self.a.path:
                self._loose([m.model for m in (self.a, self.b)], "", self.a.path)
            self._forget()

    def _heard(self, run: Run, i: int, step: int) -> Iterator[tuple[list[Call], Tensor]]:
        """Pieces of logits, each with the calls outside the layers that made it."""
        pieces = run.pieces(i, step)
        while True:
            with ExitStack() as stack:
                calls: list[Call] = []
                if run.whole is None:
                    calls = stack.enter_context(taped(run.layers.model, "", run.layers.path))
                    stack.enter_context(self._boundary(run.layers, calls))
                logits = next(pieces, None)
            if logits is None:
                return
            yield calls, logits

    def _boundary(self, layers: Layers, calls: list[Call]) -> ExitStack:
        """Note which modules have run when the first layer is reached."""

        def reached(*args: Any) -> None:
            self.first |= {call.path for call in calls}

        stack = ExitStack()
        stack.callback(layers.model.get_submodule(layers.path)[0].register_forward_pre_hook(reached).remove)
        return stack

    def modules(self) -> tuple[ModuleDifference, ...]:
        """In the order in which they run."""
        order = sorted(self.tallies.values(), key=lambda t: t.name not in self.first)
        return tuple(t.result(self.a.options.dtype) for t in order)


def verdict(found: Difference) -> str:
    """The first guilty module, in a sentence."""
    m = found.guilty
    if m is None:
        return "every module is within what its format explains"
    if m.same is None or m.limit is None or m.same <= m.limit:
        return f"first guilty: {m.name}: its weights are {m.weight:.3g} apart, and no format explains that"
    return (
        f"first guilty: {m.name}: on the same inputs its output is {m.same:.3g} apart; its format explains"
        f" {m.explained:.3g} (allowed: {FACTOR:g} times that, and rounding: {m.limit:.3g})"
    )


def figures(found: Difference) -> list[tuple[str, str, str]]:
    """Rows for a table: (figure, value, 95 % interval)."""
    return [
        row("perplexity of A", found.base_perplexity, ".3f"),
        row("perplexity of B", found.perplexity, ".3f"),
        row("KL(A || B), nats per token", found.kl, ".6f"),
        row("top-1 agreement", found.agreement, ".4f"),
    ]


def module_rows(found: Difference, every: bool = False) -> list[tuple[str, ...]]:
    """Rows for a table (module, formats, errors of weights, on the same inputs, on its own, explained).

    Those that exceed their limit and the ten largest, or all.
    """
    worst = sorted(found.modules, key=lambda m: -(m.same or 0))[:10]
    shown = [m for m in found.modules if every or m.exceeded or m in worst]
    return [(m.name, formats(m), cell(m.weight), cell(m.same), cell(m.own), explained(m)) for m in shown]


def explained(m: ModuleDifference) -> str:
    return cell(m.explained) + ", exceeded" * m.exceeded


def formats(m: ModuleDifference) -> str:
    return m.format_b if m.format_a == m.format_b else f"{m.format_a} / {m.format_b}"


def cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def layer_rows(found: Difference) -> Iterable[tuple[str, str, str]]:
    """Rows for a table: (layer, error on the same inputs, on its own)."""
    return [(layer.name, cell(layer.same), cell(layer.own)) for layer in found.layers]
