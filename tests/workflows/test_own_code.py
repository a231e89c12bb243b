"""Verbs on a model whose code lies in its folder: not without trust; with it, as on the same model of transformers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import fewbit
from fewbit import FewbitError, UnsupportedError
from fewbit.cli import app
from fewbit.workflows import quantize as quantizing
from fewbit.workflows.calibrate_kv import calibrate_kv
from fewbit.workflows.inspect_fusion import fusion
from fewbit.workflows.mixed import choose
from fewbit.workflows.plan import forecast_of
from tests import own_code
from tests.compat import small
from tests.own_code import MODELING, REFUSED, WORDS, said, with_code, with_words
from tests.tiny import edit_config

plain, cache, own, nobody_is_asked = own_code.plain, own_code.cache, own_code.own, own_code.nobody_is_asked
GPTQ = {"format": "int4-g128", "algo": "gptq", "calib": small.ids(), "report": False}


def refused(cache: Path, run: Callable[[], Any], out: Path | None = None) -> None:
    with pytest.raises(FewbitError, match=REFUSED):
        run()
    assert not cache.exists() and not (out and out.exists())


def same(found: Path, want: Path) -> None:
    """Their tensors, and what their configs say but for the type."""
    a, b = (load_file(folder / "model.safetensors") for folder in (found, want))
    assert a.keys() == b.keys() and all(torch.equal(a[name], tensor) for name, tensor in b.items())
    one, two = (json.loads((folder / "config.json").read_text()) for folder in (found, want))
    assert one.pop("auto_map")["AutoConfig"] == "own.OwnConfig" and one.pop("model_type") == "fewbit_own"
    assert one == {key: value for key, value in two.items() if key != "model_type"}
    assert (found / "own.py").read_text() == MODELING and not (want / "own.py").exists()


ASKED = {
    "gptq": GPTQ,
    "rtn": {"format": "FP8", "algo": "rtn", "to": "fp8", "calib": small.ids()},
    "rotate": GPTQ | {"algo": "rotate+gptq"},
    "smooth": GPTQ | {"algo": "smooth+rtn", "format": "W8A8", "kv": "fp8"},
}


@pytest.mark.parametrize("kind", ASKED)
def test_quantize(kind: str, plain: Path, own: Path, cache: Path, tmp_path: Path) -> None:
    """And the result, its code beside it, is served."""
    out, want, asked = tmp_path / "out", tmp_path / "want", {"report": False} | ASKED[kind]
    refused(cache, lambda: fewbit.quantize(own, out, **asked), out)
    fewbit.quantize(plain, want, **asked)
    fewbit.quantize(own, out, **asked, trust_remote_code=True)
    assert list(cache.rglob("imported"))
    same(out, want)
    if kind in ("gptq", "rotate"):
        with pytest.raises(UnsupportedError, match=REFUSED):
            fewbit.LLM(out)
        assert said(out, trust_remote_code=True) == said(want)


def test_what_a_result_says_of_itself(own: Path, tmp_path: Path) -> None:
    """The commands on its card trust it as well."""
    fewbit.quantize(own, tmp_path / "out", "fp8-channel", algo="rtn", trust_remote_code=True)
    assert "--trust-remote-code" in (tmp_path / "out" / "README.md").read_text()


def test_code_that_changed(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted run does not go on with other code."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    asked = GPTQ | {"trust_remote_code": True}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quantizing, "assemble", stop)
        fewbit.quantize(own, tmp_path / "out", **asked)
    (own / "own.py").write_text(MODELING + "\n")
    with pytest.raises(fewbit.RequestError, match=r"model: begun with .*own\.py"):
        fewbit.quantize(own, tmp_path / "out", **asked)
    assert fewbit.quantize(own, tmp_path / "out", **asked, restart=True).resumed == 0


def test_plan(plain: Path, own: Path, cache: Path) -> None:
    asked = {"calib": small.ids(), "measure": False}
    refused(cache, lambda: forecast_of(own, "int4-g128", **asked))
    found = forecast_of(own, "int4-g128", **asked, trust_remote_code=True)
    assert found == replace(forecast_of(plain, "int4-g128", **asked), source=str(own))
    asked = {"bits": 6.0, "formats": ("int4-g128", "int8-channel"), "calib": small.ids()}
    refused(cache=cache.with_name("none"), run=lambda: choose(own, **asked))
    assert choose(own, **asked, trust_remote_code=True) == choose(plain, **asked)


def test_evaluate_and_diff(plain: Path, own: Path, cache: Path, tmp_path: Path) -> None:
    """The flag holds for both models."""
    asked: dict[str, Any] = {"ids": small.ids(), "context": 16}
    refused(cache, lambda: fewbit.evaluate(own, **asked))
    refused(cache, lambda: fewbit.evaluate(plain, against=own, **asked))
    refused(cache, lambda: fewbit.diff(own, plain, **asked))
    refused(cache, lambda: fewbit.diff(plain, own, **asked))
    ours = [own, with_code(small.folder(tmp_path / "b", seed=1), MODELING)]
    theirs = [plain, small.folder(tmp_path / "c", seed=1)]
    for more in ({}, {"format": "int8-channel"}):
        found, want = (fewbit.evaluate(a, against=b, **asked, **more, trust_remote_code=a in ours)
                       for a, b in (ours, theirs))  # fmt: skip
        assert replace(found, path="", against="") == replace(want, path="", against="") and found.kl.value > 0
        found, want = (fewbit.diff(a, b, **asked, **more, trust_remote_code=a in ours) for a, b in (ours, theirs))
        assert replace(found, a="", b="") == replace(want, a="", b="") and found.kl.value > 0


@pytest.mark.parametrize("to", ["gptq", "dense"])
def test_convert(to: str, plain: Path, own: Path, cache: Path, tmp_path: Path) -> None:
    out, want, asked = tmp_path / "out", tmp_path / "want", {"gptq": {"requantize": "int4-g128"}, "dense": {}}[to]
    refused(cache, lambda: fewbit.convert(own, out, to, **asked), out)
    fewbit.convert(plain, want, to, **asked)
    fewbit.convert(own, out, to, **asked, trust_remote_code=True)
    same(out, want)
    assert said(out, trust_remote_code=True) == said(want)


def test_verify(own: Path, cache: Path, tmp_path: Path) -> None:
    (found,) = [f for f in fewbit.verify(own) if f.severity == "error"]
    assert found.name == "no-model" and "trust_remote_code=True would import and run it" in str(found)
    assert not cache.exists()
    found = fewbit.verify(own, trust_remote_code=True)
    assert {f.name for f in found} == {"remote-code"} and "trusted: imported" in str(found[0])
    edit_config(own, lambda config: config["auto_map"].pop("AutoConfig"))
    assert "none of it is an AutoConfig" in str(fewbit.verify(own, trust_remote_code=True)[0])


def test_verbs_that_speak(plain: Path, own: Path, cache: Path) -> None:
    asked = ["hello", "--max-tokens", "4", "--dtype", "float32"]
    refused = CliRunner().invoke(app, ["complete", str(own), *asked])
    assert isinstance(refused.exception, UnsupportedError) and "(--trust-remote-code)" in str(refused.exception)
    want = CliRunner().invoke(app, ["complete", str(plain), *asked])
    found = CliRunner().invoke(app, ["complete", str(own), *asked, "--trust-remote-code"])
    assert found.exit_code == 0 and found.stdout == want.stdout


def test_inspect(plain: Path, own: Path, cache: Path, tmp_path: Path) -> None:
    """Headers need no trust; what is read off the architecture does."""
    scales = tmp_path / "scales.st"
    info = fewbit.inspect(own)
    assert info.model_type == "fewbit_own" and len(info.remote_code) == 2
    refused(cache, lambda: fusion(own))
    calibrate_kv(own, scales, calib=small.ids(), trust_remote_code=True)
    with pytest.raises(FewbitError, match=REFUSED):
        fewbit.inspect(own, kv_scales=scales)
    assert fewbit.inspect(own, kv_scales=scales, trust_remote_code=True).kv_scales.startswith("file")
    found, want = fusion(own, trust_remote_code=True).to_json(), fusion(plain).to_json()
    assert found.pop("model_type") == "fewbit_own" and want.pop("model_type") == "llama" and found == want


def test_words_of_its_own(own: Path, tmp_path: Path) -> None:
    """The tokenizer's code is run for calibration and for a text, and goes with the result."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("\n\n".join(small.TEXTS))
    fewbit.quantize(with_words(own), out, "int4-g128", samples=2, length=32, report=False, trust_remote_code=True)
    assert (out / "words.py").read_text() == WORDS
    found = fewbit.evaluate(out, text=text, against=own, context=32, trust_remote_code=True)
    assert found.tokens and fewbit.diff(own, out, text=text, context=32, trust_remote_code=True).tokens


