"""The page in a headless browser: type, read the stream, look at the figures, compare two servers."""

from pathlib import Path

import pytest

from tests.browser import Page, chromium
from tests.server.served import Running, engine, model, running

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine")

ANSWERED = "document.querySelectorAll('#a .speed').length"


def visit(page: Page, served: Running) -> None:
    page.call("Page.navigate", url=served.url + "/")
    page.until(lambda: page.run("document.readyState === 'complete' && document.getElementById('facts')?.textContent"))


def ask(page: Page, question: str, tokens: int) -> None:
    page.run(f"document.getElementById('tokens').value = {tokens}; document.getElementById('text').focus()")
    page.call("Input.insertText", text=question)
    page.mouse("#send", click=True)


def text(page: Page, selector: str) -> str:
    return page.run(f"document.querySelector({selector!r}).textContent")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("page") / "model")


def test_chat_figures_and_no_complaint(folder: Path, tmp_path: Path) -> None:
    facts = {"architecture": "LlamaForCausalLM", "dialect": "dense", "parameters": 2 * 10**5, "bytes": 4 * 10**5}
    binary = chromium()
    assert binary
    with running(engine(folder), facts) as served, Page(binary, tmp_path) as page:
        visit(page, served)
        assert "LlamaForCausalLM" in text(page, "#facts") and text(page, "#name") == "tiny"
        ask(page, "<b>hello</b>", 40)
        page.until(lambda: page.run(ANSWERED) == 1)
        assert text(page, "#a .user") == "<b>hello</b>"  # shown as text
        assert text(page, "#a .assistant")
        page.until(lambda: page.run("document.querySelector('#spark polyline').getAttribute('points')"))
        assert page.screenshot()[:4] == b"\x89PNG"
        ours = [said for said in page.complaints() if not said.startswith(served.url)]
        assert ours == []


def test_side_by_side(folder: Path, tmp_path: Path) -> None:
    """The same model beside itself agrees on every token; another one does not."""
    other = model(tmp_path / "other", seed=1)
    binary = chromium()
    assert binary
    with running(engine(folder)) as first, Page(binary, tmp_path / "profile") as page:
        for second_model, same in ((folder, True), (other, False)):
            with running(engine(second_model), allowed_origins=(first.url,)) as second:
                visit(page, first)
                page.mouse("#compare summary", click=True)
                page.run(f"document.getElementById('url').value = {second.url!r}")
                ask(page, "hello", 20)
                page.until(lambda: page.run("document.querySelectorAll('.speed').length") == 2)
                assert (page.run("document.querySelectorAll('#b .other').length") == 0) == same
                assert ("differs" not in text(page, "#agreement")) == same
        assert [said for said in page.complaints() if not said.startswith("http://127.0.0.1")] == []
