"""The model card: metadata that a hub parses, the run's figures, and words that stay words."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fewbit.workflows.card import card, source_licence
from tests.workflows.runs import EVIL, NAME, hostile, run


def metadata(text: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


def test_metadata() -> None:
    assert metadata(card(run(2))) == {
        "license": "apache-2.0", "base_model": NAME, "base_model_relation": "quantized", "library_name": "transformers",
        "pipeline_tag": "text-generation", "quantized_by": "fewbit",
        "tags": ["fewbit", "quantized", "compressed-tensors", "int4-g128", "int8-channel", "gptq"],
    }  # fmt: skip


def test_a_folder_is_no_base_model() -> None:
    for base in (None, "../model", "/models/x", "a/b/c", "plain"):
        made = run(2)
        made["model"]["base"] = base or ""
        assert "base_model" not in metadata(card(made))


def test_what_it_says() -> None:
    text = card(run(2), served_as="me/TinyLlama-int4")
    for words in (
        "fewbit serve me/TinyLlama-int4", "vllm serve me/TinyLlama-int4", "5.18 bits per weight", "+1.79",
        "fewbit quantize",
        "act_order: static", "9b" * 32 + "  model.safetensors", "65,536 tokens", "CC0-1.0", "apache-2.0. Quantizing",
    ):  # fmt: skip
        assert words in text.replace("\N{NO-BREAK SPACE}", " "), words


def test_gguf_says_so_and_vllm_is_left_out() -> None:
    text = card(run(2) | {"dialect": "gguf"})
    assert metadata(text)["library_name"] == "gguf" and "vllm" not in text


def test_bare() -> None:
    text = card({"title": "bare", "model": {"name": "m"}, "modules": []})
    assert "its card names none" in text and "##" in text and "None" not in text
    assert metadata(text)["tags"] == ["fewbit", "quantized"]


def test_words_stay_words() -> None:
    evil = hostile()
    evil["recipe"] += "\n```\n<script>window.hacked = 1</script>\n````\n"
    evil["title"] += " `x` [a](javascript:b) | *c*\n# heading \x1b\x85\u2028"
    evil["model"]["licence"]["license"] += '\x85\u2028: "x" # y'
    text = card(evil)
    assert metadata(text)["license"].startswith("apache-2.0" + EVIL)
    prose = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", text.partition("\n---\n")[2])
    assert "```" not in prose
    prose = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", prose.replace("\\`", ""))
    prose = re.sub(r"\\.", "", prose)
    assert "<" not in prose and "](" not in prose
    assert [line for line in prose.splitlines() if line.startswith("# ")] == [
        f"# {prose.split('# ')[1].splitlines()[0]}"
    ]
    cells = {re.sub(r"\\\|", "", line).count("|") for line in prose.splitlines() if line.startswith("| ")}
    assert cells == {4, 7}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("---\nlicense: mit\n---\n# x", {"license": "mit"}),
        ("---\nlanguage: en\nlicense: 'other' # theirs\nlicense_name: \"our own\"\nlicense_link: LICENSE\n---\n",
         {"license": "other", "license_name": "our own", "license_link": "LICENSE"}),
        ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("---\nlicense:\n- mit\n---\n", {}),
        ("---\nlicense: [mit]\n---\n", {}),
        ("# no metadata\nlicense: mit\n", {}),
        ("---\nlicense: mit\n", {}),
        ("\xff\xfe", {}),
    ],
)  # fmt: skip
def test_source_licence(tmp_path: Path, text: str, want: dict[str, str]) -> None:
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    assert source_licence(tmp_path) == want


def test_source_without_a_card(tmp_path: Path) -> None:
    assert source_licence(tmp_path) == {} == source_licence(tmp_path / "model.gguf")
