"""Linears through matrix units, or for whole numbers through vectors: against an oracle in float64 over formats and
rows, to the bit against themselves.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewbit.kernels import packed, tiles
from fewbit.quant.elements import F16
from fewbit.quant.formats import FORMATS, TOKEN_INT8
from fewbit.quant.qtensor import Quantized
from fewbit.quant.reference import decode, encode, fake_quant
from fewbit.quant.spec import Format, Scale

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(tiles.vectors() is None, reason="neither AMX nor AVX512-VNNI here")
tiled = pytest.mark.skipif(tiles.native() is None, reason="no matrix units (AMX) here")
TAKEN = [name for name, f in FORMATS.items() if packed.supports(f, CPU, torch.bfloat16) is None]
WHOLE = [name for name in TAKEN if packed.slow(FORMATS[name].weight) is None]
ROWS = (1, 3, 16, 17, 40, 70)
SHAPES = [(72, 512), (300, 192)]  # rows that are no whole tiles, columns that are no whole block


def held(name: str, n: int, k: int, act: bool = False) -> packed.Packed | None:
    """A weight on its own, or with inputs in int8; None where the format does not hold the shape."""
    form = Format(FORMATS[name].weight, TOKEN_INT8 if act else None)
    if any(k % (scale.block[1] or 1) for scale in (*form.weight.scales, *form.weight.zeros)):
        return None
    found = packed.prepack_linear(Quantized(form, encode(draw(n, k) / k**0.5, form.weight)))
    assert isinstance(found, packed.Packed)
    return found


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def near(got: Tensor, x: Tensor, w: Tensor, weights: float) -> bool:
    """Within one rounding of the result to bfloat16, and of each weight by `weights` of it."""
    want, size = x @ w.T, x.abs() @ w.abs().T
    return bool(((got.double() - want).abs() <= 2.0**-8 * want.abs() + weights * size).all())


@tiled
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TAKEN)
def test_weights_alone(name: str, shape: tuple[int, int]) -> None:
    if (q := held(name, *shape)) is None:
        return
    exact = decode(q.source.weight).double()
    for rows in ROWS:
        x = draw(rows, shape[1]).bfloat16()
        assert near(tiles.values(x, q.weight), x.double(), exact, 2.0**-9 + 2.0**-14), rows


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", WHOLE)
def test_inputs_in_int8(name: str, shape: tuple[int, int]) -> None:
    """With the same codes sums are exact: what is left is scaling in float32."""
    if (q := held(name, *shape, act=True)) is None:
        return
    exact = decode(q.source.weight).double()
    for rows in ROWS:
        x = draw(rows, shape[1]).bfloat16()
        rounded = fake_quant(x.float(), TOKEN_INT8).double()
        assert near(packed.run_linear(x, q), rounded, exact, 2.0**-20), rows


def test_what_is_whole() -> None:
    assert {"int8-channel-a8", "int4-g128", "int4-channel-asym", "int8-g64-asym"} <= set(WHOLE)
    assert {"int4-g32", "q4_0", "q4_1", "q8_0", "q5_0", "q6_k", "int2-g32"} <= set(WHOLE)
    assert not {"nvfp4", "fp8-channel", "iq4_nl"} & set(WHOLE)
    long = replace(FORMATS["int4-g128"].weight, scales=(Scale(F16, (1, 1024)),))
    assert "longer than the 512 columns" in str(packed.slow(long))
    q = held("int8-channel-a8", 72, 512, act=True)
    assert q is not None and q.rule == "range"
    assert (plain := held("int8-channel", 72, 512)) is not None and plain.rule is None


@pytest.mark.parametrize("rule", ["amax", "range"])
def test_rows_of_zeros_and_of_nan(rule: str) -> None:
    q = held("int8-channel-asym", 40, 128, act=True)
    assert q is not None
    x = draw(4, 128).bfloat16()
    x[1], x[2, 7] = 0, torch.nan
    y = tiles.codes(x, q.weight, rule)
    assert bool((y[1] == 0).all()) and bool(y[2].isnan().all()) and bool(y[[0, 3]].isfinite().all())


@tiled
def test_dense() -> None:
    for rows in (*ROWS, 600):
        for n, k in ((100, 96), (520, 320)):
            x, w = draw(rows, k).bfloat16(), draw(n, k).bfloat16()
            assert near(tiles.dense(x, w), x.double(), w.double(), 2.0**-17), (rows, n, k)


@pytest.mark.parametrize("shape", [*SHAPES, (40, 2304)])
@pytest.mark.parametrize("name", WHOLE)
def test_few_rows_in_int8_as_among_many(name: str, shape: tuple[int, int]) -> None:
    """To the bit: few rows take a loop of their own."""
    if (q := held(name, *shape, act=True)) is None:
        return
    x = draw(60, shape[1]).bfloat16()
    whole = packed.run_linear(x, q)
    for start, stop in ((0, 1), (1, 3), (5, 8), (20, 24), (30, 35), (52, 60)):
        assert torch.equal(packed.run_linear(x[start:stop].contiguous(), q), whole[start:stop]), (start, stop)


def runs() -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    w = draw(100, 512).bfloat16()
    names = [("int4-g128", False), ("int8-channel", False), ("nvfp4", False), ("q6_k", False), ("fp8-block", False),
             ("int4-g128", True), ("int8-channel", True)]  # fmt: skip
    each = [(f"{name} {act}", held(name, 100, 512, act)) for name, act in names if act or tiles.native() is not None]
    found = [(n, lambda x, q=q: packed.run_linear(x, q)) for n, q in each]
    return found if tiles.native() is None else [("dense", lambda x: tiles.dense(x, w)), *found]


def test_rows_do_not_know_of_one_another() -> None:
    """To the bit, for any count of rows; torch's own use of the units in between does no harm."""
    x = draw(600, 512).bfloat16()
    for name, run in runs():
        whole = run(x)
        torch.nn.functional.linear(x, x)
        for start, stop in ((0, 1), (1, 3), (5, 21), (100, 133), (511, 600)):
            assert torch.equal(run(x[start:stop].contiguous()), whole[start:stop]), (name, start)
