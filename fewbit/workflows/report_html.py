"""Pieces of the page that several sections are made of."""

import json
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from fewbit.workflows.report_data import plain
from fewbit.workflows.report_svg import el


def copyable(words: str, key: str, title: str) -> Markup:
    """Words with a button that copies them."""
    button = el("button", "Copy", type="button", class_="copy", data_copy=key, aria_label=f"Copy {title}")
    return el(
        "div",
        el("div", el("h3", title), button, class_="row"),
        el("pre", words, id=f"copy-{key}", tabindex=0),
        class_="copyable",
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """The first column is words, the others are figures."""
    head = el("tr", *(el("th", h, scope="col", class_="num" if i else None) for i, h in enumerate(heads)))
    body = [el("tr", *(el("td", c, class_="num" if i else "mono") for i, c in enumerate(row))) for row in rows]
    return el("div", el("table", el("thead", head), el("tbody", *body)), class_="scroll")


def facts(rows: Iterable[tuple[str, str]], class_: str = "facts") -> Markup:
    return el("dl", *(el("div", el("dt", k), el("dd", v)) for k, v in rows if v), class_=class_)


def word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)


def scroll(body: Markup) -> Markup:
    return el("div", body, class_="scroll")


def join(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)
