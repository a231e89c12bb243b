"""Quanto: rows of INT8 and FP8, named one by one in its map; what has no shape is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fewbit import codecs
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.qtensor import Quantized
from fewbit.quant.reference import decode
from tests.codecs.roundtrip import random_weight

QUANTO = codecs.CODECS["quanto"]
TYPES = {"qint8": torch.int8, "qfloat8": torch.float8_e4m3fn, "qfloat8_e5m2": torch.float8_e5m2}


def write(folder: Path, weights: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A checkpoint with one quantized linear and one dense one, as quanto saves it."""
    tensors = {
        "model.q_proj.weight._data": (random_weight(8, 32) * 20).to(dtype),
        "model.q_proj.weight._scale": (torch.arange(8.0) / 8 + 0.5).bfloat16().unsqueeze(1),
        "model.q_proj.input_scale": torch.ones(()),
        "model.q_proj.output_scale": torch.ones(()),
        "model.q_proj.bias": torch.zeros(8),
        "lm_head.weight": torch.zeros(4, 8),
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    qmap = {"model.q_proj": {"weights": weights, "activations": "none"}}
    (folder / "quanto_qmap.json").write_text(json.dumps(qmap))
    return tensors


@pytest.mark.parametrize(("weights", "dtype"), TYPES.items())
def test_reads(tmp_path: Path, weights: str, dtype: torch.dtype) -> None:
    stored = write(tmp_path, weights, dtype)
    with codecs.open(tmp_path) as source:
        assert source.dialect == "quanto" and "quanto_qmap.json" in source.evidence
        assert list(source.modules) == ["model.q_proj"] and not source.problems
        assert set(source.dense) == {"model.q_proj.bias", "lm_head.weight"} and len(source.surplus) == 2
        q = source.read("model.q_proj")
        assert isinstance(q, Quantized) and q.format.act is None
    want = stored["model.q_proj.weight._data"].float() * stored["model.q_proj.weight._scale"].float()
    assert torch.equal(decode(q.weight), want)


REFUSED = [
    ({"weights": "qint4", "activations": "none"}, UnsupportedError, "without its shape"),
    ({"weights": "qint8", "activations": "qint8"}, UnsupportedError, "activations"),
    (["qint8"], CheckpointError, "object"),
]


@pytest.mark.parametrize(("own", "error", "message"), REFUSED)
def test_refuses(own: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"model.q_proj(.|\n)*{message}"):
        QUANTO.plan({"model.q_proj": own})


def test_a_map_that_lies(tmp_path: Path) -> None:
    write(tmp_path, "qfloat8", torch.int8)
    with codecs.open(tmp_path) as source:
        assert [(kind, name) for kind, name, _ in source.problems] == [("unreadable", "model.q_proj")]


def test_config_of_transformers() -> None:
    plan = QUANTO.plan({"quant_method": "quanto", "weights": "int8", "modules_to_not_convert": ["lm_head"]})
    assert plan.for_module("model.q_proj")[0] is not None and plan.for_module("lm_head")[0] is None
