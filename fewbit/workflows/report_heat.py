"""The error map: module kinds down, decoder layers across, coloured by one of several measures; and tokens by expert.

Every cell carries its colour and its words for each measure, so that the page switches between them without arithmetic.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from markupsafe import Markup

from fewbit.workflows.report_data import Coverage, Experts, Module, Run, finite
from fewbit.workflows.report_numbers import duration, number, percent
from fewbit.workflows.report_svg import STEPS, WIDTH, Ramp, el, ramp, rect, svg, text

LABEL = 200  # room for the names at the left
WIDEST, NARROWEST, ROW = 44.0, 9.0, 26


@dataclass(frozen=True, slots=True)
class Measure:
    """One way to colour the map."""

    key: str
    label: str
    of: Callable[[Module], float | None]
    say: Callable[[float], str]
    fold: Callable[[Sequence[float]], float] = max  # of several modules in one cell


MEASURES = (
    Measure("error", "Error", lambda m: finite(m.get("error")), percent),
    Measure("gain", "Loss against RTN", lambda m: gain(m), lambda v: f"{number(v, 3)} × RTN"),
    Measure("bits", "Bits per weight", lambda m: finite(m.get("bits")), lambda v: f"{number(v)} bits", fmean),
    Measure("damp", "Damping", lambda m: finite(m.get("damp")), lambda v: number(v, 3)),
    Measure("seconds", "Time", lambda m: finite(m.get("seconds")), duration, sum),
)


def gain(module: Module) -> float | None:
    """The loss as a part of what rounding to nearest would have lost."""
    loss, rtn = finite(module.get("loss")), finite(module.get("rtn_loss"))
    return None if loss is None or not rtn else loss / rtn


def measures(modules: Sequence[Module]) -> list[Measure]:
    """Those that tell modules apart; the first one that is known stays in any case."""
    known = [(m, {m.of(module) for module in modules} - {None}) for m in MEASURES]
    telling = [m for m, values in known if len(values) > 1]
    return telling or [m for m, values in known if values][:1]


@dataclass(frozen=True, slots=True)
class Columns:
    """Where the layers stand; shared by every chart that runs over them."""

    layers: list[int]
    cell: float

    @property
    def width(self) -> float:
        return LABEL + self.cell * len(self.layers) + 20

    def x(self, layer: int) -> float:
        return LABEL + self.cell * self.layers.index(layer)

    def numbers(self, y: float) -> list[Markup]:
        """Layer numbers, as many as fit."""
        every = max(1, -(-26 // int(self.cell)))
        return [text(self.x(n) + self.cell / 2, y, n, "middle", "tick") for n in self.layers[::every]]


def columns(run: Run) -> Columns:
    """One for every layer that anything is known of."""
    layers = {m["layer"] for m in run["modules"] if m.get("layer") is not None}
    layers |= {layer.get("layer", i) for i, layer in enumerate(run.get("layers", []))}
    layers |= {e["layer"] for e in run.get("coverage", {}).get("experts", [])}
    room = (WIDTH - LABEL - 20) / max(len(layers), 1)
    return Columns(sorted(n for n in layers if n is not None), min(max(room, NARROWEST), WIDEST))


@dataclass(frozen=True, slots=True)
class Heat:
    """The picture, what its cells say, and the legend of each measure."""

    picture: Markup
    cells: list[dict[str, Any]]
    legends: list[dict[str, Any]]


def heat(run: Run, where: Columns) -> Heat | None:
    """Modules inside layers; None where there are none or nothing was measured."""
    modules = run["modules"]
    inside = [i for i, m in enumerate(modules) if m.get("layer") is not None]
    shown = measures([modules[i] for i in inside])
    if not inside or not shown:
        return None
    groups: dict[tuple[str, int], list[int]] = {}
    for i in inside:
        groups.setdefault((modules[i]["kind"], modules[i]["layer"] or 0), []).append(i)
    folded = [{m.key: _fold(m, [modules[i] for i in members]) for m in shown} for members in groups.values()]
    ramps = {m.key: ramp([v for f in folded if (v := f[m.key]) is not None]) for m in shown}
    cells = [
        _cell(kind, layer, members, {m.key: (m, ramps[m.key], values[m.key]) for m in shown}, modules)
        for ((kind, layer), members), values in zip(groups.items(), folded, strict=True)
    ]
    return Heat(_picture(cells, shown[0], where), cells, [_legend(m, ramps[m.key]) for m in shown])


def _fold(measure: Measure, members: Sequence[Module]) -> float | None:
    values = [v for m in members if (v := measure.of(m)) is not None]
    return measure.fold(values) if values else None


def _cell(
    kind: str,
    layer: int,
    members: list[int],
    values: dict[str, tuple[Measure, Ramp, float | None]],
    modules: Sequence[Module],
) -> dict[str, Any]:
    worst = sorted(members, key=lambda i: -(finite(modules[i].get("error")) or 0))
    said = {key: [r.step(v), m.say(v)] if v is not None else None for key, (m, r, v) in values.items()}
    return {"kind": kind, "layer": layer, "modules": worst, "values": said}


def _picture(cells: Sequence[dict[str, Any]], first: Measure, where: Columns) -> Markup:
    kinds = list(dict.fromkeys(c["kind"] for c in cells))
    height = ROW * len(kinds) + 24
    names = [text(LABEL - 10, ROW * i + 17, kind, "end", "t mono") for i, kind in enumerate(kinds)]
    gap = 2 if where.cell > 14 else 1
    boxes = [
        rect(
            where.x(c["layer"]), ROW * kinds.index(c["kind"]), where.cell - gap, ROW - gap, rx=3 if gap == 2 else 1,
            class_=_colour(c["values"][first.key]), data_cell=i, tabindex=0 if i == 0 else -1, role="button",
            aria_label=f"layer {c['layer']} {c['kind']}: {(c['values'][first.key] or ['', 'not measured'])[1]}",
        )
        for i, c in enumerate(cells)
    ]  # fmt: skip
    return el(
        "svg", *names, *boxes, *where.numbers(height - 6), class_="chart", id="heat", role="group",
        viewBox=f"0 0 {where.width:g} {height:g}", width=where.width, height=height,
        aria_label=f"{first.label} by layer and module kind; arrow keys move, Enter shows the module",
    )  # fmt: skip


def _colour(value: list[Any] | None) -> str:
    return "cell none" if value is None else f"cell h{value[0]}"


def _legend(measure: Measure, scale: Ramp) -> dict[str, Any]:
    ends = [measure.say(scale.at(share)) for share in (0, 0.5, 1)]
    return {"key": measure.key, "label": measure.label, "ends": ends, "log": scale.log}


def swatches(prefix: str) -> Markup:
    """The colours of a ramp side by side."""
    boxes = [rect(18 * i, 0, 18, 10, class_=f"{prefix}{i}") for i in range(STEPS)]
    return el("svg", *boxes, width=18 * STEPS, height=10, class_="swatches", aria_hidden="true")


def experts(coverage: Coverage, where: Columns) -> Markup | None:
    """Tokens by layer (across) and expert (down); those with too few are outlined."""
    seen = [e for e in coverage.get("experts", []) if e["tokens"]]
    if not seen:
        return None
    most = max(len(e["tokens"]) for e in seen)
    row = 14 if most <= 32 else 8 if most <= 64 else 4
    scale = ramp([n + 1 for e in seen for n in e["tokens"]])
    height = most * row + 32
    every = max(1, 16 // row)
    names = [text(LABEL - 10, 8 + i * row + min(row, 11), f"expert {i}", "end", "tick") for i in range(0, most, every)]
    least = coverage.get("least_tokens", 0)
    marks = [mark for e in seen for mark in _expert_column(e, where, row, scale, least)]
    return svg(
        where.width, height, *marks, *names[:: 1 if every == 1 else 2], *where.numbers(height - 6),
        label="tokens seen by each expert of each layer", id="experts",
    )  # fmt: skip


def _expert_column(seen: Experts, where: Columns, row: int, scale: Ramp, least: int) -> list[Markup]:
    x, width = where.x(seen["layer"]), where.cell - (2 if where.cell > 14 else 1)
    return [
        rect(
            x, 8 + i * row, width, row - 1, class_=f"cell c{scale.step(n + 1)}" + (" few" if n < least else ""),
            data_tip=f"layer {seen['layer']}, expert {i}\n{n:,} tokens" + (" (too few)" if n < least else ""),
        )
        for i, n in enumerate(seen["tokens"])
    ]  # fmt: skip
