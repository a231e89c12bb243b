"""Canonical planes -> what humming-kernels reads, exactly: a scale that its type cannot hold is never rounded here
unless the layout says so; what does not fit at all is None, and left to the next kernel.

Rows and columns are padded with zero bytes to the tile of its kernels. Sums of float16 could leave its range before a
row's scale meets them, so a power of two of the whole tensor goes first.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewbit.kernels.humming_layout import INPUTS, PLAIN, Layout
from fewbit.quant import elements
from fewbit.quant.pack import pack
from fewbit.quant.qtensor import QTensor, scale_codes
from fewbit.quant.reference import scale_values, zero_values

TILE = 128
STORED = {"float8e4m3": torch.float8_e4m3fn, "float8e8m0": torch.float8_e8m0fnu, "float32": torch.float32,
          "bfloat16": torch.bfloat16, "float16": torch.float16}  # fmt: skip
LOST = 2.0**-8  # of a scale that is rounded: more than that is no rounding but the end of a type's range
FAR = 2.0**15  # codes away from a group without a scale, which is a zero alone


@dataclass(frozen=True, slots=True)
class Scales:
    """plane: [N, groups], [N / 128, K / 128] or [1]; outer: [1] float32 of the tensor; columns: [N] float32, applied
    to the product by ourselves. kind: where humming applies `plane`."""

    kind: str
    plane: Tensor
    outer: Tensor | None = None
    columns: Tensor | None = None


def padded(size: int, group: int = 0) -> int:
    tile = max(TILE, group)
    return -(-size // tile) * tile


def fits(w: QTensor, how: Layout) -> bool:
    """Whether rows are whole words and groups, as humming's loads want."""
    n, k = w.shape
    return n % 8 == 0 and k % 32 == 0 and (how.kind != "group" or k % how.group == 0)


