"""Peak anonymous memory of load = the final model + the largest tensor + 64 MiB."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.models.memory import MIB, measure
from tests.tiny import edit_config, llama

WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "vocab_size": 32768,
}
SLACK = 64 * MIB


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 320 MiB Llama in bf16; its embedding and its head are its largest tensors."""
    return llama(tmp_path_factory.mktemp("wide"), **WIDE, num_key_value_heads=16)


@pytest.mark.parametrize(
    ("arguments", "bits"),
    [({}, 16.0), ({"format": "int8-channel"}, 8.0), ({"format": "int4-g128"}, 4.125), ({"dtype": "float32"}, 32.0)],
)
def test_peak(dense: Path, arguments: dict[str, str], bits: float) -> None:
    inner = 6 * (4 * 1024 * 1024 + 3 * 1024 * 4096)
    head = 32768 * 1024
    wide = 4 if arguments.get("dtype") == "float32" else 2
    final = int(inner * bits / 8) + 2 * head * wide
    peak, _ = measure(dense, **arguments)
    assert peak <= final + head * 2 + SLACK, f"peak {peak / MIB:.0f} MiB, the model takes {final / MIB:.0f}"


def test_experts_are_quantized_one_by_one(tmp_path: Path) -> None:
    """The stack of a layer never exists dense."""
    folder = llama(tmp_path, num_hidden_layers=1, hidden_size=512, num_attention_heads=8)
    experts, inner = 64, 1024
    tensors = {}
    for e in range(experts):
        for name, shape in (("w1", (inner, 512)), ("w3", (inner, 512)), ("w2", (512, inner))):
            tensors[f"model.layers.0.block_sparse_moe.experts.{e}.{name}.weight"] = torch.randn(shape).bfloat16()
    tensors["model.layers.0.block_sparse_moe.gate.weight"] = torch.randn(experts, 512).bfloat16()
    moe(folder, tensors)
    edit_config(
        folder,
        lambda config: config.update(
            model_type="mixtral",
            architectures=["MixtralForCausalLM"],
            num_local_experts=experts,
            intermediate_size=inner,
        ),
    )
    peak, _ = measure(folder, format="int4-g128")
    stack = experts * 3 * inner * 512
    assert peak <= stack * 4.125 / 8 + 2 * inner * 512 + SLACK, (
        f"{peak / MIB:.0f} MiB; dense it is {2 * stack / MIB:.0f}"
    )


def moe(folder: Path, experts: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import load_file

    kept = {n: t for n, t in load_file(folder / "model.safetensors").items() if ".mlp." not in n}
    save_file(kept | experts, folder / "model.safetensors", {"format": "pt"})
