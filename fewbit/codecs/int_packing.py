"""Integer codes in 32-bit words: what GPTQ, AWQ and AutoRound files share.

Words are little-endian, so words seen as bytes are the dense bit stream of quant.pack, for every width. Codes on disk
are offset binary, u = q + 2**(b-1); a symmetric tensor is two's complement here, which is the same with one bit turned.
"""

from typing import Any

import torch
from torch import Tensor

from fewbit.codecs.codec import refuse, with_scale_element
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.elements import ELEMENTS, F16
from fewbit.quant.pack import pack, unpack
from fewbit.quant.qtensor import QTensor, Quantized, codes, grid, load, make, store
from fewbit.quant.spec import FLAT, Format, QuantSpec, spec

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# width of a code -> planes of (width, lowest bit), in the order that gptq_p stores them
PLANES = {
    2: ((2, 0),), 3: ((2, 0), (1, 2)), 4: ((4, 0),), 5: ((4, 0), (1, 4)), 6: ((4, 0), (2, 4)),
    7: ((4, 0), (2, 4), (1, 6)), 8: ((8, 0),),
}  # fmt: skip


def int_format(bits: int, group: int, sym: bool, transforms: tuple[str, ...] = ()) -> Format:
    """Integers of `bits` in groups along K (-1: one group a row)."""
    block = (1, max(group, 0))
    if sym:
        return Format(spec(ELEMENTS[f"int{bits}"], (F16, *block), rule="range"), None, transforms)
    unsigned = ELEMENTS[f"uint{bits}"]
    return Format(spec(unsigned, (F16, *block), zeros=((unsigned, *block),), rule="range"), None, transforms)


def fit_int(dialect: str, form: Format, widths: tuple[int, ...], asym: bool | None = None) -> Format:
    """The format with its codes in `widths`, groups along K and F16 scales. asym: always, never, or as it is."""
    weight = form.weight
    if form.act is not None:
        raise refuse(dialect, "quantized activations", "it stores weights only")
    if weight.element.kind != "int" or int(weight.element.bits) not in widths:
        raise refuse(dialect, f"{weight.element.name} codes", f"it holds integers of {_list(widths)} bits")
    if len(weight.scales) != 1 or len(weight.zeros) > 1:
        raise refuse(dialect, "scales of scales", "it holds one scale and one zero per group")
    rows, cols = weight.scales[0].block
    if rows == FLAT:
        raise refuse(dialect, "blocks over the flattened matrix", "its groups lie along K")
    zeros = bool(weight.zeros) or not weight.element.signed
    return int_format(int(weight.element.bits), cols or -1, not (zeros if asym is None else asym), form.transforms)


def integer(config: dict[str, Any], key: str, default: int | None, allowed: tuple[int, ...] | None = None) -> int:
    """A whole number of a quantization config."""
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or (allowed is not None and value not in allowed):
        want = f"one of {_list(allowed)}" if allowed else "a whole number"
        raise CheckpointError(f"quantization_config.{key}: want {want}, found {value!r}")
    return value


def flag(config: dict[str, Any], key: str, default: bool) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"quantization_config.{key}: want true or false, found {value!r}")
    return value


def group_size(config: dict[str, Any], key: str = "group_size", default: int | None = None) -> int:
    """-1 (one group a row), or a positive number."""
    value = integer(config, key, default)
    if value != -1 and value < 1:
        raise CheckpointError(f"quantization_config.{key}: want -1 (whole rows) or a positive number, found {value}")
    return value


def as_bytes(words: Tensor) -> Tensor:
    """[..., w] int32 -> [..., 4 w] uint8."""
    return words.contiguous().view(torch.uint8)


