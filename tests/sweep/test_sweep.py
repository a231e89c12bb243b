"""The named types are exact, and the committed table keeps its promise."""

import pytest

from tests.sweep.sweep import TABLE, judge

NAMED = [
    "llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gemma3", "phi3", "opt", "gpt_oss", "mixtral", "qwen3_moe",
    "deepseek_v3", "glm4",
]  # fmt: skip
LEAST = 170


@pytest.mark.parametrize("model_type", NAMED)
def test_named_types_are_exact(model_type: str) -> None:
    row = judge(model_type)
    assert row.verdict == "exact" and row.attention == "fewbit", row.line()
    assert row.error < 1e-5


def test_the_committed_table() -> None:
    rows = [line.split("|")[1:4] for line in TABLE.read_text().splitlines() if line.startswith("| ")][1:]
    verdicts = {name.strip(): verdict.strip() for name, verdict, _ in rows}
    assert sum(verdict == "exact" for verdict in verdicts.values()) >= LEAST
    assert all(verdicts[name] == "exact" for name in NAMED)
    assert "wrong" not in verdicts.values()
