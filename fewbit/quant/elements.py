"""Number types as a table: every kind of value that one stored code can stand for.

An element is data. Codes of up to 8 bits travel as uint8 bit patterns (integers in two's complement); `encode` rounds
to nearest, ties to the even code, and saturates; `decode` is a table of 2**bits values. Wider elements are torch's own
types and are their own codes. A *run* element stands for blocks that only decode together (vector codebooks, trits).
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["int", "float", "exponent", "table", "native", "run"]


@dataclass(frozen=True, slots=True)
class Element:
    """One number type; `bits` per value, which is a fraction for runs."""

    name: str
    kind: Kind
    bits: float
    signed: bool = True
    exponent: int = 0  # bits, for floats
    mantissa: int = 0
    bias: int = 0
    top: float = 0.0  # largest finite magnitude a float may take
    table: tuple[float, ...] = field(default=(), repr=False)
    run: int = 1  # values that decode together
    note: str = ""

    @property
    def max(self) -> float:
        """Largest value."""
        if self.kind == "int":
            return float(2 ** (int(self.bits) - self.signed) - 1)
        return max(self.table) if self.kind == "table" else self.top

    @property
    def min(self) -> float:
        """Smallest value."""
        if self.kind == "int":
            return float(-(2 ** (int(self.bits) - 1))) if self.signed else 0.0
        if self.kind == "table":
            return min(self.table)
        return -self.top if self.signed else 0.0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that unpacked codes travel in."""
        return NATIVE[self.name] if self.kind == "native" else torch.uint8


NATIVE = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def _int(bits: int, signed: bool) -> Element:
    return Element(f"{'int' if signed else 'uint'}{bits}", "int", bits, signed=signed)


def _float(name: str, exponent: int, mantissa: int, bias: int, top: float, note: str = "") -> Element:
    return Element(name, "float", 1 + exponent + mantissa, True, exponent, mantissa, bias, top, note=note)


def _table(name: str, values: tuple[float, ...], note: str) -> Element:
    return Element(name, "table", (len(values) - 1).bit_length(), table=values, note=note)


