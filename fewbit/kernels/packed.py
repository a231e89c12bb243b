"""Linears on a CPU that read codes of 2 to 8 bits as they are stored, x and y in bfloat16.

Where the processor has matrix units they take all rows (tiles.py). Elsewhere it is packed.cpp. Few rows: codes become
bfloat16 in registers and meet x there, so a step takes as long as reading the codes. Many rows: runs of rows of the
weight are decoded into cache and multiplied by torch.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from fewbit.kernels import tiles
from fewbit.kernels.compiled import call, library
from fewbit.kernels.rounded import rounded
from fewbit.kernels.torch_dequant import expert, low_rank
from fewbit.quant import elements
from fewbit.quant.blocks import regrid
from fewbit.quant.elements import Element
from fewbit.quant.qtensor import QTensor, Quantized, scale_codes
from fewbit.quant.reference import scale_values, transformed, zero_values
from fewbit.quant.spec import Format, QuantSpec

RUN = 64  # columns of a run
FEW_DENSE = 8  # rows up to which our loop beats torch where there is nothing to decode
FEW = 16  # rows up to which codes are decoded in registers
DECODED = 1 << 20  # values decoded at a time for many rows: 2 MB, the size of a core's cache
TABLE32, TABLE64, TABLE128, INT8, UINT8 = range(5)  # packed.cpp's kinds
NARROW = (torch.float32, torch.float16, torch.bfloat16)


class Weight(ctypes.Structure):
    """packed.cpp's Weight."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero", "outer", "table")),
        *((name, ctypes.c_int64) for name in ("n", "k", "group")),
        *((name, ctypes.c_int32) for name in ("bits", "kind", "narrow", "zeros", "turned")),
    )


@dataclass(slots=True)
class Packed:
    """A weight in the kernel's layout; `held` keeps alive what `weight` points to."""

    source: Quantized
    weight: Weight
    held: tuple[Tensor | None, ...] = field(repr=False)
    rule: str | None = None  # of x where it is rounded to int8 and multiplied as such


def supports(format: Format, device: torch.device, dtype: torch.dtype) -> str | None:
    spec = format.weight
    if kind_of(spec.element) is None:
        return f"takes codes of 2 to 8 bits whose values are exact in bfloat16, not {spec.element.name}"
    blocks = [scale.block for scale in (*spec.scales, *spec.zeros)]
    if not blocks or any(rows < 0 or (cols not in (0, 16, 32) and cols % RUN) for rows, cols in blocks):
        return "takes scales of 16, 32 or a multiple of 64 columns, or of rows"
    found = library("packed")
    return found if isinstance(found, str) else None


def kind_of(element: Element) -> int | None:
    """How packed.cpp looks the codes of an element up, or None."""
    if element.kind in ("run", "native", "exponent") or not 2 <= element.bits <= 8:
        return None
    if element.kind == "int" and element.bits == 8:
        return INT8 if element.signed else UINT8
    values = elements.values(element)
    known = values[values.isfinite()]
    if not torch.equal(known.bfloat16().float(), known):
        return None
    if len(values) <= 128:
        return TABLE32 if len(values) <= 32 else TABLE64 if len(values) == 64 else TABLE128
    mirrored = torch.equal(values[:128].nan_to_num(), -values[128:].nan_to_num())
    return TABLE128 if mirrored else None


def prepack_linear(q: Quantized) -> Packed | None:
    """Codes stay where they are. Columns that do not come in whole runs are left."""
    w = q.weight
    n, k = w.shape
    group = min(scale.block[1] or k for scale in (*w.spec.scales, *w.spec.zeros))
    if k % RUN or k % group:
        return None
    inner, outer = scales(w, group)
    zero, mode = zeros(w, group, outer)
    narrow = narrowest(inner, zero)
    act = q.format.act
    rule = act.rule if act and tiles.whole(act) and slow(w.spec) is None else None
    apart = rule is not None and tiles.native() is None  # then nobody but dots.h reads scales and zeros
    laid = turned if apart else Tensor.contiguous
    planes = [None if t is None else laid(t.to(NARROW[narrow])) for t in (inner, zero)]
    values = torch.zeros(256)
    values[: 2 ** int(w.spec.element.bits)] = elements.values(w.spec.element)
    held = (w.planes["codes"].contiguous(), *planes, outer.float().contiguous(), values.bfloat16())
    pointers = [None if t is None else t.data_ptr() for t in held]
    kind = kind_of(w.spec.element)
    weight = Weight(*pointers, n, k, group, int(w.spec.element.bits), kind, narrow, mode, apart)
    return Packed(q, weight, held, rule)


def turned(plane: Tensor) -> Tensor:
    """[N, G] -> [N / 16, G, 16]: what 16 rows of W meet at once lies together."""
    rows = pad(plane, (0, 0, 0, -len(plane) % 16))
    return rows.view(-1, 16, plane.shape[1]).transpose(1, 2).contiguous()


def slow(spec: QuantSpec) -> str | None:
    """Why int8 inputs are no faster with such weights; None where they are."""
    if spec.element.kind != "int" or kind_of(spec.element) is None:
        return f"{spec.element.name} is no whole number of 2 to 8 bits"
    columns = [scale.block[1] for scale in (*spec.scales, *spec.zeros)]
    least = tiles.LEAST_GROUP * (2 if spec.element.bits == 4 else 1)
    if any(cols % least for cols in columns):
        return f"its groups are shorter than the {least} columns that int8 units take at once"
    if any(cols > tiles.LONGEST for cols in columns):
        return f"its groups are longer than the {tiles.LONGEST} columns whose sums int8 units hold"
    return None if tiles.vectors() is not None else "this processor has neither AMX nor AVX512-VNNI beside AVX512-BF16"


