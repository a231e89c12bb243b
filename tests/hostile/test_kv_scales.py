"""F17: KV scales that are declared must be there, for keys and values of every layer, and mean something."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbit
from fewbit.errors import CheckpointError
from tests.tiny import edit, edit_config, llama

Tensors = dict[str, Tensor]
LAYER = "model.layers.{}.self_attn"
ARGS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
# dialect -> format, what declares the scales, their endings
DIALECTS: dict[str, tuple[str, dict[str, Any], tuple[str, str]]] = {
    "compressed-tensors": ("int4-g128", {"kv_cache_scheme": ARGS}, (".k_scale", ".v_scale")),
    "modelopt": ("nvfp4-a16", {"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}},
                 (".k_proj.k_scale", ".v_proj.v_scale")),
    "fp8": ("fp8-block", {"kv_cache_scheme": "static"}, (".k_scale", ".v_scale")),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], Path]:
    """A sound checkpoint of a dialect that declares KV scales and holds them, in a folder of the caller's."""
    base = llama(tmp_path_factory.mktemp("kv") / "base")

    def make(dialect: str, out: Path) -> Path:
        form, declared, endings = DIALECTS[dialect]
        fewbit.convert(base, out, dialect, requantize=form)
        (out / "hf_quant_config.json").unlink(missing_ok=True)
        names = [LAYER.format(i) + ending for i in range(2) for ending in endings]
        edit(out, lambda t: t.update({name: torch.tensor(0.02) for name in names}))
        return edit_config(out, lambda c: c["quantization_config"].update(declared))

    return make


def fill(value: float, part: slice = slice(None)) -> Callable[[Tensors, list[str]], None]:
    def change(tensors: Tensors, names: list[str]) -> None:
        tensors.update({name: torch.tensor(value) for name in names[part]})

    return change


def drop(part: slice) -> Callable[[Tensors, list[str]], None]:
    def change(tensors: Tensors, names: list[str]) -> None:
        for name in names[part]:
            del tensors[name]

    return change


LIES: list[tuple[str, Callable[[Tensors, list[str]], None], str]] = [
    ("all missing", drop(slice(None)), "kv-scale-missing"),
    ("one layer missing", drop(slice(2, 4)), "kv-scale-missing"),
    ("values missing", drop(slice(1, None, 2)), "kv-scale-missing"),
    ("one key missing", drop(slice(0, 1)), "kv-scale-missing"),
    ("zero", fill(0.0), "kv-scale"),
    ("NaN", fill(float("nan"), slice(3, 4)), "kv-scale"),
    ("negative", fill(-1.0, slice(0, 1)), "kv-scale"),
    ("infinite", fill(float("inf"), slice(1, 2)), "kv-scale"),
]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_kv_scales(made: Any, tmp_path: Path, dialect: str) -> None:
    path = made(dialect, tmp_path / "x")
    names = [LAYER.format(i) + ending for i in range(2) for ending in DIALECTS[dialect][2]]
    assert [f for f in fewbit.verify(path) if f.severity == "error"] == []
    assert fewbit.load(path) is not None
    whole = (path / "model.safetensors").read_bytes()
    for label, lie, finding in LIES:
        (path / "model.safetensors").write_bytes(whole)
        edit(path, lambda tensors, lie=lie: lie(tensors, names))
        assert finding in {f.name for f in fewbit.verify(path) if f.severity == "error"}, label
        with pytest.raises(CheckpointError, match="scale"):
            fewbit.load(path)


def test_nibble_order(tmp_path: Path) -> None:
    """Columns of one loud input: siblings agree on it; the one whose nibbles were swapped does not."""
    loud = torch.ones(128)
    loud[::3] = 20

    def shape(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
            tensors[name] = (tensors[name].float() * loud).bfloat16()

    base = edit(llama(tmp_path / "base", num_hidden_layers=1), shape)
    fewbit.convert(base, tmp_path / "x", "compressed-tensors", requantize="nvfp4-a16")
    assert "nibble-order" not in {f.name for f in fewbit.verify(tmp_path / "x")}
    name = LAYER.format(0) + ".k_proj.weight_packed"
    edit(tmp_path / "x", lambda t: t.update({name: (t[name] >> 4) | (t[name] << 4)}))
    assert [f.where for f in fewbit.verify(tmp_path / "x") if f.name == "nibble-order"] == [LAYER.format(0) + ".k_proj"]
