"""FORMATS: one row each. A row is what the bytes mean and how `encode` chooses them; nothing else knows its name.

Other packages add rows through the entry-point group `fewbit.formats`: the name of the row = a Format.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points

from fewbit.errors import SpecError
from fewbit.quant.elements import (
    BF16,
    DYNAMIC8,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E4M3_240,
    E5M2,
    E8M0,
    ELEMENTS,
    F16,
    F32,
    FP4,
    INT8,
    NF4,
)
from fewbit.quant.ggml import GGML_SPECS
from fewbit.quant.spec import FLAT, Format, QuantSpec, Scale, spec

TOKEN_FP8 = spec(E4M3, (F32, 1, 0), dynamic=1)
TENSOR_FP8 = spec(E4M3, (F32, 0, 0))  # static: the checkpoint holds the scale
BLOCK_FP8 = spec(E4M3, (F32, 1, 128), dynamic=1)
TOKEN_INT8 = spec(INT8, (F32, 1, 0), rule="range", dynamic=1)
NVFP4 = spec(E2M1, (E4M3, 1, 16), (F32, 0, 0))
NVFP4_ACT = spec(E2M1, (E4M3, 1, 16), (F32, 0, 0), dynamic=2)
MX_ELEMENTS = {"mxfp4": E2M1, "mxfp6-e3m2": E3M2, "mxfp6-e2m3": E2M3, "mxfp8": E4M3, "mxfp8-e5m2": E5M2, "mxint8": INT8}
INT_BLOCKS = {"tensor": (0, 0), "channel": (1, 0), "g32": (1, 32), "g64": (1, 64), "g128": (1, 128)}


def _ints() -> dict[str, Format]:
    rows: dict[str, Format] = {}
    for bits in (8, 7, 6, 5, 4, 3, 2):
        signed, unsigned = ELEMENTS[f"int{bits}"], ELEMENTS[f"uint{bits}"]
        for label, block in INT_BLOCKS.items():
            rows[f"int{bits}-{label}"] = Format(spec(signed, (F16, *block), rule="range"))
            zeros = ((unsigned, *block),)
            rows[f"int{bits}-{label}-asym"] = Format(spec(unsigned, (F16, *block), zeros=zeros, rule="range"))
    return rows


def _mx() -> dict[str, Format]:
    rows: dict[str, Format] = {}
    for name, element in MX_ELEMENTS.items():
        weight = spec(element, (E8M0, 1, 32), rule="mx-ceil")
        act = spec(element, (E8M0, 1, 32), rule="mx-ceil", dynamic=1)
        rows |= {name: Format(weight, act), f"{name}-a16": Format(weight)}
    return rows


def _fp8() -> dict[str, Format]:
    tensor, channel = spec(E4M3, (F32, 0, 0)), spec(E4M3, (F32, 1, 0))
    block, row = spec(E4M3, (F32, 128, 128)), spec(E4M3, (F32, 1, 128))
    return {
        "fp8-tensor": Format(tensor, TOKEN_FP8),
        "fp8-tensor-static": Format(tensor, TENSOR_FP8),
        "fp8-tensor-a16": Format(tensor),
        "fp8-channel": Format(channel, TOKEN_FP8),
        "fp8-channel-a16": Format(channel),
        "fp8-block": Format(block, BLOCK_FP8),
        "fp8-block-a16": Format(block),
        "fp8-1x128": Format(row, BLOCK_FP8),
        "fp8-tensor-240": Format(spec(E4M3_240, (F32, 0, 0))),
        "fp8-e5m2-tensor": Format(spec(E5M2, (F32, 0, 0))),
    }


def _four_bit() -> dict[str, Format]:
    double = (Scale(DYNAMIC8, (FLAT, 64)), Scale(F32, (FLAT, 64 * 256)), Scale(F32, (0, 0), "add"))
    return {
        "nvfp4": Format(NVFP4, NVFP4_ACT),
        "nvfp4-a16": Format(NVFP4),
        "nvfp4-46": Format(replace(NVFP4, rule="four-over-six"), NVFP4_ACT),
        "nf4": Format(spec(NF4, (F32, FLAT, 64))),
        "nf4-dq": Format(QuantSpec(NF4, double, rule="double")),
        "fp4": Format(spec(FP4, (F32, FLAT, 64))),
        "int4-g128-a8fp8": Format(spec(ELEMENTS["int4"], (F16, 1, 128), rule="range"), TOKEN_FP8),
        "int8-channel-a8": Format(spec(INT8, (F32, 1, 0), rule="range"), TOKEN_INT8),
        "int8-tensor-a8": Format(spec(INT8, (F32, 0, 0), rule="range"), TOKEN_INT8),
    }


ROWS: dict[str, Format] = {
    **_ints(),
    **_fp8(),
    **_mx(),
    **_four_bit(),
    **{name: Format(weight) for name, weight in GGML_SPECS.items()},
}


class Formats(Mapping[str, Format]):
    """ROWS and those of other packages, which are imported when a row is first asked for."""

    def __getitem__(self, name: str) -> Format:
        return _more()[name] if name in origins() else ROWS[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*ROWS, *_more()))

    def __len__(self) -> int:
        return len(ROWS) + len(_more())


FORMATS: Mapping[str, Format] = Formats()


@cache
def origins() -> dict[str, str]:
    """Row -> the object that another package gives for it."""
    found: dict[str, str] = {}
    for point in entry_points(group="fewbit.formats"):
        first = "fewbit's own" if point.name in ROWS else found.get(point.name)
        if first:
            raise SpecError(f"two formats are called {point.name!r}: {first} and {point.value}")
        found[point.name] = point.value
    return found


@cache
def _more() -> dict[str, Format]:
    rows = {name: entry_points(group="fewbit.formats", name=name)[name].load() for name in origins()}
    for name, row in rows.items():
        if not isinstance(row, Format):
            raise SpecError(f"entry point {name!r} of fewbit.formats gives {type(row).__name__}, not a Format")
    return rows


def get(name: str) -> Format:
    """The row called `name`, or an error with the nearest names."""
    if name in FORMATS:
        return FORMATS[name]
    from difflib import get_close_matches

    near = [row for row in FORMATS if row.startswith(name)][:5] or get_close_matches(name, FORMATS, 5, 0.4)
    raise SpecError(f"format {name!r} is not known; near: {', '.join(near) or 'none'}; all: fewbit.formats()")


def _shape(s: QuantSpec | None) -> tuple[object, ...] | None:
    """What makes two specs the same format: elements and blocks, whatever float type the scales are kept in."""
    if s is None:
        return None
    floats = {F16: F32, BF16: F32}
    chain = tuple((floats.get(c.element, c.element), c.block) for c in (*s.scales, *s.zeros))
    return (s.element, len(s.scales), chain)


@cache
def _names() -> dict[object, str]:
    names: dict[object, str] = {}
    for name, row in FORMATS.items():
        names.setdefault((_shape(row.weight), _shape(row.act)), name)
    return names


def name_of(f: Format) -> str | None:
    """The row that a format read from a checkpoint is an instance of: scale types and reciprocals aside."""
    exact = _names().get((_shape(f.weight), _shape(f.act)))
    return exact or _names().get((_shape(f.weight), None))
