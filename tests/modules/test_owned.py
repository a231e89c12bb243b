"""A kernel that takes the planes over: one copy in memory, and what needs the planes says so."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fewbit.errors import UnsupportedError
from fewbit.kernels import registry, torch_emulated
from fewbit.kernels.registry import FLOATS, Kernel
from fewbit.modules.linear import Linear, Options
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import Quantized
from fewbit.quant.reference import decode, encode


@pytest.fixture
def taker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The first kernel of all is one that takes planes over, until the test ends."""
    taker = Kernel(
        "taker", "linear", (), FLOATS, lambda *_: None, torch_emulated.prepack, torch_emulated.run_linear, owns=True
    )
    monkeypatch.setattr(registry, "KERNELS", (taker, *registry.KERNELS))
    registry.kernels.cache_clear()
    yield
    monkeypatch.undo()
    registry.kernels.cache_clear()


@pytest.mark.usefixtures("taker")
def test_taken_over() -> None:
    q = Quantized(FORMATS["int4-g32"], encode(torch.randn(16, 64), FORMATS["int4-g32"].weight))
    want: Tensor = decode(q.weight)
    host = Linear.of(nn.Linear(64, 16, bias=False, device="meta"))
    host.bind((q,), Options())
    x = torch.randn(3, 64)
    assert torch.equal(host(x), x @ want.T)
    assert host.parts[0].quantized.weight.device.type == "meta"
    assert host.to("cpu").parts
    with pytest.raises(UnsupportedError, match="taker holds it in its own layout"):
        _ = host.weight
    with pytest.raises(UnsupportedError, match="moved to meta"):
        host.to("meta")
    assert "int4" in repr(host)
