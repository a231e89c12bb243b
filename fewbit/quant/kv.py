"""KV_FORMATS: how keys and values can be cached, one row each.

To a spec, keys and values are [rows, D]: a row is one head of one token. A scale with the block (0, 0) that is not
dynamic is one of a layer, or of each of its heads; somebody must have measured it. All others are chosen as a token is
written, from that token alone: what a cache holds of one request never depends on who ran beside it.
"""

from dataclasses import replace

from fewbit.quant.elements import BF16, E2M1, E4M3, E4M3_240, E5M2, E8M0, F32, INT4, INT8
from fewbit.quant.spec import QuantSpec, Scale, spec

PLAIN = ("auto", "bfloat16", "float16", "float32")  # the other names that a cache can be asked for by
FP8 = spec(E4M3, (F32, 0, 0))
TOKEN_INT8 = spec(INT8, (F32, 1, 0), dynamic=1)

KV_FORMATS: dict[str, QuantSpec] = {
    "fp8": FP8,
    "fp8_e4m3": FP8,
    "fp8_e5m2": spec(E5M2, (F32, 0, 0)),
    "fp8_inc": spec(E4M3_240, (F32, 0, 0)),  # of Gaudi 2, whose e4m3 ends at 240
    "fp8_per_token_head": spec(E4M3, (F32, 1, 0), dynamic=1),
    "int8": TOKEN_INT8,
    "int8_per_token_head": TOKEN_INT8,
    "mxfp8": spec(E4M3, (E8M0, 1, 32), rule="mx-ceil", dynamic=1),
    "int4": spec(INT4, (BF16, 1, 32), dynamic=1),
    "mxfp4": spec(E2M1, (E8M0, 1, 32), rule="mx-ceil", dynamic=1),
    "nvfp4": spec(E2M1, (E4M3, 1, 16), (F32, 1, 0), dynamic=2),
}
HEAD = "-head"  # behind a name: measured scales are of each head
MEASURED = ("fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc", "int8")  # whose scales can be measured


def measured(s: QuantSpec, per_head: bool = False) -> QuantSpec:
    """The same codes with one measured scale in a layer, or in each of its heads."""
    return QuantSpec(s.element, (Scale(F32, (1, 0) if per_head else (0, 0)),))


def whole(s: QuantSpec) -> bool:
    """Codes of a byte each under one scale: measured, or of each row."""
    if len(s.scales) != 1 or s.zeros or s.element not in (E4M3, E4M3_240, E5M2, INT8) or s.scales[0].op != "mul":
        return False
    scale = s.scales[0]
    by_row = scale.block == (1, 0) and s.rule == "amax"  # a measured scale needs no rule
    return scale.element == F32 and (by_row if scale.dynamic else scale.block in ((0, 0), (1, 0)))


def by_row(s: QuantSpec) -> QuantSpec:
    """With scales of each row where they would be chosen over all that is written at once."""
    scales = tuple(replace(c, block=(1, 0)) if c.dynamic and c.block == (0, 0) else c for c in s.scales)
    return replace(s, scales=scales)
