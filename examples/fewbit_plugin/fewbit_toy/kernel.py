"""One kernel: keeps the weight decoded, so it is as fast as a dense linear and as large."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from fewbit.kernels.registry import FLOATS, Kernel
from fewbit.quant.qtensor import Quantized
from fewbit.quant.reference import decode
from fewbit.quant.spec import Format
from fewbit_toy.formats import INT4_G16


def supports(form: Format, device: torch.device, dtype: torch.dtype) -> str | None:
    if form.act or form.transforms:
        return "takes weight-only formats without transforms"
    return None if form.weight.stored == INT4_G16.weight.stored else "takes int4-g16 only"


def prepack(q: Quantized) -> Tensor:
    return decode(q.weight)


def run(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(x, packed.to(x.dtype), bias)


KERNEL = Kernel("toy-unpacked", "linear", ("cpu",), FLOATS, supports, prepack, run, note="an example: decoded once")