VERBS = {
    "quantize": "quantize OWN -f fp8-channel -a rtn -o OUT",
    "quantize by bits": "quantize OWN --target-bits 6 --from int4-g128,int8-channel --calib-samples 2 --calib-len 32 "
                        "-o OUT --no-report",
    "plan": "plan OWN -f fp8-channel -a rtn --no-measure",
    "eval": "eval OWN --text TEXT --context 16",
    "diff": "diff OWN --format int8-channel --text TEXT --context 16",
    "convert": "convert OWN --to dense -o OUT",
    "verify": "verify OWN",
    "inspect": "inspect OWN --fusion",
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_the_flag(verb: str, own: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(small.TEXTS))
    places = {"OWN": own, "TEXT": tmp_path / "text.txt", "OUT": tmp_path / "out"}
    line = [str(places.get(word, word)) for word in VERBS[verb].split()]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 1 and "'fewbit_own' is not known" in f"{done.exception} {done.output}"
    assert not cache.exists() and not places["OUT"].exists()
    done = CliRunner().invoke(app, [*line, "--trust-remote-code"])
    assert done.exit_code == 0, (done.output, done.exception)
    if verb.startswith("quantize"):
        assert "--text FILE --trust-remote-code" in done.output


def test_why_an_architecture_cannot_be_looked_at(plain: Path) -> None:
    edit_config(plain, lambda config: config.update(hidden_act="nonsense"))
    found = fusion(plain)
    assert found.kernels is None
    for text in (found.why, found.plan.refused[0].reason):
        assert "does not compute here" in text and "no twin: KeyError: 'nonsense'" in text
