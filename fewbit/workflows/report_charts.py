"""The other pictures: stacked bars, strips over the layers, histograms, intervals and predictions."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import mode

from markupsafe import Markup

from fewbit.workflows.report_data import Distribution, Evaluation, Layer, Module, Part, Prediction, finite
from fewbit.workflows.report_heat import LABEL, Columns
from fewbit.workflows.report_numbers import duration, number, percent, plural, size
from fewbit.workflows.report_svg import WIDTH, Ramp, el, line, ramp, rect, svg, text, ticks

COLOURS = 5  # and one for everything else
PLAIN = ("bf16", "f16", "f32", "bfloat16", "float16", "float32", "dense")


def colours(names: Sequence[str]) -> dict[str, str]:
    """A class for each name, in this order; what is dense, and what comes after the fifth, is grey."""
    coloured = [n for n in dict.fromkeys(names) if n.lower() not in PLAIN]
    return {n: f"s{coloured.index(n) + 1}" if n in coloured[:COLOURS] else "s0" for n in names}


def size_bars(before: Sequence[Part], after: Sequence[Part]) -> Markup:
    """The bytes of each format before and after, to one scale."""
    chosen = colours([p["format"] for p in (*after, *before)])
    total = max(sum(p["bytes"] for p in parts) for parts in (before, after)) or 1
    room = WIDTH - 260
    marks: list[Markup] = []
    for y, name, parts in ((4, "before", before), (44, "after", after)):
        bar, end = _stack([(p["format"], p["bytes"], size(p["bytes"])) for p in parts], chosen, 70, y, room / total)
        marks += [text(60, y + 20, name, "end"), *bar]
        marks.append(text(end + 8, y + 20, size(sum(p["bytes"] for p in parts)), class_="t strong"))
    return el("div", svg(WIDTH, 80, *marks, label="bytes by format before and after", id="size-bars"), _key(chosen))


def stage_bar(stages: Mapping[str, float]) -> Markup:
    """Where the time went."""
    chosen = {name: f"s{i + 1}" if i < COLOURS else "s0" for i, name in enumerate(stages)}
    parts = [(name, seconds, duration(seconds)) for name, seconds in stages.items()]
    bar, _ = _stack(parts, chosen, 0, 4, WIDTH / (sum(stages.values()) or 1))
    words = {f"{name} {said}": chosen[name] for name, _, said in parts}
    return el("div", svg(WIDTH, 40, *bar, label="seconds of each stage", id="stage-bar"), _key(words))


def _stack(
    parts: Sequence[tuple[str, float, str]], chosen: Mapping[str, str], x: float, y: float, scale: float
) -> tuple[list[Markup], float]:
    marks = []
    for name, value, said in parts:
        width = value * scale
        marks.append(rect(x, y, width - 1.5, 30, rx=3, class_=f"bar {chosen[name]}", data_tip=f"{name}\n{said}"))
        x += width
    return marks, x


def _key(chosen: Mapping[str, str]) -> Markup:
    marks = [el("span", el("i", class_=f"dot {colour}"), name, class_="key") for name, colour in chosen.items()]
    return el("div", *marks, class_="legend")


STRIP = 48
STRIPS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("seconds", "time", duration),
    ("memory", "peak memory", size),
    ("error", "output error", percent),
)


def strips(layers: Sequence[Layer], modules: Sequence[Module], where: Columns) -> Markup | None:
    """Time, memory and error of each layer and the damping of its modules, under one another over the same columns."""
    at = {layer.get("layer", i): layer for i, layer in enumerate(layers)}
    at = {n: layer for n, layer in at.items() if n in where.layers}
    rows: list[Callable[[float], list[Markup]]] = []
    for key, name, say in STRIPS:
        values = {n: v for n, layer in at.items() if (v := finite(layer.get(key))) is not None}
        if values:
            rows.append(partial(_bars, values, name, say, where))
    damped = [
        (n, v, m) for m in modules if (n := m.get("layer")) is not None and (v := finite(m.get("damp"))) is not None
    ]
    if len({v for _, v, _ in damped}) > 1:
        rows.append(partial(_dots, damped, where))
    if not rows:
        return None
    marks = [mark for i, row in enumerate(rows) for mark in row(i * (STRIP + 22) + 6)]
    height = len(rows) * (STRIP + 22) + 20
    return svg(where.width, height, *marks, *where.numbers(height - 6), label="figures of each layer", id="strips")


def _bars(
    values: Mapping[int, float], name: str, say: Callable[[float], str], where: Columns, y: float
) -> list[Markup]:
    top = max(values.values()) or 1.0
    marks = _strip_frame(name, f"up to {say(top)}", where, y)
    for n, value in values.items():
        tall = STRIP * value / top
        marks.append(
            rect(where.x(n), y + STRIP - tall, where.cell - 2, tall, rx=2, class_="bar s1",
                 data_tip=f"layer {n}\n{name} {say(value)}")
        )  # fmt: skip
    return marks


def _dots(damps: Sequence[tuple[int, float, Module]], where: Columns, y: float) -> list[Markup]:
    """One for each damping that a layer's modules have; raised ones stand out."""
    scale = ramp([v for _, v, _ in damps])
    usual = mode(v for _, v, _ in damps)
    marks = _strip_frame("damping", f"{number(scale.low, 2)} to {number(scale.high, 2)}", where, y)
    groups: dict[tuple[int, float], list[str]] = {}
    for n, value, module in damps:
        groups.setdefault((n, value), []).append(module["name"])
    for (n, value), names in groups.items():
        x, height = where.x(n) + where.cell / 2 - 1, 5 + scale.share(value) * (STRIP - 10)
        who = names[0] if len(names) == 1 else f"layer {n}, {len(names)} modules"
        colour, tip = "s2" if value > usual else "s1", f"{who}\ndamping {number(value, 3)}"
        marks.append(el("circle", cx=x, cy=y + STRIP - height, r=3.5, class_=f"mark {colour}", data_tip=tip))
    return marks


