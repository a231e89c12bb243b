"""Dialects that cannot be read are refused by name, with a reason and a way out; nothing guesses at the others."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewbit import codecs
from fewbit.codecs.codec import Located
from fewbit.codecs.foreign import REASONS
from fewbit.errors import UnsupportedError


@pytest.mark.parametrize("method", [*REASONS, "fp_quant", "AQLM", "gptq_marlin_24"])
def test_refused_by_name(method: str) -> None:
    codec, evidence = codecs.claimant(Located({"quant_method": method}, "config.json: quantization_config"))
    assert codec.name == "foreign" and "quant_method" in evidence
    with pytest.raises(UnsupportedError, match="known and cannot be read") as error:
        codec.plan({"quant_method": method})
    assert len(error.value.reasons) == 2 and "gptq" in error.value.reasons[1]


def test_open_refuses_a_checkpoint(tmp_path: Path) -> None:
    save_file({"model.layers.0.q_proj.codes": torch.zeros(4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "aqlm"}}))
    with pytest.raises(UnsupportedError, match="aqlm"):
        codecs.open(tmp_path)


def test_what_nobody_claims_lists_what_was_seen() -> None:
    with pytest.raises(UnsupportedError, match="no dialect claims") as error:
        codecs.claimant(Located({"quant_method": "mine", "bits_of_mine": 3}, "config.json: quantization_config"))
    assert "bits_of_mine" in error.value.reasons[0]


def test_no_refusal_is_of_a_dialect_we_read() -> None:
    assert not REASONS.keys() & codecs.CODECS.keys()
