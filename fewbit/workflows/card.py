"""The model card: README.md of a result, with the metadata a hub reads, how it was made, figures, digests, licence.

Whatever came from outside is escaped: a name cannot open a tag, end a table cell or leave its code block.
"""

import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fewbit.workflows.report import facts
from fewbit.workflows.report_charts import change
from fewbit.workflows.report_data import Evaluation, Run, prepared
from fewbit.workflows.report_figures import figures, formats, verdict
from fewbit.workflows.report_numbers import interval, number, percent, plural
from fewbit.workflows.report_serve import serve

LICENCE_KEYS = ("license", "license_name", "license_link")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
LONGEST = 1 << 20  # bytes of a source's card that are read


def card(run: Run | dict[str, Any], served_as: str = ".") -> str:
    """The text of README.md. served_as: the model's name in the commands that serve it."""
    run = prepared(run)
    parts = [
        _metadata(run), f"# {_words(run['title'])}", _what(run), _serving(run, served_as), _figures(run),
        _evaluation(run), _made(run), _calibration(run), _digests(run), _licence(run),
    ]  # fmt: skip
    return "\n\n".join(p for p in parts if p).encode("utf-8", "replace").decode() + "\n"


def source_licence(folder: Path | str) -> dict[str, str]:
    """What the card beside a source says of its licence; nothing where there is no card or no metadata."""
    try:
        with open(Path(folder) / "README.md", "rb") as file:
            text = file.read(LONGEST).decode("utf-8", "replace")
    except OSError:
        return {}
    text = text.replace("\r\n", "\n")
    found = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    lines = re.findall(r"^(\w+):[ \t]+(\S.*?)[ \t]*$", found[1], re.MULTILINE) if found else []
    values = {key: re.sub(r"[ \t]+#.*", "", value).strip("'\"") for key, value in lines if key in LICENCE_KEYS}
    return {key: value for key, value in values.items() if value and value[0] not in "[{&*|>!"}


def _metadata(run: Run) -> str:
    model, licence = run["model"], run["model"].get("licence", {})
    base = model.get("base", "")
    dialect = run.get("dialect", "")
    lines = [f"{key}: {_yaml(licence[key])}" for key in LICENCE_KEYS if licence.get(key)]
    if HUB_NAME.fullmatch(base):
        lines += [f"base_model: {_yaml(base)}", "base_model_relation: quantized"]
    lines += [f"library_name: {'gguf' if dialect == 'gguf' else 'transformers'}", "pipeline_tag: text-generation"]
    lines += ["quantized_by: fewbit", "tags:"]
    lines += [f"- {_yaml(tag)}" for tag in _tags(run)]
    return "\n".join(["---", *lines, "---"])


def _tags(run: Run) -> list[str]:
    named = [run.get("dialect", ""), *(f for f, _ in formats(run)[:4]), *run.get("algo", "").split("+")]
    return list(dict.fromkeys(t for t in ("fewbit", "quantized", *named) if t))


def _yaml(text: str) -> str:
    """A double-quoted scalar; JSON's, with everything unprintable escaped as YAML does."""
    if re.fullmatch(r"[A-Za-z][\w./-]*", text) and text.lower() not in (
        "yes",
        "no",
        "true",
        "false",
        "null",
        "on",
        "off",
    ):
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)


def _what(run: Run) -> str:
    name = run["model"]["name"]
    mixed = formats(run)
    weights = ", ".join(f"{_code(f)} ({plural(n, 'module')})" for f, n in mixed[:8])
    return "\n\n".join(
        [
            f"{_code(name)}, quantized with fewbit. {_words(' '.join(verdict(run)))}".strip(),
            _words(" · ".join(facts(run))),
            f"Weights: {weights}." if mixed else "",
        ]
    ).strip()


def _serving(run: Run, served_as: str) -> str:
    blocks = [f"With {_words(s['engine'])}:\n\n{_fence(s['command'], 'sh')}" for s in serve(run, served_as)]
    return "\n\n".join(["## How to serve it", *blocks]) if blocks else ""


def _figures(run: Run) -> str:
    rows = [(f.label, f.value, f.note) for f in figures(run)]
    return f"## Figures\n\n{_table(('', '', ''), rows)}" if rows else ""


def _evaluation(run: Run) -> str:
    rows = [_evaluated(r) for r in run.get("evaluation", [])]
    if not rows:
        return ""
    heads = ("metric", "text", "source", "this model", "change", "interval of 95 %")
    return f"## Evaluation\n\n{_table(heads, rows)}"


def _evaluated(row: Evaluation) -> tuple[str, ...]:
    say, changed = percent if row.get("share") else number, change(row)
    base = say(row["base"]) if "base" in row else ""
    if changed is None:
        return row["metric"], row["text"], base, say(row["value"]), "", _bounds(row.get("low"), row.get("high"), say)
    middle, low, high = changed
    bounds = _bounds(low, high, lambda v: percent(v, True))
    return row["metric"], row["text"], base, say(row["value"]), percent(middle, True), bounds


def _bounds(low: float | None, high: float | None, say: Any) -> str:
    return interval(low, high, say).partition(": ")[2]


def _made(run: Run) -> str:
    parts = []
    if run.get("command"):
        parts.append(_fence(run["command"], "sh"))
    if run.get("recipe"):
        parts += ["The recipe:", _fence(run["recipe"], "yaml")]
    return "\n\n".join(["## How it was made", *parts]) if parts else ""


def _calibration(run: Run) -> str:
    seen = run.get("coverage")
    if not seen:
        return ""
    licence = f", licence {_words(seen['licence'])}" if seen.get("licence") else ""
    samples = f" in {seen['samples']:,} samples" if seen.get("samples") else ""
    return f"Calibrated on {seen['tokens']:,} tokens{samples} of {_words(seen['source'])}{licence}."


def _digests(run: Run) -> str:
    digests = run.get("digests")
    return f"## Digests (SHA-256)\n\n{_fence(_lines(digests.items()))}" if digests else ""


def _lines(digests: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{digest}  {name}" for name, digest in digests)


def _licence(run: Run) -> str:
    licence, name = run["model"].get("licence", {}), _code(run["model"]["name"])
    if not licence:
        return f"## Licence\n\nThe terms of {name} hold for this model as well; its card names none."
    said = licence.get("license_name") or licence.get("license") or ""
    link = f" ({_words(licence['license_link'])})" if licence.get("license_link") else ""
    return f"## Licence\n\nThat of {name}: {_words(said)}{link}. Quantizing changes no terms."


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([_words(c) for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _words(text: str) -> str:
    """Plain words in Markdown: no tag, no emphasis, no link, no cell, one line."""
    flat = " ".join(html.escape(text, quote=False).split())
    return re.sub(r"([\\`*\[\]|#!~])|(?<!\w)_|_(?!\w)", lambda m: f"\\{m[0]}", flat)


def _code(text: str) -> str:
    """A code span that its text cannot end; no span keeps a line break or, in a table, a bar."""
    flat = " ".join(text.split())
    ticks = "`" * (max(map(len, re.findall("`+", flat)), default=0) + 1)
    pad = " " if flat[:1] == "`" or flat[-1:] == "`" else ""
    return f"{ticks}{pad}{flat}{pad}{ticks}"


def _fence(text: str, language: str = "") -> str:
    ticks = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{ticks}{language}\n{text.strip(chr(10))}\n{ticks}"
