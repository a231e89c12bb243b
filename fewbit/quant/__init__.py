"""The algebra of low-bit formats: pure data and pure functions, no model, no file, no device."""

from fewbit.quant.elements import ELEMENTS, Element
from fewbit.quant.formats import FORMATS
from fewbit.quant.plan import Plan
from fewbit.quant.qtensor import QTensor, Quantized, bits_per_weight, slice
from fewbit.quant.reference import decode, encode, fake_quant, linear
from fewbit.quant.spec import Format, QuantSpec, Scale

__all__ = [
    "ELEMENTS",
    "FORMATS",
    "Element",
    "Format",
    "Plan",
    "QTensor",
    "QuantSpec",
    "Quantized",
    "Scale",
    "bits_per_weight",
    "decode",
    "encode",
    "fake_quant",
    "linear",
    "slice",
]
