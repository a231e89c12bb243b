"""What one wants to know first: a few figures, a verdict in words, and the worst module."""

from collections import Counter
from dataclasses import dataclass
from statistics import geometric_mean, median

from fewbit.workflows.report_charts import change, met
from fewbit.workflows.report_data import Evaluation, Module, Run, finite
from fewbit.workflows.report_heat import gain
from fewbit.workflows.report_numbers import count, duration, interval, number, percent, plural, size


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with its name and what stands beneath it."""

    label: str
    value: str
    note: str = ""
    href: str = ""
    module: int | None = None  # the one that it speaks of


def figures(run: Run) -> list[Figure]:
    """The tiles: size, bits, quality, worst module, gain over rtn, time and memory; those that are known."""
    return [f for f in (_size(run), _bits(run), *_quality(run), _worst(run), _gain(run), _time(run)) if f]


def verdict(run: Run) -> list[str]:
    """The same in sentences."""
    said = [_size_words(run), *(_quality_words(row) for row in headline(run)[:1]), _worst_words(run)]
    return [s for s in said if s]


def headline(run: Run) -> list[Evaluation]:
    """The first row of each metric, what is measured against the source before the rest."""
    rows: dict[str, Evaluation] = {}
    for row in run.get("evaluation", []):
        rows.setdefault(row["metric"], row)
    return sorted(rows.values(), key=lambda row: change(row) is None)


def worst(run: Run) -> tuple[int, Module, float, float] | None:
    """(number, module, error, median error) of the module with the largest error."""
    errors = [(v, i) for i, m in enumerate(run["modules"]) if (v := finite(m.get("error"))) is not None]
    if not errors:
        return None
    top, i = max(errors, key=lambda e: (e[0], -e[1]))
    return i, run["modules"][i], top, median(v for v, _ in errors)


def formats(run: Run) -> list[tuple[str, int]]:
    """Formats and the number of modules in each, most first."""
    return Counter(m["format"] for m in run["modules"]).most_common()


def _size(run: Run) -> Figure | None:
    sizes = run.get("sizes")
    if not sizes:
        return None
    times = sizes["before"] / max(sizes["after"], 1)
    return Figure("Size", size(sizes["after"]), f"from {size(sizes['before'])}, {times:.1f} times smaller", "#sizes")


def _bits(run: Run) -> Figure | None:
    sizes = run.get("sizes")
    if not sizes:
        return None
    inner = sizes.get("quantized_bits_per_weight")
    note = f"{number(inner)} over the quantized modules" if inner else "over everything"
    return Figure("Bits per weight", f"{sizes['bits_per_weight']:.2f}", note, "#sizes")


def _quality(run: Run) -> list[Figure]:
    return [_quality_figure(row) for row in headline(run)[:2]]


def _quality_figure(row: Evaluation) -> Figure:
    changed, title = change(row), row["metric"][:1].upper() + row["metric"][1:]
    if changed is None:
        say = percent if row.get("share") else number
        return Figure(title, say(row["value"]), interval(row.get("low"), row.get("high"), say), "#evaluation")
    middle, low, high = changed
    bounds = interval(low, high, lambda v: percent(v, True))
    return Figure(
        title, percent(middle, True), bounds or f"{number(row['base'])} → {number(row['value'])}", "#evaluation"
    )


def _worst(run: Run) -> Figure | None:
    found = worst(run)
    if not found:
        return None
    i, module, error, middle = found
    times = f", {error / middle:.1f} × the median" if middle else ""
    return Figure("Worst module", percent(error), f"{module['name']}{times}", "#map", i)


def _gain(run: Run) -> Figure | None:
    gains = [g for m in run["modules"] if (g := gain(m)) and g > 0]
    if not gains:
        return None
    behind = sum(g > 1 for g in gains)
    note = f"{plural(behind, 'module')} behind rtn" if behind else "no module behind rtn"
    return Figure("Loss against RTN", f"{geometric_mean(gains):.2f} ×", note, "#map")


def _time(run: Run) -> Figure | None:
    timing = run.get("timing", {})
    total, memory = timing.get("total"), timing.get("memory")
    if total is None:
        return None
    missed = sum(not met(p) for p in run.get("predictions", []))
    note = f"{size(memory)} at the peak" if memory else ""
    if run.get("predictions"):
        note += f"{', ' if note else ''}{plural(missed, 'prediction') + ' missed' if missed else 'as planned'}"
    return Figure("Time", duration(total), note, "#layers")


def _size_words(run: Run) -> str:
    sizes, model = run.get("sizes"), run["model"]
    if not sizes:
        return ""
    weights = f"{count(model['parameters'])} parameters at " if model.get("parameters") else ""
    sized = f"{size(sizes['before'])} became {size(sizes['after'])}"
    return f"{weights}{sizes['bits_per_weight']:.2f} bits per weight: {sized}."


def _quality_words(row: Evaluation) -> str:
    changed, title = change(row), row["metric"][:1].upper() + row["metric"][1:]
    if changed is None:
        say = percent if row.get("share") else number
        bounds = interval(row.get("low"), row.get("high"), say)
        return f"{title} on {row['text']} is {say(row['value'])}{f' ({bounds})' if bounds else ''}."
    bounds = interval(changed[1], changed[2], lambda v: percent(v, True))
    figures = f"from {number(row['base'])} to {number(row['value'])}, " if row.get("base") else ""
    return f"{title} on {row['text']} went {figures}{percent(changed[0], True)}{f' ({bounds})' if bounds else ''}."


def _worst_words(run: Run) -> str:
    found = worst(run)
    if not found:
        return ""
    _, module, error, middle = found
    means = run.get("error_means", "error")
    times = f", {error / middle:.1f} times the median" if middle else ""
    return f"The worst module is {module['name']}: {percent(error)} {means}{times}."
