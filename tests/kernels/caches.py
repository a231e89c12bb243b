"""Formats of the cache as tests name them, and measured scales for them."""

import torch

from fewbit.kernels.cache import Rounding
from fewbit.quant.kv import HEAD, KV_FORMATS, MEASURED, measured, whole
from fewbit.quant.qtensor import Planes
from fewbit.quant.spec import QuantSpec

STATIC = {name: measured(KV_FORMATS[name]) for name in MEASURED}  # int8 is measured here, "int8" itself is not
STATIC |= {name + HEAD: measured(KV_FORMATS[name], True) for name in MEASURED}
FORMATS: dict[str, QuantSpec] = {**KV_FORMATS, **{f"{name} measured": spec for name, spec in STATIC.items()}}
WHOLE = [name for name, spec in FORMATS.items() if whole(spec)]


def scales(spec: QuantSpec, heads: int, one: float) -> Planes:
    """One for all, or one for each head."""
    if spec.dynamic:
        return {}
    if spec.scales[0].block == (0, 0):
        return {"scale0": torch.tensor([[one]])}
    return {"scale0": (one * 2.0 ** torch.arange(heads)).view(heads, 1, 1)}


def rounding(name: str, heads: int, even: bool = False) -> Rounding:
    """Keys up to 4 and values up to 6 are held, others are cut off; even: scales that are powers of two."""
    spec = FORMATS[name]
    top = spec.element.max
    return spec, scales(spec, heads, 2.0**-5 if even else 4 / top), scales(spec, heads, 2.0**-4 if even else 6 / top)
