"""The report: whatever is known is there, what is not is left out, no word of a stranger's acts, the page works."""

import json
import math
import re
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fewbit.errors import CapacityError, CheckpointError
from fewbit.workflows.report import render, write
from fewbit.workflows.report_data import evaluation_rows, gathered, kind_of, plain
from fewbit.workflows.report_numbers import duration, number, percent
from fewbit.workflows.report_serve import serve
from fewbit.workflows.report_svg import ramp, ticks
from tests.browser import Page, chromium
from tests.workflows.runs import EVIL, hostile, mixture, run

MINIMAL: dict[str, Any] = {"title": "bare", "model": {"name": "m"}, "modules": []}

# a part of the Run -> what only it puts on the page
PARTS = {
    "sizes": 'id="size-bars"', "evaluation": 'class="chart forest"', "coverage": 'id="coverage"',
    "layers": ">output error<",
    "timing": 'id="stage-bar"', "predictions": 'id="plan"', "distributions": 'class="chart hist"',
    "digests": ">Digests<",
    "environment": ">Environment<", "warnings": 'class="warnings"', "recipe": 'id="copy-recipe"',
    "command": 'id="copy-command"', "dialect": 'id="copy-serve-0"',
}  # fmt: skip


class Tags(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_there_or_left_out(part: str) -> None:
    whole = run(2)
    assert PARTS[part] in render(whole)
    del whole[part]
    assert PARTS[part] not in render(whole)


def test_bare() -> None:
    page = render(MINIMAL)
    assert "bare" in page and "<section" not in page and "None" not in page


def test_one_page_that_asks_for_nothing() -> None:
    for made in (run(), mixture(4, 8), MINIMAL):
        page = render(made)
        tags = Tags(page).tags
        ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        assert not {t for t, _ in tags} & {"img", "iframe", "object", "embed", "form", "base"}
        assert [a for t, a in tags if "src" in a or (t == "link" and a["href"] != "data:,")] == []
        assert all(a["href"][:1] == "#" for t, a in tags if t == "a")  # type: ignore[index]
        assert not re.search(r"url\(|@import|https?://", page)


def test_same_run_same_page_and_small() -> None:
    assert render(run()) == render(run())
    assert len(render(MINIMAL)) < 40_000 and len(render(run())) < 200_000


def test_words_stay_words() -> None:
    clean, evil = Tags(render(run(3))).tags, Tags(render(hostile())).tags
    assert {t for t, _ in evil} == {t for t, _ in clean}
    assert [t for t, _ in evil].count("script") == 2 and render(hostile()).count("<script") == 2
    assert {k for _, a in evil for k in a} == {k for _, a in clean for k in a}


def test_figures_that_are_none() -> None:
    odd = run(2)
    odd["evaluation"].append({"metric": "perplexity", "text": "broken", "value": math.nan})
    odd["modules"][0] |= {"error": math.inf, "damp": math.nan, "loss": None, "seconds": math.nan}
    odd["predictions"][0]["predicted"] = 0
    odd["model"]["name"] = "half a pair \ud800"
    page = render(odd)
    page.encode()
    assert "broken" not in page and not re.search(
        r"\b(nan|inf|NaN|Infinity)\b", page.partition("<body>")[2].partition("<script>")[0]
    )


def test_the_map_shows_the_worst_of_a_cell() -> None:
    made = mixture(2, 4)
    worst = max((m for m in made["modules"] if m["layer"] == 1), key=lambda m: m["error"])
    data = json.loads(re.search(r'id="data">(.*?)</script>', render(made), re.DOTALL)[1])  # type: ignore[index]
    cell = next(c for c in data["cells"] if (c["kind"], c["layer"]) == (worst["kind"], 1))
    assert data["modules"][cell["modules"][0]][0] == worst["name"] and len(cell["modules"]) == 4
    assert cell["values"]["error"] == [8, percent(worst["error"])]


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write(tmp_path / "new" / "report.html", run(2))
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["report.html"]
    assert (tmp_path / "new" / "report.html").read_text() == render(run(2))
    (tmp_path / "file").touch()
    with pytest.raises((CheckpointError, CapacityError), match="file"):
        write(tmp_path / "file" / "report.html", MINIMAL)


def test_gathered_from_a_log() -> None:
    events = [
        {"time": "t", "event": "start"},
        {"time": "t", "event": "module", "name": "a", "error": 0.5},
        {"time": "t", "event": "warning", "message": "careful"},
        {"time": "t", "event": "module", "name": "a", "error": 0.25},
        {"time": "t", "event": "warning", "message": "careful"},
        {"time": "t", "event": "layer", "name": "l", "seconds": 1.0},
    ]
    want = {
        "modules": [{"name": "a", "error": 0.25}],
        "layers": [{"name": "l", "seconds": 1.0}],
        "warnings": ["careful"],
    }
    assert gathered(events) == want


def test_rows_of_an_evaluation() -> None:
    estimate = {"value": 0.02, "low": 0.01, "high": None}
    rows = evaluation_rows(
        {"text": "t", "tokens": 9, "documents": 2, "perplexity": {"value": 5.0, "low": 4.0, "high": 6.0},
         "base_perplexity": {"value": 4.9, "low": 1.0, "high": 9.0}, "difference": estimate, "kl": estimate,
         "agreement": None}
    )  # fmt: skip
    assert [r["metric"] for r in rows] == ["perplexity", "KL divergence"]
    assert rows[0]["change"] == pytest.approx(math.exp(0.02) - 1) and "change_high" not in rows[0]
    assert rows[0]["base"] == 4.9 and rows[1]["low"] == 0.01 and "high" not in rows[1]


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("model.layers.3.self_attn.q_proj", (3, "self_attn.q_proj")),
        ("model.layers.12.mlp.experts.7.down_proj", (12, "mlp.experts.down_proj")),
        ("transformer.h.0.attn.c_attn", (0, "attn.c_attn")),
        ("lm_head", (None, "lm_head")),
        ("model.visual.blocks.2.attn.qkv", (2, "model.visual.blocks.attn.qkv")),
        ("encoder.block.1.layer.0.SelfAttention.q", (1, "encoder.block.layer.SelfAttention.q")),
        ("a\nb.0.c", (0, "c")),
    ],
)
def test_kind_of(name: str, want: tuple[int | None, str]) -> None:
    assert kind_of(name) == want


