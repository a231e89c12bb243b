"""The packed kernel against the oracle, over every format that it takes; its loops without matrix units by name."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fewbit.kernels import compiled, packed
from fewbit.kernels.compiled import library
from fewbit.kernels.dense import dense_linear
from fewbit.kernels.select import REFERENCE, select
from fewbit.modules.linear import Linear, Options
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import Quantized, stack
from fewbit.quant.reference import decode, encode, linear
from fewbit.quant.spec import Format

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(isinstance(library("packed"), str), reason=str(library("packed")))
TAKEN = [name for name, f in FORMATS.items() if packed.supports(f, CPU, torch.bfloat16) is None]
ROWS = (1, 2, 3, 8, 13, packed.FEW, packed.FEW + 1, 40)


def weight(name: str, n: int = 73, k: int = 512) -> Quantized:
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(len(name))) / k**0.5
    return Quantized(FORMATS[name], encode(values, FORMATS[name].weight))


def test_takes_what_people_serve() -> None:
    common = {"int4-g128", "int4-g32-asym", "int8-channel", "int8-channel-a8", "fp8-channel", "fp8-block", "nvfp4",
              "mxfp4", "mxfp8", "q4_0", "q4_k", "q6_k", "q8_0", "iq4_nl", "int4-g128-a8fp8",
              "int3-g128", "int2-g64-asym", "q2_k", "q3_k", "q5_k", "mxfp6-e3m2"}  # fmt: skip
    assert common <= set(TAKEN), common - set(TAKEN)
    assert packed.supports(FORMATS["nf4"], CPU, torch.bfloat16) is not None


# More columns than the first cache holds of eight, four and two rows of x, so that rows of W meet a part of them at a
# time; the last part is a short one.
LONG = {
    "int4-g128": 8448, "int4-g32": 8256, "int4-g32-asym": 8256, "int8-channel": 8256, "int8-g32-asym": 8256,
    "int3-g128": 8448, "int2-g64-asym": 8256, "fp8-channel": 8256, "mxfp8": 8256, "q4_k": 8448, "q6_k": 8448,
}  # fmt: skip


@pytest.mark.parametrize(("name", "k"), [*((name, 512) for name in TAKEN), *LONG.items()])
def test_equals_the_oracle(name: str, k: int) -> None:
    q = weight(name, k=k)
    form = Format(q.format.weight)  # activations apart: a rounding that falls on the other side is no kernel's fault
    held = packed.prepack_linear(Quantized(form, q.weight))
    exact = decode(q.weight).double()
    for rows in ROWS:
        x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).bfloat16()
        want = x.double() @ exact.T
        size = x.double().abs() @ exact.abs().T  # what errors are relative to
        got = (packed.few if rows <= packed.FEW else packed.many)(x, held).double()
        # one rounding of the result; of many rows, one of each weight too
        bound = 2.0**-8 * want.abs() + (2.0**-17 if rows <= packed.FEW else 2.0**-8) * size
        assert bool(((got - want).abs() <= bound).all()), (rows, float(((got - want).abs() / size).max()))


@pytest.mark.parametrize("name", ["int4-g128", "int8-channel-a8", "fp8-block", "nvfp4"])
def test_activations_are_rounded_as_declared(name: str) -> None:
    q = weight(name)
    x, bias = torch.randn(5, 512).bfloat16(), torch.randn(73).bfloat16()
    want = linear(x.float(), Quantized(q.format, q.weight), bias.float())
    got = packed.run_linear(x, packed.prepack_linear(q), bias).float()
    assert float((got - want).norm() / want.norm()) < 0.01


@pytest.mark.parametrize(("name", "k"), [*((name, 512) for name in TAKEN[::7]), *LONG.items()])
def test_rows_do_not_know_of_one_another(name: str, k: int) -> None:
    """Batch invariance of few rows, to the bit."""
    q = packed.prepack_linear(weight(name, k=k))
    x = torch.randn(packed.FEW - 1, k).bfloat16()  # eight, four, two and one at a time
    alone = torch.cat([packed.few(row[None], q) for row in x])
    assert torch.equal(packed.few(x, q), alone)


@pytest.mark.parametrize("name", ["int4-g32", "nvfp4", "q4_k"])
def test_experts(name: str) -> None:
    each = [weight(name, 64 + 0 * e) for e in range(3)]
    whole = Quantized(FORMATS[name], stack([q.weight for q in each]))
    held = packed.prepack_experts(whole)
    x, rows = torch.randn(6, 512).bfloat16(), [2, 0, 4]
    want = torch.cat([packed.run_linear(part, packed.prepack_linear(q))
                      for part, q, n in zip(x.split(rows), each, rows, strict=True) if n])  # fmt: skip
    assert torch.equal(packed.run_experts(x, held, rows), want)


def test_columns_that_are_no_whole_runs_are_left() -> None:
    form = FORMATS["int8-channel"]
    q = Quantized(form, encode(torch.randn(8, 72), form.weight))
    stacked = Quantized(form, stack([q.weight, q.weight]))
    assert packed.prepack_linear(q) is None and packed.prepack_experts(stacked) is None
    host = Linear.of(nn.Linear(72, 8, bias=False, device="meta"))
    host.bind((q,), Options(dtype=torch.bfloat16))
    x = torch.randn(3, 72).bfloat16()
    torch.testing.assert_close(host(x), linear(x, q))
    assert [part.kernel.name for part in host.parts] == [REFERENCE]


def test_codes_are_not_copied() -> None:
    for name in TAKEN:
        q = weight(name)
        held = packed.prepack_linear(q)
        assert isinstance(held, packed.Packed) and held.held[0] is not None
        assert held.held[0].data_ptr() == q.weight.planes["codes"].data_ptr(), name


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("k", [64, 576, 40, 8256])
def test_dense(rows: int, k: int) -> None:
    x, w, bias = torch.randn(rows, k).bfloat16(), torch.randn(72, k).bfloat16(), torch.randn(72).bfloat16()
    want = x.double() @ w.double().T
    size = x.double().abs() @ w.double().abs().T
    for got in (dense_linear(x, w), packed.dense_rows(x, w) if k % packed.RUN == 0 else None):
        if got is not None:
            assert bool(((got.double() - want).abs() <= 2.0**-8 * want.abs() + 2.0**-17 * size).all())
    if k % packed.RUN == 0:
        alone = torch.cat([packed.dense_rows(row[None], w) for row in x])
        assert torch.equal(packed.dense_rows(x, w), alone)
    biased = dense_linear(x[None], w, bias)[0]
    assert bool(((biased.double() - want - bias.double()).abs() <= 2.0**-7 * (want.abs() + bias.double().abs())).all())


BROKEN = [
    ({"which": lambda name: None}, "apt install g\\+\\+"),
    ({"which": lambda name: "/bin/false" if name else None}, "/bin/false could not compile packed.cpp"),
]


@pytest.mark.parametrize(("broken", "words"), BROKEN, ids=["none", "broken"])
def test_without_a_compiler_the_reference_runs(
    broken: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled.shutil, "which", broken["which"])
    compiled.library.cache_clear()
    try:
        kernel, refused = select("linear", FORMATS["int4-g128"], CPU, torch.bfloat16)
        assert kernel.name == "reference" and re.search(words, dict(refused)["packed"])
    finally:
        compiled.library.cache_clear()
