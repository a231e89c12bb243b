"""A quantized weight as the Triton kernels read it: its canonical planes, each with how to find and decode an entry.

Nothing is copied or repacked. Chains of three planes, which only bitsandbytes' double quantization has, are the one
exception: they are multiplied out to one value for each block.
"""

from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from fewbit.quant import elements
from fewbit.quant.elements import Element
from fewbit.quant.qtensor import QTensor, Quantized
from fewbit.quant.reference import scale_values, zero_values
from fewbit.quant.spec import FLAT, QuantSpec, Scale

INT, FLOAT, EXPONENT, HALF, TABLE, DENSE = range(6)  # how triton_decode turns a code into its value
OPS = {"mul": 0, "div": 1, "add": 2}
BITWISE = {"e4m3", "e2m1", "e3m2", "e2m3"}  # codes above the largest finite one are NaN, or there are none


Data = tuple[Tensor, Tensor, int, int]  # entries, the values of all codes, strides along experts and rows


@dataclass(frozen=True)
class How:
    """How to read an entry of a plane, what block of the weight shares it, and how it joins its chain."""

    kind: int
    bits: int
    field: int = 0  # integers: half of a signed range; floats: bits of mantissa
    factor: float = 0.0  # floats: what makes up for the bias
    finite: int = 0  # floats: the largest code that is a number
    rows: int = 1
    cols: int = 1
    op: int = 0
    outer: "How | None" = None


@dataclass(frozen=True)
class Form:
    """What kernels are compiled for."""

    codes: How
    scales: How | None
    zeros: How | None
    zeros_first: bool  # zeros are in units of codes
    words: bool  # rows of codes are whole words of 32 bits
    span: int  # columns that share every scale and zero: a power of two


@dataclass(frozen=True, slots=True)
class Coded:
    """A weight [N, K], or E of them. Plain numbers have no form, and strides along experts, rows and columns."""

    n: int
    k: int
    codes: Data | tuple[Tensor, int, int, int]
    scales: tuple[Data, ...] = ()
    zeros: tuple[Data, ...] = ()
    form: Form | None = None
    source: Quantized | None = None


def lacking(spec: QuantSpec) -> str | None:
    """Why a weight cannot be read so."""
    if spec.element.kind in ("run", "native", "exponent") or not 1 <= spec.element.bits <= 8:
        return f"takes codes of 1 to 8 bits that stand each for a value, not {spec.element.name}"
    return None


def coded(q: Quantized) -> Coded:
    w = q.weight
    n, k = w.shape[-2:]
    element = w.spec.element
    data = w.planes["codes"].contiguous()
    words = k % 32 == 0 and data.data_ptr() % 4 == 0
    codes = _data(data.view(torch.int32) if words else data, element)
    scales, scale = _chain(w, "scale", w.spec.scales)
    zeros, zero = _chain(w, "zero", w.spec.zeros)
    form = Form(how(element), scale, zero, w.spec.zeros_in_codes, words, span(w.spec, k))
    return Coded(n, k, codes, scales, zeros, form, q)


def plain(weight: Tensor, transposed: bool) -> Coded:
    """weight: [E, N, K], or [E, K, N]."""
    w = weight.mT if transposed else weight
    return Coded(*w.shape[-2:], (w, *w.stride()))


def span(spec: QuantSpec, k: int) -> int:
    """The largest power of two, up to 32, whose runs of columns never cross a block."""
    shared = 32
    for rows, cols in (scale.block for scale in (*spec.scales, *spec.zeros)):
        shared = gcd(shared, cols, k) if rows == FLAT else gcd(shared, cols)
    return shared


def _chain(w: QTensor, stem: str, chain: tuple[Scale, ...]) -> tuple[tuple[Data, ...], How | None]:
    if len(chain) > 2:
        found = scale_values(w) if stem == "scale" else zero_values(w)
        assert found is not None
        block = Scale(elements.F32, chain[0].block)
        return (_data(found.contiguous(), elements.F32),), joined((block,))
    planes = (w.planes[f"{stem}{i}"].contiguous() for i in range(len(chain)))
    return tuple(_data(p, scale.element) for p, scale in zip(planes, chain, strict=True)), joined(chain)


def _data(plane: Tensor, element: Element) -> Data:
    rows, cols = plane.shape[-2:]
    return plane, elements.table(element, plane.device) if how(element).kind == TABLE else plane, rows * cols, cols


def joined(chain: tuple[Scale, ...]) -> How | None:
    if not chain:
        return None
    inner = chain[0]
    rows, cols = inner.block
    return replace(how(inner.element), rows=rows, cols=cols, op=OPS[inner.op], outer=joined(chain[1:]))


def how(element: Element) -> How:
    bits = int(element.bits)
    if element.kind == "native":
        return How(DENSE, bits)
    if element.kind == "int":
        return How(INT, bits, 2 ** (bits - 1) if element.signed else 0)
    if element.name in BITWISE:
        finite = int(elements.values(element)[: 2 ** (bits - 1)].isfinite().sum()) - 1
        return How(FLOAT, bits, element.mantissa, 2.0 ** (127 - element.bias), finite)
    return How(EXPONENT if element.kind == "exponent" else HALF if element.name == "e5m2" else TABLE, bits)
