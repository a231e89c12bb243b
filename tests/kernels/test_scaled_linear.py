"""FP8 through torch._scaled_mm against float64; its Triton steps by the interpreter where there is no GPU."""

import pytest
import torch

from fewbit.kernels import scaled_linear
from fewbit.kernels.triton_runtime import lacking
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import Quantized
from fewbit.quant.reference import decode, encode, fake_quant

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.skipif(lacking(DEVICE) is not None, reason=str(lacking(DEVICE))),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
NAMES = ("fp8-tensor", "fp8-channel", "fp8-tensor-static")


def weight(name: str, n: int, k: int) -> Quantized:
    form = FORMATS[name]
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * (0.1 + torch.rand(n, 1))
    act = {"scale0": torch.full((1, 1), 4.0 / 448)} if name.endswith("static") else {}
    q = Quantized(form, encode(values, form.weight), act)
    return Quantized(form, q.weight.to(DEVICE), {name: plane.to(DEVICE) for name, plane in act.items()})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_oracle(name: str, rows: int, bias: bool) -> None:
    q = weight(name, 48, 64)
    x = torch.randn(rows, 64, device=DEVICE).bfloat16()
    beside = torch.randn(48, device=DEVICE).bfloat16() if bias else None
    held = scaled_linear.prepack_linear(q)
    assert held is not None
    got = scaled_linear.run_linear(x[None], held, beside)
    want = fake_quant(x.float(), q.format.act, q.act).double() @ decode(q.weight).double().T
    want = want if beside is None else want + beside.double()
    bound = 2.0**-6 * want.abs() + 2.0**-7 * (1 if bias else 0) + 1e-3
    assert got.shape == (1, rows, 48)
    assert bool(((got[0].double() - want).abs() <= bound).all()), float((got[0].double() - want).abs().max())


def test_no_rows_and_odd_sizes() -> None:
    held = scaled_linear.prepack_linear(weight("fp8-channel", 48, 64))
    assert held is not None
    assert scaled_linear.run_linear(torch.zeros(0, 64, device=DEVICE).bfloat16(), held).shape == (0, 48)
    assert scaled_linear.prepack_linear(weight("fp8-channel", 40, 64)) is None