def test_numbers_as_read() -> None:
    table = [
        (percent(0.01834), "1.83 %"), (percent(-0.0004, True), "−0.040 %"), (percent(0.5), "50.0 %"),
        (percent(1.2), "120 %"),
        (number(0.0213), "0.0213"), (number(12345678), "12,345,678"), (number(1e-7), "1e-07"), (number(0), "0"),
        (duration(0.5), "0.50 s"), (duration(12.34), "12 s"),
        (duration(200), "3 min 20 s"), (duration(3900), "1 h 05 min"),
        (duration(99.7), "1 min 40 s"),
    ]  # fmt: skip
    for said, want in table:
        assert said.replace("\N{NO-BREAK SPACE}", " ") == want


def test_axes() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(3, 3) == [3]
    wide, narrow = ramp([0.001, 0.1]), ramp([1, 2])
    assert wide.log and not narrow.log and wide.share(0.01) == pytest.approx(0.5)
    assert [narrow.step(v) for v in (0, 1, 1.5, 2, 9)] == [0, 0, 4, 8, 8]
    assert ramp([3, 3]).step(3) == 0 and not ramp([0, 5]).log


def test_plain() -> None:
    import torch

    got = plain({"a": (1, torch.tensor(2.5)), "b": Path("x"), "c": math.nan, 3: [True, None]})
    assert got == {"a": [1, 2.5], "b": "x", "c": None, "3": [True, None]}


