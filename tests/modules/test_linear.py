"""Linear holds a parameter or quantized parts, and looks like nn.Linear either way."""

import pytest
import torch
from torch import nn

from fewbit.errors import UnsupportedError
from fewbit.modules.embedding import Embedding, rows
from fewbit.modules.linear import Linear, Options
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import Quantized, Transform
from fewbit.quant.reference import decode, encode, linear


def quantized(name: str, n: int, k: int = 64) -> Quantized:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n)) / 8
    return Quantized(FORMATS[name], encode(w, FORMATS[name].weight))


def test_dense_is_the_same_layer() -> None:
    theirs = nn.Linear(64, 32)
    ours = Linear.of(theirs)
    x = torch.randn(4, 64)
    assert ours.weight is theirs.weight
    assert dict(ours.named_parameters()).keys() == {"weight", "bias"}
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("bias", [True, False])
def test_parts_lie_along_n(bias: bool) -> None:
    layer = Linear.of(nn.Linear(64, 48, bias=bias))
    parts = (quantized("int4-g32", 16), quantized("fp8-channel", 32))
    layer.bind(parts, Options())
    x = torch.randn(2, 3, 64)
    want = torch.cat([linear(x, q) for q in parts], -1) + (layer.bias if bias else 0)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(layer.weight, torch.cat([decode(q.weight) for q in parts]))
    assert "weight" not in dict(layer.named_parameters())


def test_activations_off() -> None:
    layer = Linear.of(nn.Linear(64, 16, bias=False))
    q = quantized("nvfp4", 16)
    x = torch.randn(5, 64)
    layer.bind((q,), Options(activations="off"))
    torch.testing.assert_close(layer(x), x @ decode(q.weight).T)
    layer.bind((q,), Options())
    torch.testing.assert_close(layer(x), linear(x, q))


def test_dtype_change_leaves_planes_alone() -> None:
    layer = Linear.of(nn.Linear(64, 16))
    layer.bind((quantized("int4-g32", 16),), Options())
    before = {n: p.dtype for n, p in layer.parts[0].quantized.weight.planes.items()}
    layer.to(torch.bfloat16)
    assert {n: p.dtype for n, p in layer.parts[0].quantized.weight.planes.items()} == before
    assert layer(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16


def test_moves_to_another_device() -> None:
    layer = Linear.of(nn.Linear(64, 16))
    layer.bind((quantized("int4-g32", 16),), Options())
    layer.to("meta")
    assert layer.parts[0].quantized.weight.device.type == "meta"


def test_refuses_what_does_not_fit() -> None:
    layer = Linear.of(nn.Linear(64, 48))
    with pytest.raises(UnsupportedError, match=r"\[48, 64\] cannot hold \[\[16, 64\]\]"):
        layer.bind((quantized("int4-g32", 16),), Options())


def test_a_transformed_weight_is_no_plain_matrix() -> None:
    layer = Linear.of(nn.Linear(64, 16))
    q = quantized("int4-g32", 16)
    scale = Transform("input_scale", {"scale": torch.ones(64)})
    layer.bind((Quantized(q.format, q.weight, {}, (scale,)),), Options())
    with pytest.raises(UnsupportedError, match="input_scale"):
        layer.weight  # noqa: B018


class Scaled(nn.Embedding):
    """As Gemma scales what it looks up."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 3.0


@pytest.mark.parametrize("name", ["q6_k", "int8-channel", "fp8-tensor", "nf4", "fp8-block"])
def test_embedding_decodes_rows(name: str) -> None:
    table = quantized(name, 300, 256).weight
    layer = Embedding(Scaled(300, 256, padding_idx=0), table, torch.float32)
    ids = torch.tensor([[0, 7, 7], [299, 1, 0]])
    torch.testing.assert_close(layer(ids), decode(table)[ids] * 3.0)
    torch.testing.assert_close(rows(table, torch.tensor([5, 2])), decode(table)[[5, 2]])
    torch.testing.assert_close(layer.weight, decode(table))
    assert not list(layer.parameters())
