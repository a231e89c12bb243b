"""The report: one HTML page that opens from disk, asks nothing of a network, and holds everything about one run.

Python draws the pictures; the script in the page only adds hovering, details, sorting and copying. The page's own
policy forbids every request and every script but that one, by its digest.
"""

import base64
import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fewbit.files.staging import Staging
from fewbit.workflows.report_data import Run, prepared
from fewbit.workflows.report_figures import figures, formats, verdict
from fewbit.workflows.report_html import copyable
from fewbit.workflows.report_numbers import count
from fewbit.workflows.report_sections import sections
from fewbit.workflows.report_serve import serve

NAME = "fewbit_report.html"


def render(run: Run | dict[str, Any]) -> str:
    """The page."""
    run = prepared(run)
    script, style = _part("page.js"), _part("page.css")
    parts, data = sections(run)
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_part("page.html"))
    commands = [copyable(s["command"], f"serve-{i}", f"Serve with {s['engine']}") for i, s in enumerate(serve(run))]
    html = page.render(
        run=run, facts=facts(run), verdict=verdict(run), figures=figures(run), warnings=run.get("warnings", []),
        serve=commands, sections=parts,
        data=Markup(data), script=Markup(script), style=Markup(style), digest=_digest(script),
    )  # fmt: skip
    return html.encode("utf-8", "replace").decode()


def write(path: Path | str, run: Run | dict[str, Any]) -> None:
    """The page in a file, whole or not at all."""
    path = Path(path)
    staging = Staging(path.parent)
    staging.put(path.name, render(run).encode())
    staging.seal(path.name)
    staging.publish([path.name])


def facts(run: Run) -> list[str]:
    """One line about the model and what was done to it."""
    model = run["model"]
    made = " by ".join(filter(None, (run.get("format") or "/".join(f for f, _ in formats(run)[:3]), run.get("algo"))))
    said = [
        model.get("architecture", ""),
        f"{count(model['parameters'])} parameters" if model.get("parameters") else "",
        f"{model['layers']} layers" if model.get("layers") else "",
        model.get("dtype", ""),
        made,
        run.get("dialect", ""),
        *(f"{k} {v}" for k, v in model.get("facts", {}).items()),
        run.get("created", ""),
        f"fewbit {run['version']}" if run.get("version") else "",
    ]
    return [s for s in said if s]


def _part(name: str) -> str:
    return files("fewbit").joinpath("data", "report", name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
