"""The sections of the page, each from its part of the Run; a part that is not there makes no section."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import Any

from markupsafe import Markup

from fewbit.workflows.report_charts import bullet, forest, histogram, met, size_bars, stage_bar, strips
from fewbit.workflows.report_data import Coverage, Module, Prediction, Run, finite, plain
from fewbit.workflows.report_figures import formats
from fewbit.workflows.report_heat import Columns, Heat, columns, experts, gain, heat, measures, swatches
from fewbit.workflows.report_html import copyable, facts, join, scroll, table, word
from fewbit.workflows.report_numbers import percent, plural, quantity
from fewbit.workflows.report_svg import el


@dataclass(frozen=True, slots=True)
class Section:
    id: str
    title: str
    lead: str
    body: Markup


def sections(run: Run) -> tuple[list[Section], str]:
    """(the sections, the data that the page's script reads)."""
    where = columns(run)
    drawn = heat(run, where)
    found = [
        _evaluation(run), _map(run, drawn), _layers(run, where), _sizes(run), _distributions(run),
        _coverage(run, where), _plan(run), _modules(run), _made(run),
    ]  # fmt: skip
    return [s for s in found if s], _script_data(run, drawn)


def _evaluation(run: Run) -> Section | None:
    rows = run.get("evaluation", [])
    if not rows:
        return None
    by_metric = groupby(
        sorted(rows, key=lambda r: [x["metric"] for x in rows].index(r["metric"])), lambda r: r["metric"]
    )
    charts = [el("div", el("h3", metric), scroll(forest(list(group)))) for metric, group in by_metric]
    return Section("evaluation", "Evaluation", "Dots are measurements, lines their intervals of 95 %.", join(charts))


def _map(run: Run, drawn: Heat | None) -> Section | None:
    if drawn is None:
        return None
    means = run.get("error_means", "error")
    lead = f"Error is the {means}. Columns are layers. A cell of several modules shows the worst; choose one."
    buttons = [
        el(
            "button",
            legend["label"],
            type="button",
            data_measure=legend["key"],
            aria_pressed="true" if i == 0 else "false",
        )
        for i, legend in enumerate(drawn.legends)
    ]
    first = drawn.legends[0]
    scale = el(
        "span",
        el("span", first["ends"][0], id="low"),
        swatches("h"),
        el("span", first["ends"][-1] + (", log scale" if first["log"] else ""), id="high"),
        class_="scale",
    )
    head = el("div", el("div", *buttons, class_="switch", role="group", aria_label="Colour by"), scale, class_="row")
    detail = el("div", id="detail", class_="detail", aria_live="polite", hidden="")
    return Section("map", "Error map", lead, join([head, scroll(drawn.picture), _outside(run), detail]))


def _outside(run: Run) -> Markup:
    """Modules outside the layers, as buttons beside the map."""
    known = measures(run["modules"])[:1]
    chips = [
        el("button", el("span", m["name"], class_="mono"), " ", _said(m, known), class_="chip", data_module=i)
        for i, m in enumerate(run["modules"])
        if m.get("layer") is None
    ]
    return el("p", "Outside the layers: ", *chips[:24], class_="outside") if chips else Markup("")


def _said(module: Module, known: Sequence[Any]) -> str:
    values = [(m, m.of(module)) for m in known]
    return "".join(m.say(v) for m, v in values if v is not None)


def _layers(run: Run, where: Columns) -> Section | None:
    timing = run.get("timing", {})
    drawn = strips(run.get("layers", []), run["modules"], where) if where.layers else None
    stages = stage_bar(timing["stages"]) if timing.get("stages") else None
    if drawn is None and stages is None:
        return None
    said = f"Ran on {timing['device']}." if timing.get("device") else ""
    parts = [
        scroll(drawn) if drawn else Markup(""),
        el("div", el("h3", "Stages"), scroll(stages)) if stages else Markup(""),
    ]
    return Section("layers", "Layer by layer", said, join(parts))


def _sizes(run: Run) -> Section | None:
    sizes = run.get("sizes")
    if not sizes or not sizes.get("parts_after"):
        return None
    lead = ", ".join(f"{plural(n, 'module')} in {name}" for name, n in formats(run)[:6]) + "."
    return Section("sizes", "Sizes", lead, scroll(size_bars(sizes.get("parts_before", []), sizes["parts_after"])))


def _distributions(run: Run) -> Section | None:
    drawn = [
        el("figure", histogram(d), el("figcaption", d["module"], class_="mono"), data_distribution=d["module"])
        for d in run.get("distributions", []) if d["before"] and d["after"]
    ]  # fmt: skip
    if not drawn:
        return None
    key = el("div", el("span", el("i", class_="dot before"), "before", class_="key"),
             el("span", el("i", class_="dot after"), "after", class_="key"), class_="legend")  # fmt: skip
    lead = "Weights of a few modules; heights are square roots, so that the tails can be seen."
    return Section("distributions", "Weight distributions", lead, join([key, el("div", *drawn, class_="grid")]))


def _coverage(run: Run, where: Columns) -> Section | None:
    seen = run.get("coverage")
    if not seen:
        return None
    drawn = experts(seen, where)
    parts = [facts(_coverage_facts(seen))]
    if drawn is not None:
        scale = el("span", "fewer", swatches("c"), "more", class_="scale")
        parts += [
            el("div", el("h3", "Tokens by expert"), scale, class_="row"),
            el("p", _few(seen), class_="lead"),
            scroll(drawn),
        ]
    if dead := sorted(seen.get("dead", []), key=lambda d: -d["dead"] / max(d["channels"], 1)):
        rows = [
            (d["name"], f"{d['dead']:,}", f"{d['channels']:,}", percent(d["dead"] / max(d["channels"], 1)))
            for d in dead[:12]
        ]
        parts += [el("h3", "Channels never active"), table(("module", "dead", "channels", "share"), rows)]
    return Section("coverage", "Calibration", "", join(parts))


def _coverage_facts(seen: Coverage) -> list[tuple[str, str]]:
    lengths = seen.get("lengths", [])
    low, high = min(lengths, default=0), max(lengths, default=0)
    spread = f"{low:,} to {high:,}, median {median(lengths):,.0f}" if low < high else f"{low:,}"
    counts = (("tokens", seen["tokens"]), ("documents", seen.get("documents")), ("samples", seen.get("samples")))
    return [
        ("text", seen["source"]),
        ("licence", seen.get("licence", "")),
        *((name, f"{n:,}") for name, n in counts if n),
        ("length", f"{spread} tokens" if lengths else ""),
        ("digest", seen.get("digest", "")),
    ]


def _few(seen: Coverage) -> str:
    least = seen.get("least_tokens", 0)
    few = sum(n < least for e in seen.get("experts", []) for n in e["tokens"])
    total = sum(len(e["tokens"]) for e in seen.get("experts", []))
    policy = f"; policy: {seen['policy']}" if seen.get("policy") else ""
    return (
        f"{few:,} of {total:,} experts saw fewer than {least:,} tokens{policy}."
        if least
        else f"{total:,} experts{policy}."
    )


def _plan(run: Run) -> Section | None:
    rows = [_prediction(p) for p in run.get("predictions", [])]
    if not rows:
        return None
    body = table(("", "predicted", "actual", "actual / predicted", ""), rows)
    return Section("plan", "Plan against what came out", "The band is what is tolerated.", body)


def _prediction(p: Prediction) -> tuple[object, ...]:
    unit, allowed = p.get("unit", ""), p.get("tolerance")
    said = "" if allowed is None else f"within {allowed:.0%}" if met(p) else f"outside {allowed:.0%}"
    verdict = el("span", said, class_="ok" if met(p) else "bad")
    return p["what"], quantity(p["predicted"], unit), quantity(p["actual"], unit), bullet(p), verdict


def _modules(run: Run) -> Section | None:
    if not run["modules"]:
        return None
    field = el(
        "input", type="search", id="filter", placeholder="filter by name, format or note", aria_label="Filter modules"
    )
    empty = el("div", el("table", id="module-list"), class_="scroll")
    more = el("button", "", type="button", id="more", hidden="")
    bar = el("div", field, el("span", id="shown", class_="muted", aria_live="polite"), class_="row")
    lead = f"{plural(len(run['modules']), 'module')}. A heading sorts, a row shows details."
    return Section("modules", "Modules", lead, join([bar, empty, more]))


def _made(run: Run) -> Section | None:
    parts = []
    for title, words, key in (("Command", run.get("command"), "command"), ("Recipe", run.get("recipe"), "recipe")):
        if words:
            parts.append(copyable(words, key, title))
    for title, rows in (("Digests", run.get("digests")), ("Environment", run.get("environment"))):
        if rows:
            wide = "facts mono wide" if title == "Digests" else "facts"
            parts += [el("h3", title), facts([(k, word(v)) for k, v in rows.items()], wide)]
    return Section("made", "How it was made", "", join(parts)) if parts else None


COLUMNS = (
    "name",
    "format",
    "algo",
    "shape",
    "bits",
    "error",
    "loss",
    "rtn_loss",
    "gain",
    "damp",
    "seconds",
    "rule",
    "note",
)


def _script_data(run: Run, drawn: Heat | None) -> str:
    """Modules by column, the cells of the map; as JSON that no HTML parser can take for markup."""
    modules: list[dict[str, Any]] = [{**m, "gain": gain(m)} for m in run["modules"]]
    known = [c for c in COLUMNS if any(m.get(c) not in (None, "") for m in modules)]
    data = {
        "columns": known,
        "modules": [[_short(m.get(c)) for c in known] for m in modules],
        "cells": drawn.cells if drawn else [],
        "legends": drawn.legends if drawn else [],
    }
    text = json.dumps(plain(data), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _short(value: Any) -> Any:
    """Floats to the digits that are shown."""
    if isinstance(value, (list, tuple)):
        return " × ".join(map(str, value))
    return float(f"{value:.5g}") if isinstance(value, float) and finite(value) is not None else value
