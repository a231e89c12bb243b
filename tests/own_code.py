"""A tiny Llama whose code lies in its folder, and the same as transformers has it.

A test module takes the fixtures by assignment: `own, plain = own_code.own, own_code.plain`.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fewbit import LLM, SamplingParams
from tests.compat import small
from tests.tiny import edit_config

MODELING = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
(Path(__file__).parent / "imported").touch()
class OwnConfig(LlamaConfig):
    model_type = "fewbit_own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
WORDS = """
from transformers import PreTrainedTokenizerFast
class OwnWords(PreTrainedTokenizerFast):
    pass
"""
REFUSED = r"(?s)'fewbit_own' is not known.*trust_remote_code=True would import and run it"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return small.folder(tmp_path / "plain")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where transformers puts code before it imports it; what another test has imported is not there."""
    place = tmp_path / "cache"
    for name in [name for name in sys.modules if name.startswith("transformers_modules.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(place))
    return place


@pytest.fixture
def own(tmp_path: Path, cache: Path) -> Path:
    """The same weights, of a type that transformers does not have."""
    return with_code(small.folder(tmp_path / "own"), MODELING)


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers asks at the terminal, and waits for an answer, where it is not told whether to trust."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "n")
    yield
    assert not asked


def with_code(folder: Path, code: str) -> Path:
    (folder / "own.py").write_text(code)
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    return edit_config(folder, lambda config: config.update(auto_map=names, model_type="fewbit_own"))


def with_words(folder: Path) -> Path:
    """A tokenizer whose code lies in the folder, where there is no other."""
    (folder / "words.py").write_text(WORDS)
    file = folder / "tokenizer_config.json"
    said_of_it = {"auto_map": {"AutoTokenizer": [None, "words.OwnWords"]}, "tokenizer_class": "OwnWords"}
    file.write_text(json.dumps(json.loads(file.read_text()) | said_of_it))
    return folder


def said(model: str | Path, **options: Any) -> list[list[int]]:
    """The first tokens that a model goes on with."""
    with LLM(model, dtype="float32", **options) as llm:
        params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        return [list(o.outputs[0].token_ids) for o in llm.generate([row.tolist() for row in small.ids()], params)]