def unpack_words(words: Tensor, bits: int, planar: bool = False) -> Tensor:
    """[..., w] int32 -> [..., w * 32 / bits] uint8, first value in the lowest bits."""
    if planar and len(PLANES[bits]) > 1:
        return _unpack_planes(words, bits)
    return unpack(as_bytes(words), bits, words.shape[-1] * 32 // bits)


def pack_words(values: Tensor, bits: int, planar: bool = False) -> Tensor:
    """The inverse: [..., n] uint8 -> [..., n * bits / 32] int32."""
    if values.shape[-1] * bits % 32 or (planar and values.shape[-1] % 32):
        step = 32 if planar or bits not in (2, 4, 8) else 32 // bits
        reason = f"{values.shape[-1]} is not a multiple of {step}"
        raise UnsupportedError(f"rows of {values.shape[-1]} codes do not fill 32-bit words", [reason])
    if planar and len(PLANES[bits]) > 1:
        return _pack_planes(values, bits)
    return pack(values, bits).contiguous().view(torch.int32)


def _unpack_planes(words: Tensor, bits: int) -> Tensor:
    blocks = words.reshape(*words.shape[:-1], -1, bits)  # 32 values: words of the low plane, then of higher ones
    total = torch.zeros(*blocks.shape[:-1], 32, dtype=torch.uint8, device=words.device)
    first = 0
    for width, low in PLANES[bits]:
        total |= unpack(as_bytes(blocks[..., first : first + width]), width, 32) << low
        first += width
    return total.flatten(-2)


def _pack_planes(values: Tensor, bits: int) -> Tensor:
    blocks = values.reshape(*values.shape[:-1], -1, 32)
    planes = [pack((blocks >> low) & (2**width - 1), width) for width, low in PLANES[bits]]
    return torch.cat(planes, -1).flatten(-2).contiguous().view(torch.int32)


def middle(bits: int) -> int:
    """The zero of a symmetric tensor."""
    return 1 << (bits - 1)


def flip(plane: Tensor, bits: int, cols: int) -> Tensor:
    """A packed plane, offset binary <-> two's complement."""
    turned = torch.full((cols,), middle(bits), dtype=torch.uint8, device=plane.device)
    return plane ^ pack(turned, bits)


def assemble(form: Format, plane: Tensor, scales: Tensor, zeros: Tensor | None, shape: tuple[int, int]) -> QTensor:
    """plane: offset-binary codes, packed along K; scales: [N, G]; zeros: [N, G] uint8, None = all in the middle."""
    weight = with_scale_element(form.weight, scales)
    bits = int(weight.element.bits)
    planes = {"scale0": scales.contiguous()}
    if weight.zeros:
        assert zeros is not None
        planes |= {"codes": plane, "zero0": store(zeros, weight.zeros[0].element)}
    else:
        if zeros is not None:
            check_middle(zeros, bits)
        planes["codes"] = flip(plane, bits, shape[1])
    return make(weight, shape, planes)


def check_middle(zeros: Tensor, bits: int) -> None:
    """A tensor that is declared symmetric has every zero at 2**(b-1)."""
    wrong = zeros != middle(bits)
    if not bool(wrong.any()):
        return
    first = int(zeros[wrong][0])
    shifted = {middle(bits) - 1: "too low", middle(bits) + 1: "too high"}.get(first)
    hint = f"; every zero is one {shifted}: the other checkpoint_format would fit" if shifted and wrong.all() else ""
    raise CheckpointError(
        f".qzeros: the config says symmetric, so every zero is {middle(bits)}; {int(wrong.sum())} of {zeros.numel()} "
        f"are not (the first is {first}){hint}"
    )


def matrix(dialect: str, q: Quantized) -> tuple[int, int]:
    """[N, K] of a tensor that is no stack of experts."""
    if len(q.weight.shape) != 2:
        raise refuse(dialect, f"a stack of experts {list(q.weight.shape)}", "it holds one matrix per expert")
    return q.weight.shape[0], q.weight.shape[1]


def offset_binary(q: QTensor) -> Tensor:
    """-> [N, K] uint8, whatever the sign of the element."""
    bits = int(q.spec.element.bits)
    return codes(q) ^ middle(bits) if q.spec.element.signed else codes(q)


def zeros_of(q: QTensor) -> Tensor:
    """-> [N, G] uint8: the zero of each group, also where the spec has none."""
    shape = grid(q.shape, q.spec.scales[0].block)
    if not q.spec.zeros:
        return torch.full(shape, middle(int(q.spec.element.bits)), dtype=torch.uint8, device=q.device)
    return load(q.planes["zero0"], q.spec.zeros[0].element, shape[1])


def one_group(weight: QuantSpec, k: int) -> int:
    """How many columns share a scale."""
    return weight.scales[0].block[1] or k


def _list(values: tuple[int, ...] | None) -> str:
    return ", ".join(str(v) for v in values or ())