def words(w: QTensor, how: Layout) -> Tensor:
    """-> [N, K * bits / 32] int32, padded; two's complement as offset binary."""
    n, k = w.shape
    plane = w.planes["codes"]
    if w.spec.element.kind == "int" and w.spec.element.signed:
        plane = flipped(plane, how.bits)
    sides = (0, (padded(k, how.group) - k) * how.bits // 8, 0, padded(n) - n)
    return pad(plane, sides).contiguous().view(torch.int32)


def flipped(plane: Tensor, bits: int) -> Tensor:
    """The highest bit of every code the other way; eight codes fill `bits` bytes."""
    mask = pack(torch.full((1, 8), 1 << (bits - 1), dtype=torch.uint8), bits).to(plane.device)
    return (plane.view(*plane.shape[:-1], -1, bits) ^ mask).view(plane.shape)


def scales(w: QTensor, how: Layout, dtype: torch.dtype) -> Scales | None:
    """-> the scales, or None where they do not fit."""
    if how.kind in ("tensor", "channel"):
        return _of_rows(w, how, dtype)
    n, k = w.shape
    outer, columns = _outer(w) if how.outer else (None, None)
    stored = scale_codes(w, "scale0") if how.outer or how.scale.startswith("float8") else _of_groups(w, how)
    plane = stored.view(STORED[how.scale]) if stored.dtype == torch.uint8 else _cast(stored.float(), STORED[how.scale])
    if plane is None or (how.scale == "float8e8m0" and dtype == torch.float16 and _range(stored) > 29):
        return None  # float16 holds powers of two from -14 to 15
    rows = padded(n) // TILE if how.kind == "block" else padded(n)
    return Scales(how.kind, _room(plane, rows, padded(k, how.group) // how.group), outer, columns)


def _of_groups(w: QTensor, how: Layout) -> Tensor:
    """One plane, whatever it is stored as."""
    value = scale_values(w)
    return torch.where(value == 0, _zero_values(w).abs() / FAR, value) if how.zeros == "values" else value


def _zero_values(w: QTensor) -> Tensor:
    found = zero_values(w)
    assert found is not None
    return found


def _outer(w: QTensor) -> tuple[Tensor, Tensor | None]:
    """-> the largest of the outer scales, and what those of rows are of it."""
    value = elements.decode(scale_codes(w, "scale1"), w.spec.scales[1].element).view(-1)
    value = 1 / value if w.spec.scales[1].op == "div" else value
    if len(value) == 1:
        return value, None
    outer = value.abs().max().view(1)
    return outer, torch.where(outer > 0, value / outer, 0.0)


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor | None:
    out = values.to(dtype)
    return out if bool(((out.float() - values).abs() <= LOST * values.abs()).all()) else None


def _range(exponents: Tensor) -> int:
    low, high = torch.aminmax(exponents)
    return int(high) - int(low)


def _room(plane: Tensor, rows: int, columns: int) -> Tensor:
    """[R, C] -> [rows, columns], what is new in zero bytes."""
    out = torch.zeros(rows, columns * plane.element_size(), dtype=torch.uint8, device=plane.device)
    out[: plane.shape[0], : plane.shape[1] * plane.element_size()] = plane.contiguous().view(torch.uint8)
    return out.view(plane.dtype)


def _of_rows(w: QTensor, how: Layout, dtype: torch.dtype) -> Scales:
    """Scales of rows: by humming where its 16-bit type holds them exactly, else by ourselves in float32."""
    value = scale_values(w)
    if how.kind == "tensor" and not how.zeros:
        return Scales("tensor", value.reshape(1).contiguous())
    rows = value.expand(w.shape[0], 1) if value.shape[-2] == 1 else value
    first = _power(value) if dtype == torch.float16 else torch.ones(1, device=value.device)
    outer = first if dtype == torch.float16 else None
    narrow = (rows / first).to(dtype)
    if torch.equal(narrow.float() * first, rows):
        return Scales("channel", _room(narrow, padded(w.shape[0]), 1), outer)
    columns = (rows / first).view(-1).contiguous()
    if how.zeros:
        ones = torch.ones(w.shape[0], 1, dtype=dtype, device=value.device)
        return Scales("channel", _room(ones, padded(w.shape[0]), 1), outer, columns)
    return Scales("tensor", first, None, columns)


def _power(values: Tensor) -> Tensor:
    """-> [1]: a power of two 2**6 below the largest: rows of a 64th of it then overflow no sooner than they must."""
    top = values.abs().max().clamp(min=2.0**-100)
    return torch.exp2(torch.floor(torch.log2(top)) - 6).view(1)


def zeros(w: QTensor, how: Layout, found: Scales) -> Tensor | None:
    """-> [N, groups] as scales are, or [N * bits / 32, groups] int32, packed along the rows; None where one is outside
    of that type or of the codes."""
    n, k = w.shape
    value = _zero_values(w).expand(n, -1)
    if how.zeros == "values":
        plane = found.plane[:n, : value.shape[-1]].float()
        zero = torch.where(plane == 0, 0.0, value / plane).to(found.plane.dtype)
        return _room(zero, *found.plane.shape) if bool(zero.isfinite().all()) else None
    value = value + (2 ** (how.bits - 1) if w.spec.element.signed else 0)
    if bool(((value < 0) | (value >= 2**how.bits)).any()):
        return None
    groups = padded(k, how.group) // how.group if how.kind == "group" else 1
    codes = _room(value.to(torch.uint8), padded(n), groups)
    packed = pack(codes.mT.contiguous(), how.bits)
    return packed.view(-1).view(torch.int32).view(groups, -1).mT.contiguous()


def config(w: QTensor, how: Layout, found: Scales, dtype: torch.dtype) -> Any:
    """humming's LayerConfig: what its kernels are compiled for."""
    from humming.config import LayerConfig

    n, k = w.shape
    wide, deep = padded(n), padded(k, how.group)
    group = how.group if found.kind in ("group", "block") else 0
    own = PLAIN[dtype]
    columns, kind = (how.input.columns, _mode(how)) if how.input else (0, "none")
    return LayerConfig(
        shape_n=wide, shape_k=deep, pad_shape_n=wide - n, pad_shape_k=deep - k,
        a_dtype=INPUTS[how.input.element] if how.input else own, b_dtype=how.codes, c_dtype=own,
        bs_dtype=how.scale if group else {"tensor": "float32", "channel": own}[found.kind],
        input_quant_mode=kind, input_scale_group_size=columns,
        weight_scale_group_size=group, weight_scale_group_size_n=TILE if found.kind == "block" else 0,
        weight_scale_type=found.kind, weight_scale_2_type="none" if found.outer is None else "tensor",
        has_zero_point=bool(how.zeros), is_fp_zero_point=how.zeros == "values",
    )  # fmt: skip


def _mode(how: Layout) -> str:
    assert how.input is not None
    return "static_tensor" if how.input.given else "dynamic_group" if how.input.columns else "dynamic_token"


def tensors(w: QTensor, how: Layout, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor], Tensor | None] | None:
    """-> (config, humming's tensors, scales of rows that are ours to apply), or None where something does not fit."""
    from humming.transform import prepare_fp16_e8m0_scale, transform_humming_tensors

    found = scales(w, how, dtype) if fits(w, how) else None
    zero = zeros(w, how, found) if found and how.zeros else None
    if found is None or (how.zeros and zero is None):
        return None
    held = {"weight": words(w, how), "weight_scale": found.plane, "zero_point": zero, "weight_scale_2": found.outer}
    held = {name: tensor for name, tensor in held.items() if tensor is not None}
    made = config(w, how, found, dtype)
    made, held = prepare_fp16_e8m0_scale(made, held)
    return made, transform_humming_tensors(made, held, already_padded=True), found.columns


def with_bias(config: Any) -> Any:
    return replace(config, has_bias=True)


def bias_of(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """-> [padded N] in humming's order."""
    from humming.transform import transform_humming_bias

    ordered: Tensor = transform_humming_bias(pad(bias.detach().to(dtype), (0, padded(len(bias)) - len(bias))))
    return ordered
