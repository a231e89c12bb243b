"""FP8 inputs times FP8 weights through cuBLASLt (torch._scaled_mm), for one scale per tensor or per row of the weight.

Its kernels with one scale for each operand are faster at any number of rows than those with scales of rows (28672 x
4096 on an H200: 30 against 46 us for 1 row, 657 against 828 for 4096). So what varies by row multiplies afterwards:
the sums are rounded to bfloat16 twice, each time by at most 2**-8 of the value, and cannot leave its range. Few rows
are left to `few`, which rounds once and takes three quarters of the time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.kernels import few, triton_runtime
from fewbit.kernels.input_rounding import Rounding, Unscaled, rounding
from fewbit.kernels.torch_dequant import low_rank
from fewbit.quant.elements import E4M3, F32
from fewbit.quant.qtensor import Quantized
from fewbit.quant.reference import transformed
from fewbit.quant.spec import Format

STEP = 16  # rows and columns come in as many: cuBLASLt reads 16 bytes at a time
FAST = False  # sums of fewer bits: no faster here within the noise of measuring (8192**3: 1329 against 1349 TFLOP/s)


@dataclass(frozen=True, slots=True)
class Scaled:
    """A weight as cuBLASLt takes it: the canonical codes, seen as float8."""

    source: Quantized
    codes: Tensor  # [K, N], a view
    whole: Tensor  # [1] float32: the scale of the weight, or 1
    columns: Tensor | None  # [N] float32: the scales of its rows
    rounding: Rounding
    given: Tensor | None  # [1] float32: the stored scale of the input
    one: Tensor


def supports(form: Format, device: torch.device, dtype: torch.dtype) -> str | None:
    weight, scales = form.weight, form.weight.scales
    shapes = [(scale.element, scale.block, scale.op) for scale in scales]
    if weight.element is not E4M3 or weight.zeros or shapes not in ([(F32, (0, 0), "mul")], [(F32, (1, 0), "mul")]):
        return "takes e4m3 weights with one float32 scale per tensor or row"
    how = rounding(form.act) if form.act else "takes inputs rounded to e4m3"
    if isinstance(how, str):
        return how
    if how.element != "e4m3" or how.columns or how.powers:
        return "takes inputs rounded to e4m3 with one scale or one per token"
    return triton_runtime.lacking(device)


def rounds(q: Quantized) -> Rounding | None:
    """How inputs are rounded; None for what is left: sizes that cuBLASLt does not take."""
    if any(size % STEP for size in q.weight.shape) or q.format.act is None:
        return None
    how = rounding(q.format.act)
    assert isinstance(how, Rounding), how
    return how


def prepack_linear(q: Quantized) -> Scaled | None:
    """Nothing is moved."""
    w, how = q.weight, rounds(q)
    if how is None:
        return None
    scale, one = w.planes["scale0"], torch.ones(1, device=w.device)
    by_rows = scale.shape[-2] > 1
    given = q.act["scale0"].view(1) if how.given else None
    held = w.planes["codes"].view(torch.float8_e4m3fn).t()
    return Scaled(q, held, one if by_rows else scale.view(1), scale.reshape(-1) if by_rows else None, how, given, one)


def run_linear(x: Tensor, held: Scaled, bias: Tensor | None = None) -> Tensor:
    """x: [..., K] bfloat16 -> [..., N]."""
    q = held.source
    x = transformed(x, q.transforms)
    n = q.weight.shape[-2]
    y = _product(x, held, bias) if x.numel() else x.new_empty(0, n)
    return low_rank(x, q.transforms, y.view(*x.shape[:-1], n))


def run_unscaled(x: Tensor, held: Scaled) -> Unscaled:
    """The same, but for the scales that would take a launch of their own."""
    if held.source.transforms or not x.numel():
        return run_linear(x, held), None, None
    y, rows, columns = _sums(x, held, None)
    return y.view(*x.shape[:-1], -1), rows, columns


def _product(x: Tensor, held: Scaled, bias: Tensor | None) -> Tensor:
    """x: [..., K] -> [M, N]."""
    from fewbit.kernels.triton_scale import scale_

    y, rows, columns = _sums(x, held, bias)
    return y if rows is None and columns is None else scale_(y, rows, columns, bias)


def _sums(x: Tensor, held: Scaled, bias: Tensor | None) -> Unscaled:
    """-> [M, N], and the scales of rows and columns that are still to be applied; the bias too, where there are any."""
    from fewbit.kernels.triton_quantize import input_codes

    given, scale = input_codes(x, held.rounding, held.given)
    rows = held.codes.t()
    if few.takes(given, rows, bias, x.dtype):
        y = few.rows(given, rows, x.dtype, scale, held.whole if held.columns is None else held.columns, bias)
        return y, None, None
    alone = scale.numel() == 1
    whole = scale.view(1) if alone else held.one
    after = not alone or held.columns is not None
    y = torch._scaled_mm(given, held.codes, whole, held.whole, None if after else bias, None, x.dtype, FAST)
    return y, None if alone else scale, held.columns