def spread(values: Tensor, w: QTensor, block: tuple[int, int], group: int) -> Tensor:
    """One value per block -> one per row and group: [N, K / group]."""
    n, k = w.shape
    return regrid(values, (n, k), block, (1, group)).expand(n, k // group)


def scales(w: QTensor, group: int) -> tuple[Tensor, Tensor]:
    """-> the multiplier of each group [N, K / group], and one more of each row [N]: apart, the first may be narrow."""
    chain = w.spec.scales
    if len(chain) == 2 and chain[1].block[1] == 0 and chain[0].op == chain[1].op == "mul":
        inner = elements.decode(scale_codes(w, "scale0"), chain[0].element)
        outer = elements.decode(scale_codes(w, "scale1"), chain[1].element)
        rows = regrid(outer, w.shape, chain[1].block, (1, 0)).expand(w.shape[0], 1)[:, 0]
        return spread(inner, w, chain[0].block, group), rows
    return spread(scale_values(w), w, chain[0].block if chain else (0, 0), group), torch.ones(w.shape[0])


def zeros(w: QTensor, group: int, outer: Tensor) -> tuple[Tensor | None, int]:
    """-> the offset of each group, before the row's own multiplier, and its units: 1 codes, 2 values."""
    found = zero_values(w)
    if found is None:
        return None, 0
    found = spread(found, w, w.spec.zeros[0].block, group)
    return (found, 1) if w.spec.zeros_in_codes else (found / outer[:, None], 2)


def narrowest(*planes: Tensor | None) -> int:
    """Index of the first 16-bit type that holds all values exactly, else of float32."""
    for i in (1, 2):
        if all(p is None or torch.equal(p.to(NARROW[i]).float(), p) for p in planes):
            return i
    return 0


def run_linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x: [..., K] bfloat16 -> [..., N]."""
    q = packed.source
    x = transformed(x, q.transforms)
    seen = rounded(x, q.format.act, q.act) if q.format.act and packed.rule is None else x
    y = times(seen.reshape(-1, seen.shape[-1]).contiguous(), packed).view(*x.shape[:-1], -1)
    return low_rank(x, q.transforms, y if bias is None else y.add_(bias))


def times(x: Tensor, packed: Packed) -> Tensor:
    """x: [M, K] -> [M, N]."""
    if packed.rule is not None:
        return tiles.codes(x, packed.weight, packed.rule)
    if tiles.native() is not None:
        return tiles.values(x, packed.weight)
    return few(x, packed) if len(x) <= FEW else many(x, packed)


def few(x: Tensor, packed: Packed) -> Tensor:
    w = packed.weight
    y = x.new_empty(len(x), w.n)
    call(_native().packed_times, ctypes.byref(w), x.data_ptr(), len(x), y.data_ptr())
    return y


def many(x: Tensor, packed: Packed) -> Tensor:
    w = packed.weight
    y = x.new_empty(len(x), w.n)
    step = max(1, DECODED // w.k)
    buffer = x.new_empty(min(step, w.n), w.k)
    for start in range(0, w.n, step):
        stop = min(start + step, w.n)
        call(_native().packed_decode, ctypes.byref(w), start, stop, buffer.data_ptr())
        y[:, start:stop] = linear(x, buffer[: stop - start])
    return y


def dense(rows: int, k: int) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Which loop takes them: all rows where there are matrix units, so that none depends on how many there are."""
    if tiles.native() is not None:
        return tiles.dense if k % tiles.STEP == 0 else None
    return dense_rows if rows <= FEW_DENSE and k % RUN == 0 and _native() is not None else None


def dense_rows(x: Tensor, weight: Tensor) -> Tensor:
    y = x.new_empty(len(x), len(weight))
    call(_native().packed_dense, weight.data_ptr(), *weight.shape, x.data_ptr(), len(x), y.data_ptr())
    return y


@cache
def _native() -> Any:
    """The library, or None."""
    found = library("packed")
    if isinstance(found, str):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.packed_times.argtypes = [pointer, pointer, number, pointer]
    found.packed_decode.argtypes = [pointer, number, number, pointer]
    found.packed_dense.argtypes = [pointer, number, number, pointer, number, pointer]
    found.packed_times.restype = found.packed_decode.restype = found.packed_dense.restype = None
    return found


def prepack_experts(q: Quantized) -> tuple[Packed, ...] | None:
    made = [prepack_linear(expert(q, e)) for e in range(q.weight.shape[0])]
    whole = tuple(one for one in made if one is not None)
    return whole if len(whole) == len(made) else None


def run_experts(x: Tensor, packed: Sequence[Packed], rows: Sequence[int]) -> Tensor:
    """x: [S, K] sorted by expert, rows: how many belong to each -> [S, N]."""
    runs = zip(x.split(list(rows)), packed, strict=True)
    found = [run_linear(run, one) for run, one in runs if len(run)]
    n = packed[0].source.weight.shape[-2]
    return torch.cat(found) if found else x.new_empty(0, n)
