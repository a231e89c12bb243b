"""Calibrating a model whose code lies in its folder: not without trust; with it, as the same model of transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from fewbit import LLM, SamplingParams, codecs
from fewbit.cli import app
from fewbit.compat import fakequant, inc
from fewbit.errors import CheckpointError, FewbitError, UnsupportedError
from fewbit.models.layers import WHOLE, Layers
from fewbit.models.text import tokenizer
from fewbit.workflows.calibrate_kv import calibrate_kv
from tests import own_code
from tests.compat import small
from tests.own_code import MODELING, REFUSED, WORDS, said, with_code, with_words

ASKED = {"fakequant": "FP8_DEFAULT_CFG", "kv_fakequant": "FP8_KV_CFG"}
plain, cache, own, nobody_is_asked = own_code.plain, own_code.cache, own_code.own, own_code.nobody_is_asked


def test_fakequant(plain: Path, own: Path, cache: Path, tmp_path: Path) -> None:
    """And what was written is served, with its code beside it."""
    text = {"data": small.ids()}
    with pytest.raises(UnsupportedError, match=REFUSED):
        fakequant.calibrate(own, tmp_path / "out", **ASKED, text=text)
    assert not (tmp_path / "out").exists() and not cache.exists()
    want = fakequant.calibrate(plain, tmp_path / "want", **ASKED, text=text)
    found = fakequant.calibrate(own, tmp_path / "out", **ASKED, text=text, trust_remote_code=True)
    assert list(cache.rglob("imported"))
    assert found.keys() == want.keys() and all(torch.equal(found[key], t) for key, t in want.items())
    assert (tmp_path / "out" / "own.py").read_text() == MODELING and not (tmp_path / "want" / "own.py").exists()
    out = str(tmp_path / "out")
    with pytest.raises(UnsupportedError, match=REFUSED):
        LLM(out, amax_file=out)
    assert said(out, amax_file=out, trust_remote_code=True) == said(tmp_path / "want", amax_file=str(tmp_path / "want"))


def test_an_engine_that_calibrates_as_it_starts(plain: Path, own: Path, cache: Path) -> None:
    with pytest.raises(UnsupportedError, match=REFUSED):
        LLM(own, calib_size=2, **ASKED)
    assert not cache.exists()
    assert said(own, calib_size=2, trust_remote_code=True, **ASKED) == said(plain, calib_size=2, **ASKED)


def test_caches(plain: Path, own: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitError, match=REFUSED):
        calibrate_kv(own, tmp_path / "own.st", calib=small.ids())
    assert not (tmp_path / "own.st").exists() and not cache.exists()
    calibrate_kv(plain, tmp_path / "plain.st", calib=small.ids())
    calibrate_kv(own, tmp_path / "own.st", calib=small.ids(), trust_remote_code=True)
    found, want = (load_file(tmp_path / name) for name in ("own.st", "plain.st"))
    assert found.keys() == want.keys() and all(torch.equal(found[key], t) for key, t in want.items())
    one, two = (said(folder, kv_scales=str(tmp_path / f"{folder.name}.st"), trust_remote_code=folder == own)
                for folder in (own, plain))  # fmt: skip
    assert one == two


def test_inc(own: Path, cache: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"mode": "MEASURE", "dump_stats_path": str(tmp_path / "stats" / "inc")}))
    with pytest.raises(UnsupportedError, match=REFUSED):
        inc.calibrate(own, config, calib=small.ids())
    assert not cache.exists()
    assert inc.calibrate(own, config, calib=small.ids(), trust_remote_code=True).nodes


def test_the_flag(own: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"mode": "MEASURE", "dump_stats_path": str(tmp_path / "stats" / "inc")}))
    kinds = (["--fakequant", "FP8_DEFAULT_CFG", "-o", str(tmp_path / "out")],
             ["--kv", "fp8", "-o", str(tmp_path / "scales.st")], ["--inc", str(config)])  # fmt: skip
    for asked in kinds:
        line = ["calibrate", str(own), *asked, "--calib-samples", "2", "--calib-len", "32"]
        refused = CliRunner().invoke(app, line)
        assert isinstance(refused.exception, FewbitError) and "'fewbit_own' is not known" in str(refused.exception)
        done = CliRunner().invoke(app, [*line, "--trust-remote-code"])
        assert done.exit_code == 0 and "next:" in done.output, done.output


TWICE = (
    MODELING
    + """
    def forward(self, input_ids=None, **more):
        super().forward(input_ids=input_ids, use_cache=False)
        return super().forward(input_ids=input_ids, **more)
"""
)


def test_code_whose_layers_do_not_run_one_by_one(plain: Path, tmp_path: Path, cache: Path) -> None:
    """Then the whole model is the one layer, and the values are the same."""
    folder = with_code(small.folder(tmp_path / "twice"), TWICE)
    with codecs.open(folder, trust_remote_code=True) as source:
        assert [unit.name for unit in Layers(source).units] == [WHOLE]
    found = fakequant.calibrate(folder, tmp_path / "out", **ASKED, text={"data": small.ids()}, trust_remote_code=True)
    want = fakequant.calibrate(plain, tmp_path / "want", **ASKED, text={"data": small.ids()})
    assert found.keys() == want.keys() and all(torch.equal(found[key], t) for key, t in want.items())


def test_words_of_its_own(own: Path, cache: Path, tmp_path: Path) -> None:
    """A tokenizer whose code lies in the folder, where there is no other."""
    with_words(own)
    with pytest.raises(CheckpointError, match=r"no tokenizer can be read.*trust_remote_code=True would import"):
        tokenizer(own)
    assert not cache.exists()
    assert type(tokenizer(own, trust_remote_code=True)).__name__ == "OwnWords"
    short = {"samples": 2, "length": 32}
    fakequant.calibrate(own, tmp_path / "out", **ASKED, text=short, trust_remote_code=True)
    calibrate_kv(own, tmp_path / "own.st", **short, trust_remote_code=True)
    assert (tmp_path / "out" / "words.py").read_text() == WORDS
    with LLM(tmp_path / "out", amax_file=str(tmp_path / "out"), trust_remote_code=True) as llm:
        assert llm.generate("the fog", SamplingParams(max_tokens=2, ignore_eos=True))[0].outputs[0].token_ids


BROKEN = {
    "import nothing_of_that_name": "nothing_of_that_name",
    "raise RuntimeError('not today')": "not today",
}  # fmt: skip


@pytest.mark.parametrize("line", BROKEN)
def test_code_that_fails(line: str, tmp_path: Path, cache: Path) -> None:
    """What a folder's code raises is said as of the checkpoint."""
    folder = with_code(small.folder(tmp_path / "own"), f"{line}\n{MODELING}")
    with pytest.raises(CheckpointError, match=rf"(?s)no model can be built from it.*{BROKEN[line]}"):
        fakequant.calibrate(folder, tmp_path / "out", **ASKED, text={"data": small.ids()}, trust_remote_code=True)
    with pytest.raises(CheckpointError, match=BROKEN[line]):
        calibrate_kv(folder, tmp_path / "own.st", calib=small.ids(), trust_remote_code=True)