F32 = Element("f32", "native", 32, top=3.4028234663852886e38)
F16 = Element("f16", "native", 16, top=65504.0)
BF16 = Element("bf16", "native", 16, top=3.3895313892515355e38)
INT1, INT2, INT3, INT4, INT5, INT6, INT7, INT8 = (_int(bits, True) for bits in range(1, 9))
UINT1, UINT2, UINT3, UINT4, UINT5, UINT6, UINT7, UINT8 = (_int(bits, False) for bits in range(1, 9))
E4M3 = _float("e4m3", 4, 3, 7, 448.0, "no infinity; NaN is 0x7f and 0xff")
E4M3_240 = _float("e4m3-240", 4, 3, 7, 240.0, "Gaudi 2: the all-ones exponent is not a number")
E4M3_FNUZ = _float("e4m3-fnuz", 4, 3, 8, 240.0, "AMD: 0x80 is NaN, there is no -0; same bits mean half of e4m3")
E5M2 = _float("e5m2", 5, 2, 15, 57344.0, "has infinities, which encode never makes")
E2M1 = _float("e2m1", 2, 1, 1, 6.0)
E3M2 = _float("e3m2", 3, 2, 3, 28.0)
E2M3 = _float("e2m3", 2, 3, 1, 7.5)
E8M0 = Element(
    "e8m0", "exponent", 8, signed=False, exponent=8, bias=127, top=2.0**127, note="2**(code-127); 255 is NaN"
)
NF4 = _table(
    "nf4",
    (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    "quantiles of the normal distribution (QLoRA)",
)  # fmt: skip
FP4 = _table(
    "fp4",
    (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
     -0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25),
    "the sign-magnitude 4-bit type of bitsandbytes",
)  # fmt: skip
IQ4 = _table(
    "iq4",
    (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0),
    "the non-linear codebook of ggml's IQ4",
)  # fmt: skip


def _single(x: Tensor | float) -> Tensor:
    """Rounded to float32, held in float64."""
    return torch.as_tensor(x, dtype=torch.float64).float().double()


def _dynamic_table() -> tuple[float, ...]:
    """bitsandbytes' 8-bit dynamic map: a sign, a run of zeros for the decade, a linear fraction; all in float32."""
    low, values = _single(0.1), [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for zeros in range(7):
        steps = 2**zeros
        i = torch.arange(steps + 1, dtype=torch.float64)
        step = _single(1 - low) / steps
        edges = _single(torch.where(i < (steps + 1) // 2, low + step * i, 1 - step * (steps - i)))
        means = _single((edges[1:] + edges[:-1]) / 2) * _single(10.0 ** (zeros - 6))
        values += [_single(means), _single(-means)]
    return tuple(torch.cat(values).sort().values.tolist())


DYNAMIC8 = _table("dynamic8", _dynamic_table(), "bitsandbytes' signed dynamic 8-bit map, used on block scales")

ELEMENTS: dict[str, Element] = {
    e.name: e
    for e in (
        F32, F16, BF16,
        INT1, INT2, INT3, INT4, INT5, INT6, INT7, INT8,
        UINT1, UINT2, UINT3, UINT4, UINT5, UINT6, UINT7, UINT8,
        E4M3, E4M3_240, E4M3_FNUZ, E5M2, E2M1, E3M2, E2M3, E8M0,
        NF4, FP4, IQ4, DYNAMIC8,
    )
}  # fmt: skip


@cache
def values(element: Element) -> Tensor:
    """-> [2**bits] float32: what every code means, NaN where it means nothing."""
    codes = torch.arange(2 ** int(element.bits))
    if element.kind == "int":
        return decode(codes.to(torch.uint8), element)
    if element.kind == "table":
        return torch.tensor(element.table, dtype=torch.float32)
    if element.kind == "exponent":
        return torch.exp2(codes.double() - element.bias).float().masked_fill(codes == 255, torch.nan)
    return _float_values(element, codes)


@cache
def table(element: Element, device: torch.device) -> Tensor:
    """`values` on a device, where they are brought once: bringing them waits, and cannot stand in a CUDA graph."""
    return values(element).to(device)


def _float_values(element: Element, codes: Tensor) -> Tensor:
    fraction = codes & (2**element.mantissa - 1)
    power = (codes >> element.mantissa) & (2**element.exponent - 1)
    normal = (1 + fraction / 2**element.mantissa) * torch.exp2(power.double() - element.bias)
    subnormal = fraction / 2**element.mantissa * 2.0 ** (1 - element.bias)
    magnitude = torch.where(power > 0, normal, subnormal)
    negative = (codes >> (element.exponent + element.mantissa)) == 1
    out = torch.where(negative, -magnitude, magnitude)
    out = out.masked_fill(magnitude > element.top, torch.nan)
    if element.name == "e4m3-fnuz":
        out[0x80] = torch.nan
    if element.name == "e5m2":
        out[[0x7C, 0xFC]] = torch.tensor([torch.inf, -torch.inf], dtype=out.dtype)
    return out.float()


def decode(codes: Tensor, element: Element) -> Tensor:
    """codes: any shape, uint8 (or the native dtype) -> float32 values of the same shape."""
    if element.kind == "native":
        return codes.float()
    if element.kind == "int":
        half = 2 ** (int(element.bits) - 1)
        return ((codes ^ half) - half).view(torch.int8).float() if element.signed else codes.float()
    if element.name == "e5m2":
        return codes.view(torch.float8_e5m2).float()  # its cast is vectorized; that of e4m3 is slower than the table
    return table(element, codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)


def encode(x: Tensor, element: Element) -> Tensor:
    """x: any shape, finite float -> the nearest codes, ties to even, saturating; x is left as it was."""
    if element.kind == "native":
        top = element.top
        return x.clamp(-top, top).to(element.dtype)
    if element.kind == "int":
        whole: Tensor = x.round().clamp_(element.min, element.max).to(torch.int16) & (2 ** int(element.bits) - 1)
        return whole.to(torch.uint8)
    if element.name == "e4m3":
        return x.float().clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
    if element.kind == "float":
        return _encode_float(x.float(), element)
    if element.kind == "exponent":
        return _encode_exponent(x.float())
    return _encode_table(x.float(), element)


def _encode_float(x: Tensor, element: Element) -> Tensor:
    """Round the bits of a float32 to `mantissa` bits: an integer add for normals, a float add for subnormals."""
    m, bias = element.mantissa, element.bias
    magnitude = x.abs().clamp_(max=element.top)
    bits = magnitude.view(torch.int32)
    normal = (bits + (((bits >> (23 - m)) & 1) + (2 ** (22 - m) - 1)) >> (23 - m)) - ((127 - bias) << m)
    # adding c leaves |x| in units of the smallest subnormal in c's low bits, rounded to even by the adder itself
    c = torch.full((), 2.0 ** (1 - bias - m + 23), device=x.device)
    subnormal = (magnitude + c).view(torch.int32) - c.view(torch.int32)
    codes = torch.where(magnitude < 2.0 ** (1 - bias), subnormal, normal)
    negative = (x.view(torch.int32) < 0).int() << (element.exponent + m)
    if element.name == "e4m3-fnuz":
        negative = negative * (codes > 0)
    return (codes | negative).to(torch.uint8)


def _encode_exponent(x: Tensor) -> Tensor:
    """Nearest power of two, halfway upwards; zero and below take the smallest, overflow the largest."""
    bits = x.clamp(min=0).view(torch.int32)
    codes = ((bits + (1 << 22)) >> 23).clamp_(0, 254)
    return codes.masked_fill_(bits < 0x600000, 0).to(torch.uint8)  # 2**-127 is subnormal: its midpoint lies lower


@cache
def _sorted_table(element: Element) -> tuple[Tensor, Tensor]:
    """-> midpoints between neighbouring values, and the codes in order of value."""
    ordered, codes = torch.tensor(element.table, dtype=torch.float64).sort(stable=True)
    return ((ordered[1:] + ordered[:-1]) / 2).float(), codes.to(torch.uint8)


def _encode_table(x: Tensor, element: Element) -> Tensor:
    middles, codes = _sorted_table(element)
    return codes.to(x.device)[torch.bucketize(x.contiguous(), middles.to(x.device))]
