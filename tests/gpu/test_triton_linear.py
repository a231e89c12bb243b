"""The Triton kernels compiled: linears over every format, experts, embeddings; CUDA graphs of them.

Most of the time is compiling, a second a kernel: `pytest -n 12` spreads it over cores.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbit.kernels import triton_experts, triton_linear, triton_route
from fewbit.kernels.coded import coded, lacking
from fewbit.kernels.registry import KERNELS
from fewbit.modules.embedding import Embedding
from fewbit.modules.experts import ATTRIBUTE, GATE, Experts, by_host, forward
from fewbit.modules.glu import Gating, GluForm
from fewbit.modules.linear import Options, Part
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import QTensor, Quantized
from fewbit.quant.reference import decode, encode
from fewbit.quant.spec import Format
from tests.modules.test_experts import E, Host

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
TAKEN = [name for name, f in FORMATS.items() if lacking(f.weight) is None]
ROWS = (1, 5, 16, 40, 100, 600)
SERVED = ("q4_k", "q6_k", "q8_0", "int4-g128", "int3-g128-asym", "nvfp4", "mxfp4", "nf4", "nf4-dq", "fp8-block")
KERNEL = next(k for k in KERNELS if (k.name, k.op) == ("triton", "experts"))


@pytest.fixture(autouse=True)
def filled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is allocated starts as NaN."""
    monkeypatch.setattr(torch, "empty", nan_filled(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", nan_filled(torch.Tensor.new_empty))
    with torch.no_grad():
        yield


def nan_filled(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def filled(*args: Any, **options: Any) -> Tensor:
        out = empty(*args, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    return filled


def there(q: QTensor) -> QTensor:
    return q.to("cuda")


def weight(name: str, n: int = 200, k: int = 512) -> Quantized:
    """Encoded on a CPU, whose way of choosing scales needs no compiler."""
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(len(name))) / k**0.5
    return Quantized(Format(FORMATS[name].weight), there(encode(values, FORMATS[name].weight)))


def near(got: Tensor, x: Tensor, q: Quantized, bias: Tensor | None = None) -> None:
    exact = decode(q.weight).double()
    want, size = x.double() @ exact.T, x.double().abs() @ exact.abs().T
    want = want if bias is None else want + bias.double()
    step = max(torch.finfo(x.dtype).eps, 1e-6)
    error = (got.double() - want).abs() / (want.abs() + size)
    assert got.dtype == x.dtype
    assert float(error.max()) <= step, f"{len(x)} rows: {float(error.max()):.3g}"


@pytest.mark.parametrize("name", TAKEN)
def test_equals_the_oracle(name: str) -> None:
    q, bias = weight(name), torch.randn(200, device="cuda").bfloat16()
    held = coded(q)
    for m in ROWS if name in SERVED else (5, 600):
        x = torch.randn(m, 512, device="cuda").bfloat16()
        near(triton_linear.run_linear(x, held, bias), x, q, bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["q4_k", "nf4", "int3-g128-asym", "fp8-block-a16"])
def test_other_floats(name: str, dtype: torch.dtype) -> None:
    q = weight(name)
    for m in (5, 40, 600):
        x = torch.randn(m, 512, device="cuda", dtype=dtype)
        near(triton_linear.run_linear(x, coded(q)), x, q)


@pytest.mark.parametrize(("n", "k"), [(17, 72), (33, 33), (1000, 1184), (2304, 11008)])
@pytest.mark.parametrize("name", ["int3-channel", "int5-tensor-asym", "fp8-block-a16", "nf4"])
def test_sizes_that_no_tile_divides(name: str, n: int, k: int) -> None:
    q = weight(name, n, k)
    for m in (3, 130):
        x = torch.randn(m, k, device="cuda").bfloat16()
        near(triton_linear.run_linear(x, coded(q)), x, q)


@pytest.mark.parametrize("name", ["q4_k", "int4-g128", "nf4", "q6_k"])
def test_rows_do_not_know_of_one_another(name: str) -> None:
    held, x = coded(weight(name, 512, 4096)), torch.randn(16, 4096, device="cuda").bfloat16()
    alone = torch.cat([triton_linear.run_linear(row[None], held) for row in x])
    assert torch.equal(triton_linear.run_linear(x, held), alone)


def replayed(run: Callable[[], Tensor], change: Callable[[], None]) -> Tensor:
    """run, captured and then replayed with inputs that change() has changed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    change()
    out.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    return out


@pytest.mark.parametrize("name", ["q4_k", "int4-g128-a8fp8", "nvfp4", "mxfp4", "fp8-block", "int8-channel-a8"])
@pytest.mark.parametrize("m", [4, 40, 300])
def test_linear_in_a_graph(name: str, m: int) -> None:
    """With the rounding of activations that the format declares."""
    q = Quantized(FORMATS[name], weight(name).weight)
    held, x, other = coded(q), *torch.randn(2, m, 512, device="cuda").bfloat16()
    got = replayed(lambda: triton_linear.run_linear(x, held), lambda: x.copy_(other))
    assert torch.equal(got, triton_linear.run_linear(other, held))


def experts(host: Host, h: int, m: int, name: str) -> None:
    ours = Experts(Options(dtype=torch.bfloat16))
    for projection, shapes in (("gate_up_proj", ((m, h), (m, h))), ("down_proj", ((h, m),))):
        drawn = [encode(torch.randn(E, *shape) / shape[-1] ** 0.5, FORMATS[name].weight) for shape in shapes]
        parts = [Quantized(Format(FORMATS[name].weight), there(q)) for q in drawn]
        ours.parts[projection] = tuple(
            Part(q, KERNEL, triton_experts.prepack_experts(q), q.weight.device) for q in parts
        )
    setattr(host, ATTRIBUTE, ours)


class Wide(Host):
    """256 inputs, 512 inside, in bfloat16 on the device."""

    def __init__(self, transposed: bool = False, bias: bool = False):
        super().__init__(transposed, bias)
        for name, n, k in (("gate_up_proj", 1024, 256), ("down_proj", 256, 512)):
            w = torch.randn(E, n, k) / k**0.5
            self.register_parameter(name, nn.Parameter(w.mT.contiguous() if transposed else w, False))
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(E, n), False))
        self.to("cuda", torch.bfloat16)


def drawn(tokens: int, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.stack([torch.randperm(E)[:2] for _ in range(tokens)]).cuda()
    weights = torch.rand(tokens, 2, device="cuda").bfloat16()
    if padded:
        index[0, 1] = E
        weights[0, 1] = 0
    return torch.randn(tokens, 256, device="cuda").bfloat16(), index, weights


@pytest.mark.parametrize("form", [None, "q4_k", "q6_k", "int4-g128", "nvfp4-a16", "nf4"])
@pytest.mark.parametrize("tokens", [1, 7, 200])
@pytest.mark.parametrize("kind", [{}, {"transposed": True, "bias": True}])
def test_experts_in_a_graph(form: str | None, tokens: int, kind: dict[str, bool]) -> None:
    torch.manual_seed(0)
    host = Wide(**kind)
    if form is not None:
        experts(host, 256, 512, form)
    if kind:
        gating = Gating("quick_gelu", 1.702, limit=2.0, plus=1.0)
        setattr(host, GATE, GluForm(gating, "gate_up_proj", "", "down_proj", "even"))
    held, other = drawn(tokens, False), drawn(tokens, True)
    got = replayed(lambda: forward(host, *held), lambda: [a.copy_(b) for a, b in zip(held, other, strict=True)])
    assert torch.equal(got, forward(host, *other))
    want = by_host(host, *other)
    assert float((got - want).float().norm() / want.float().norm()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [[1, 0, 3, 0], [0, 0, 0, 300], [0] * 127 + [7]], ids=len)
def test_biases_of_experts(counts: list[int], dtype: torch.dtype) -> None:
    size, rows = sum(counts), torch.tensor(counts, device="cuda")
    for n in (40, 2880):
        y = torch.randn(size + 2, n, device="cuda").to(dtype)  # two rows belong to none
        bias = torch.randn(len(counts), n, device="cuda").to(dtype)
        want = y[:size] + bias.repeat_interleave(rows, dim=0)
        assert torch.equal(triton_route.add_bias(y, bias, rows)[:size], want)


@pytest.mark.parametrize("name", ["q6_k", "q4_k", "int8-channel", "fp8-tensor", "nf4", "nf4-dq", "fp8-block"])
def test_embedding_in_a_graph(name: str) -> None:
    table = weight(name, 300, 256).weight
    layer = Embedding(nn.Embedding(300, 256, padding_idx=0), table, torch.bfloat16)
    ids, other = torch.tensor([[0, 7, 7], [299, 1, 0]]).cuda(), torch.tensor([[5, 7, 0], [298, 2, 2]]).cuda()
    got = replayed(lambda: layer(ids), lambda: ids.copy_(other))
    torch.testing.assert_close(got, decode(table)[other].bfloat16(), rtol=1e-2, atol=1e-5)