def _strip_frame(name: str, said: str, where: Columns, y: float) -> list[Markup]:
    return [
        text(LABEL - 10, y + STRIP / 2 - 2, name, "end"),
        text(LABEL - 10, y + STRIP / 2 + 14, said, "end", "tick"),
        line(LABEL, y + STRIP + 0.5, where.width - 20, y + STRIP + 0.5),
    ]


def histogram(d: Distribution) -> Markup:
    """Weights before (filled) and after (line), as shares of their totals."""
    width, height, foot = 340, 150, 18
    tallest = max(max(counts) / (sum(counts) or 1) for counts in (d["before"], d["after"])) or 1.0
    marks = [
        el("path", d=_outline(counts, tallest, width, height - foot, close), class_=style)
        for counts, close, style in ((d["before"], True, "before"), (d["after"], False, "after"))
    ]
    middle = 0 if d["low"] < 0 < d["high"] else (d["low"] + d["high"]) / 2
    share = (middle - d["low"]) / ((d["high"] - d["low"]) or 1)
    labels = [
        text(0, height - 4, number(d["low"], 3), class_="tick"),
        text(width * share, height - 4, number(middle, 3), "middle", "tick"),
        text(width, height - 4, number(d["high"], 3), "end", "tick"),
    ]
    base = line(0, height - foot + 0.5, width, height - foot + 0.5)
    return svg(
        width, height, *marks, base, *labels, label=f"weights of {d['module']} before and after", class_="chart hist"
    )


def _outline(counts: Sequence[int], tallest: float, width: float, height: float, close: bool) -> str:
    """A stair of square roots: the tails matter and would vanish beside the middle."""
    total = sum(counts) or 1
    step, room = width / max(len(counts), 1), height - 6
    heights = [(c / total / tallest) ** 0.5 * room for c in counts]
    stairs = "".join(f"V{height - h:.1f}H{(i + 1) * step:.1f}" for i, h in enumerate(heights))
    return f"M0 {height:g}{stairs}V{height:g}" + ("Z" if close else "")


