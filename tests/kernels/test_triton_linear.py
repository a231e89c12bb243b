"""The Triton linears against the oracle, by Triton's interpreter, over every format that they take.

Tiles are made so small that a few rows and columns fill them, and torch.empty gives NaN. The interpreter cannot
multiply bfloat16: tests/gpu does that.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewbit.kernels import triton_linear
from fewbit.kernels.coded import Coded, coded, lacking
from fewbit.kernels.triton_linear import Tiling
from fewbit.modules.embedding import Embedding
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import QTensor, Quantized, Transform
from fewbit.quant.reference import decode, encode, linear
from fewbit.quant.spec import Format, spec

CPU = torch.device("cpu")
LACKING = triton_linear.triton_runtime.lacking(CPU)
pytestmark = pytest.mark.skipif(LACKING is not None or torch.cuda.is_available(), reason=str(LACKING))
TAKEN = [name for name, f in FORMATS.items() if lacking(f.weight) is None]
TILES = (Tiling(16, 16, 64, 4), Tiling(32, 16, 64, 4))
ONE = Tiling(16, 32, 256, 4)  # all of a small weight: the interpreter takes as long for a tile, however large


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, held in (("TILES", TILES), ("EXACT", TILES), ("DECODE", Tiling(0, 16, 64, 4)), ("FEW", 32)):
        monkeypatch.setattr(triton_linear, name, held)
    triton_linear.cut.cache_clear()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    triton_linear.cut.cache_clear()


def weight(name: str, n: int = 20, k: int = 256) -> Quantized:
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(len(name))) / k**0.5
    return Quantized(Format(FORMATS[name].weight), encode(values, FORMATS[name].weight))


def rows(m: int, k: int = 256, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)


def near(got: Tensor, x: Tensor, q: Quantized, bias: Tensor | None = None) -> None:
    """Within what rounding each weight, and the result, to the dtype of x can do."""
    exact = decode(q.weight).double()
    want, size = x.double() @ exact.T, x.double().abs() @ exact.abs().T
    want = want if bias is None else want + bias.double()
    step = torch.finfo(x.dtype).eps
    assert got.dtype == x.dtype
    assert bool(((got.double() - want).abs() <= step * (want.abs() + 4 * size)).all()), (
        (got.double() - want).abs().max()
    )


def test_takes_all_but_runs() -> None:
    left = {name for name, f in FORMATS.items() if f.weight.element.kind == "run"}
    assert set(TAKEN) == set(FORMATS) - left
    assert "not iq2_xxs" in str(lacking(FORMATS["iq2_xxs"].weight))


@pytest.mark.parametrize("name", TAKEN)
def test_decodes_as_the_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_linear, "DECODE", ONE)
    got = triton_linear.decode_rows(coded(weight(name)), torch.empty(20, 256))
    torch.testing.assert_close(got, decode(weight(name).weight), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", TAKEN[::3])
def test_equals_the_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for tiles in ("TILES", "EXACT"):
        monkeypatch.setattr(triton_linear, tiles, (ONE,))
    for m, dtype in ((1, torch.float32), (16, torch.float16)):
        x = rows(m, dtype=dtype)
        near(triton_linear.run_linear(x, coded(weight(name))), x, weight(name))


def test_rows_by_index() -> None:
    held = coded(weight("q4_k"))
    got = triton_linear.decode_rows(held, torch.empty(3, 256), index=torch.tensor([19, 0, 7]))
    assert torch.equal(got, triton_linear.decode_rows(held, torch.empty(20, 256))[[19, 0, 7]])
    outside = triton_linear.decode_rows(held, torch.empty(2, 256), index=torch.tensor([20, -1]))
    assert bool(outside.isnan().all())


@pytest.mark.parametrize("name", ["q6_k", "nf4-dq", "fp8-block-a16"])
def test_embedding(name: str) -> None:
    layer = Embedding(torch.nn.Embedding(20, 256), weight(name).weight, torch.float16)
    ids = torch.tensor([[3, 19, 3], [0, 7, 3]])
    found, places = layer.on_device(ids)
    torch.testing.assert_close(found[places], layer(ids), rtol=1e-3, atol=1e-6)
    for found, places in (layer.each(ids), layer.distinct(ids)):
        assert torch.equal(found[places], layer(ids))


@pytest.mark.parametrize("name", ["int4-g32", "q6_k", "nvfp4-a16"])
def test_many_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_linear, "DECODED", 16 * 256 * 4)
    bias = torch.randn(20)
    near(triton_linear.run_linear(rows(40), coded(weight(name)), bias), rows(40), weight(name), bias)


@pytest.mark.parametrize(("n", "k"), [(5, 96), (17, 72), (33, 33)])
@pytest.mark.parametrize("name", ["int3-channel", "fp8-block-a16", "int6-g32-asym", "nf4"])
def test_sizes_that_no_tile_divides(name: str, n: int, k: int) -> None:
    q = weight(name, n, k)
    for m in (18, 35):
        near(triton_linear.run_linear(rows(m, k), coded(q)), rows(m, k), q)


@pytest.mark.parametrize("name", ["q4_k", "int5-g64"])
@pytest.mark.parametrize("share", [1, 3])
def test_shares_of_k(name: str, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_linear, "processors", lambda device: share)
    bias = torch.randn(20)
    assert triton_linear.cut(20, 256, TILES[0], CPU)[0] == min(2 * share, 4)
    near(triton_linear.run_linear(rows(2), coded(weight(name)), bias), rows(2), weight(name), bias)


def test_rows_do_not_know_of_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_linear, "EXACT", (ONE,))
    held, x = coded(weight("q4_k")), rows(3)
    alone = torch.cat([triton_linear.run_linear(row[None], held) for row in x])
    assert torch.equal(triton_linear.run_linear(x, held), alone)


@pytest.mark.parametrize("name", ["int4-g128-a8fp8", "int8-channel-a8", "nvfp4", "fp8-block"])
def test_activations_and_transforms(name: str) -> None:
    permute = Transform("permute", {"index": torch.randperm(256)})
    branch = Transform("low_rank", {"a": torch.randn(4, 256) / 16, "b": torch.randn(20, 4) / 2})
    q = Quantized(FORMATS[name], weight(name).weight, transforms=(permute, branch))
    x, bias = rows(3).view(1, 3, 256), torch.randn(20)
    got = triton_linear.run_linear(x, coded(q), bias)
    torch.testing.assert_close(got, linear(x, q, bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ["mul", "div"])
def test_reciprocal_scales(op: str) -> None:
    """A global scale that divides, as some checkpoints store it."""
    form = FORMATS["nvfp4-a16"].weight
    form = replace(form, scales=(form.scales[0], replace(form.scales[1], op=op)))
    q = Quantized(Format(form), encode(torch.randn(20, 256) / 16, form))
    near(triton_linear.run_linear(rows(2), coded(q)), rows(2), q)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of the interpreter
def test_all_codes_of_all_elements() -> None:
    """Every bit pattern, those that are no number too."""
    for name in ("int8-tensor", "fp8-tensor-a16", "fp8-e5m2-tensor", "fp8-tensor-240", "mxfp8-a16"):
        form = FORMATS[name].weight
        q = encode(torch.randn(2, 256), form)
        codes = torch.arange(256, dtype=torch.uint8).expand(2, 256).contiguous()
        q = QTensor(form, q.shape, q.planes | {"codes": codes})
        got = triton_linear.decode_rows(coded(Quantized(Format(form), q)), torch.empty(2, 256))
        torch.testing.assert_close(got, decode(q), equal_nan=True, rtol=1e-6, atol=0)


def test_planes_are_not_copied() -> None:
    for name in ("q4_k", "int3-g128-asym", "nvfp4"):
        q = weight(name)
        held = coded(q)
        theirs = {p.data_ptr() for p in q.weight.planes.values()}
        assert {d[0].data_ptr() for d in (held.codes, *held.scales, *held.zeros)} == theirs


def test_no_rows_and_gradients() -> None:
    held: Coded = coded(weight("int4-g32"))
    assert triton_linear.run_linear(rows(0), held).shape == (0, 20)
    x = rows(2).requires_grad_()
    triton_linear.run_linear(x, held).sum().backward()
    torch.testing.assert_close(x.grad, decode(weight("int4-g32").weight).sum(0).expand(2, 256))


def test_a_weight_without_scales() -> None:
    form = spec(FORMATS["fp8-tensor"].weight.element)
    q = Quantized(Format(form), encode(torch.randn(20, 256), form))
    near(triton_linear.run_linear(rows(2), coded(q)), rows(2), q)
