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


def test_what_one_leaves_is_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which weights those are a kernel finds out as it sees them; behind one that is named stands the reference."""

    def wide(q: Quantized) -> Quantized | None:
        return q if q.weight.shape[-1] >= 128 else None

    def run(x: Tensor, q: Quantized, bias: Tensor | None) -> Tensor:
        return torch.zeros(*x.shape[:-1], q.weight.shape[-2])

    first = Kernel("first", "linear", (), FLOATS, lambda *_: None, wide, run)
    second = Kernel("second", "linear", (), FLOATS, lambda *_: None, lambda q: q, run)
    monkeypatch.setattr(registry, "KERNELS", (first, second, *registry.KERNELS))
    registry.kernels.cache_clear()
    form = FORMATS["int4-g32"]
    for k, mode, want in ((128, "auto", "first"), (64, "auto", "second"), (64, "first", "reference")):
        q = Quantized(form, encode(torch.randn(16, k), form.weight))
        host = Linear.of(nn.Linear(k, 16, bias=False, device="meta"))
        host.bind((q,), Options(kernels=mode))
        x = torch.randn(3, k)
        got = host(x)
        assert [part.kernel.name for part in host.parts] == [want]
        torch.testing.assert_close(got, x @ decode(q.weight).T if want == "reference" else torch.zeros(3, 16))
    monkeypatch.undo()
    registry.kernels.cache_clear()