def forest(rows: Sequence[Evaluation]) -> Markup:
    """One metric: a dot and its interval for each text, and where no change lies."""
    spans = [_span(r) for r in rows]
    changes = spans[0][3]
    low, high = min(s[1] for s in spans), max(s[2] for s in spans)
    low, high = (min(low, 0.0), max(high, 0.0)) if changes else (low, high)
    pad = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    scale = Ramp(low - pad, high + pad, False)
    height = 34 * len(rows) + 26
    say: Callable[[float], str] = (
        (lambda v: percent(v, True)) if changes else percent if rows[0].get("share") else number
    )
    marks = [
        mark
        for v in ticks(scale.low, scale.high)
        for mark in _tick(_x(scale, v), height, say(v) if v else "0", v == 0 and changes)
    ]
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        marks += _whisker(row, span, scale, 34 * i + 18, say)
    return svg(WIDTH, height, *marks, label=f"{rows[0]['metric']} with intervals of 95 percent", class_="chart forest")


def _span(row: Evaluation) -> tuple[float, float, float, bool]:
    """(middle, low, high, whether these are changes against the source)."""
    changed = change(row)
    middle, low, high = changed or (row["value"], finite(row.get("low")), finite(row.get("high")))
    return middle, middle if low is None else low, middle if high is None else high, changed is not None


def change(row: Evaluation) -> tuple[float, float | None, float | None] | None:
    """(change, low, high) against the source; reckoned from the figures where it is not given."""
    base, given = finite(row.get("base")), finite(row.get("change"))
    if given is not None:
        return given, finite(row.get("change_low")), finite(row.get("change_high"))
    if not base:
        return None
    low, high = finite(row.get("low")), finite(row.get("high"))
    return row["value"] / base - 1, None if low is None else low / base - 1, None if high is None else high / base - 1


def _x(scale: Ramp, value: float) -> float:
    return 220 + scale.share(value) * (WIDTH - 220 - 400)


def _tick(x: float, height: float, said: str, zero: bool) -> list[Markup]:
    return [line(x, 2, x, height - 20, "zero" if zero else "grid"), text(x, height - 5, said, "middle", "tick")]


def _whisker(
    row: Evaluation, span: tuple[float, float, float, bool], scale: Ramp, y: float, say: Callable[[float], str]
) -> list[Markup]:
    middle, low, high, changes = span
    bounds = f"{say(low)} to {say(high)}" if low < high else ""
    moved = f"{number(row['base'])} → {number(row['value'])}" if changes and finite(row.get("base")) is not None else ""
    seen = (("token", row.get("tokens")), ("document", row.get("documents")))
    about = ", ".join(plural(n, noun) for noun, n in seen if n)
    tip = "\n".join(filter(None, (f"{row['metric']}, {row['text']}", moved, say(middle), bounds, about)))
    ends = [line(_x(scale, v), y - 6, _x(scale, v), y + 6, "whisker") for v in (low, high) if low < high]
    return [
        text(200, y + 4, row["text"], "end"),
        line(_x(scale, low), y, _x(scale, high), y, "whisker"),
        *ends,
        el("circle", cx=_x(scale, middle), cy=y, r=6, class_="mark s1", data_tip=tip, tabindex=0, aria_label=tip),
        text(WIDTH - 290, y + 4, say(middle), "end", "t strong"),
        text(WIDTH - 276, y + 4, bounds, class_="tick"),
        text(WIDTH - 4, y + 4, moved, "end", "tick"),
    ]  # fmt: skip


def bullet(p: Prediction) -> Markup:
    """What came out as a part of what was predicted, between a half and twice, with what is tolerated behind."""
    scale, share = Ramp(0.5, 2.0, True), p["actual"] / p["predicted"] if p["predicted"] else 1.0
    allowed = p.get("tolerance", 0.0)
    left, right = (scale.share(v) * 150 for v in (max(1 - allowed, 0.5), 1 + allowed))
    return svg(
        160, 18, rect(5 + left, 4, right - left, 10, class_="band", rx=2), line(80, 0, 80, 18, "zero"),
        el("circle", cx=5 + scale.share(share) * 150, cy=9, r=4.5, class_="mark s1" if met(p) else "mark s2"),
        label=f"{number(share, 3)} times what was predicted", class_="chart bullet",
    )  # fmt: skip


def met(p: Prediction) -> bool:
    """Within the tolerance of the prediction; always where none is given."""
    allowed = p.get("tolerance")
    return allowed is None or abs(p["actual"] - p["predicted"]) <= allowed * abs(p["predicted"])