def test_serving() -> None:
    cases = [("compressed-tensors", "int4-g128", 2), ("compressed-tensors", "int3-g128", 1), ("gguf", "q4_k", 1),
             ("gptq", "int4-g128", 2), ("gptq", "int4-g128-asym", 1), ("modelopt", "nvfp4", 2)]  # fmt: skip
    for dialect, form, n in cases:
        made = {**MINIMAL, "dialect": dialect, "out": "my model", "modules": [{"name": "m", "format": form}]}
        found = serve(made)  # type: ignore[arg-type]
        assert len(found) == n and found[0]["command"] == "fewbit serve 'my model'"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    binary = chromium()
    if binary is None:
        pytest.skip("no Chromium: install one, or name it in CHROMIUM")
    with Page(binary, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def shown(page: Page, folder: Path, made: dict[str, Any]) -> Page:
    write(folder / "report.html", made)
    page.events.clear()
    page.open(folder / "report.html")
    return page


def texts(page: Page, selector: str) -> list[str]:
    return page.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")


@pytest.mark.parametrize("name", ["run", "mixture", "hostile", "minimal"])
def test_opens_without_complaint(page: Page, tmp_path: Path, name: str) -> None:
    made = {"run": run(), "mixture": mixture(), "hostile": hostile(), "minimal": MINIMAL}[name]
    shown(page, tmp_path, made)
    assert page.complaints() == [] and page.run("window.hacked === undefined")
    assert texts(page, "h1") == [made["title"]]
    assert len(texts(page, "#module-list tbody tr")) == min(len(made["modules"]), 40)
    # nothing wider than the window but what scrolls in its own frame
    assert page.run("document.documentElement.scrollWidth <= innerWidth")


def test_charts_are_there(page: Page, tmp_path: Path) -> None:
    shown(page, tmp_path, run())
    counts = {
        "#heat [data-cell]": 154, ".forest circle": 6, ".hist path": 6, "#size-bars .bar": 4, "#strips .bar": 66,
        "#stage-bar .bar": 5, ".bullet": 3, ".tile": 7, "[data-copy]": 4,
    }  # fmt: skip
    for selector, n in counts.items():
        assert len(texts(page, selector)) == n, selector
        box = f"(e => [e.width, e.height])(document.querySelector('{selector}').getBoundingClientRect())"
        assert min(page.run(box)) > 3, selector


def test_hover_click_and_keys(page: Page, tmp_path: Path) -> None:
    made = run()
    shown(page, tmp_path, made)
    page.mouse("#heat [data-cell='13']")
    tip = page.run("document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent")
    assert tip.startswith("layer 1 · mlp.down_proj\nError: ") and percent(made["modules"][13]["error"]) in tip
    page.mouse("h1")
    assert page.run("document.getElementById('tip').hidden")
    page.mouse("#heat [data-cell='13']", click=True)
    assert texts(page, "#detail h3") == ["model.layers.1.mlp.down_proj"]
    page.run("document.querySelector('[data-cell=\"0\"]').focus()")
    for key, cell in (
        ("ArrowRight", "7"),
        ("ArrowDown", "8"),
        ("ArrowLeft", "1"),
        ("ArrowLeft", "1"),
        ("ArrowUp", "0"),
    ):
        page.key(key)
        assert page.run("document.activeElement.dataset.cell") == cell
    page.key("Enter")
    assert texts(page, "#detail h3") == ["model.layers.0.self_attn.q_proj"]
    assert page.complaints() == []


def test_detail_has_the_distribution_and_the_cell_its_others(page: Page, tmp_path: Path) -> None:
    shown(page, tmp_path, run())
    page.mouse("#heat [data-cell='6']", click=True)
    assert len(texts(page, "#detail svg.hist path")) == 2
    shown(page, tmp_path, mixture(2, 6))
    page.mouse("[aria-label^='layer 1 mlp.experts.up_proj']", click=True)
    others = texts(page, "#detail .others button")
    assert len(others) == 5
    page.mouse("#detail .others button", click=True)
    assert others[0].startswith(texts(page, "#detail h3")[0])


def test_measures_switch(page: Page, tmp_path: Path) -> None:
    shown(page, tmp_path, run())
    colours = "[...document.querySelectorAll('#heat [data-cell]')].map(e => e.getAttribute('class')).join()"
    before = page.run(colours)
    page.mouse("[data-measure=gain]", click=True)
    assert page.run(colours) != before and "× RTN" in texts(page, "#high")[0]
    page.mouse("[data-measure=error]", click=True)
    assert page.run(colours) == before


def test_list_sorts_filters_and_grows(page: Page, tmp_path: Path) -> None:
    made = run()
    shown(page, tmp_path, made)
    names = "#module-list tbody td:first-child"
    by_error = [m["name"] for m in sorted(made["modules"], key=lambda m: -m["error"])]
    assert texts(page, names) == by_error[:40]
    page.mouse("[data-sort=error]", click=True)
    assert texts(page, names) == by_error[:-41:-1]
    page.mouse("#more", click=True)
    assert len(texts(page, names)) == len(made["modules"])
    page.run("(e => { e.value = '.11. UP'; e.dispatchEvent(new Event('input')); })(document.getElementById('filter'))")
    assert texts(page, names) == ["model.layers.11.mlp.up_proj"]
    page.mouse("#module-list tbody tr", click=True)
    assert texts(page, "#detail h3") == ["model.layers.11.mlp.up_proj"]


def test_copy(page: Page, tmp_path: Path) -> None:
    shown(page, tmp_path, run())
    page.mouse("[data-copy=recipe]", click=True)
    page.until(lambda: texts(page, "[data-copy=recipe]") == ["Copied"])


def test_painted_in_both_schemes(page: Page, tmp_path: Path) -> None:
    shown(page, tmp_path, run())
    pictures = []
    for scheme in ("light", "dark"):
        page.scheme(scheme)
        page.run("scrollTo(0, document.getElementById('map').offsetTop)")
        pictures.append(rows(page.screenshot()))
    assert all(len(set(picture)) > 200 for picture in pictures)
    assert pictures[0] != pictures[1]


def rows(png: bytes) -> list[bytes]:
    """The filtered rows of a PNG."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, at, data = int.from_bytes(png[16:20]), int.from_bytes(png[20:24]), 8, b""
    while at < len(png):
        length, kind = int.from_bytes(png[at : at + 4]), png[at + 4 : at + 8]
        data += png[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += 12 + length
    pixels = zlib.decompress(data)
    stride = len(pixels) // height
    assert stride > 3 * width
    return [pixels[i * stride : (i + 1) * stride] for i in range(height)]


def test_hostile_words_are_shown_as_they_are(page: Page, tmp_path: Path) -> None:
    shown(page, tmp_path, hostile())
    page.mouse("#heat [data-cell='0']")
    assert "<script>" in page.run("document.getElementById('tip').textContent")
    page.mouse("#heat [data-cell='0']", click=True)
    assert texts(page, "#detail h3")[0].endswith(EVIL) and page.run("window.hacked === undefined")
