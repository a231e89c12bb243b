"""Integer codes in 32-bit words, as GPTQ, AWQ and AutoRound files hold them.

Words are little-endian, so words seen as bytes are the dense bit stream of quant.pack, for every width. Codes on disk
are offset binary, u = q + 2**(b-1); a symmetric tensor is two's complement here, which is the same with one bit turned.
GPTQ's layout packs codes along K and zeros along N; AWQ's packs both along N, eight columns to a word, out of order.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fewbit.codecs.codec import Tensors, refuse, want, with_scale_element
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.pack import pack, unpack
from fewbit.quant.qtensor import QTensor, Quantized, Transform, codes, grid, load, make, store
from fewbit.quant.spec import Format, QuantSpec

GPTQ_ENDINGS = (".qweight", ".qzeros", ".scales", ".g_idx")
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# width of a code -> planes of (width, lowest bit), in the order that gptq_p stores them
PLANES = {
    2: ((2, 0),), 3: ((2, 0), (1, 2)), 4: ((4, 0),), 5: ((4, 0), (1, 4)), 6: ((4, 0), (2, 4)),
    7: ((4, 0), (2, 4), (1, 6)), 8: ((8, 0),),
}  # fmt: skip
HINT = "gptq-v2 stores zeros as they are"
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # AWQ: the column of each nibble of a word
COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)  # and the nibble of each column


def read_gptq(form: Format, tensors: Mapping[str, Tensor], less: int, planar: bool = False) -> Quantized:
    """less: what was taken from each zero before it was stored."""
    bits = int(form.weight.element.bits)
    words = tuple(tensors[".qweight"].shape)
    if len(words) != 2 or words[0] * 32 % bits:
        raise CheckpointError(f".qweight: want [K * {bits} / 32, N], found {list(words)}")
    n, k = words[1], words[0] * 32 // bits
    groups = -(-k // one_group(form.weight, k))
    qweight = want(".qweight", tensors[".qweight"], torch.int32, words)
    scales = want(".scales", tensors[".scales"], FLOAT_DTYPES, (groups, n)).T
    stored = want(".qzeros", tensors[".qzeros"], torch.int32, (groups, n * bits // 32))
    zeros = ((unpack_words(stored, bits, planar) + less) & (2**bits - 1)).T
    index = _order(form, tensors, k)
    weight = assemble(form.weight, _plane(qweight.T, bits, planar, index), scales, zeros.contiguous(), (n, k))
    transforms = () if index is None else (Transform("permute", {"index": index}),)
    return Quantized(Format(weight.spec, None, tuple(t.kind for t in transforms)), weight, transforms=transforms)


def _plane(words: Tensor, bits: int, planar: bool, index: Tensor | None) -> Tensor:
    """[N, words] -> offset-binary codes, packed along K: the same bytes, unless something has to move."""
    if index is None and (not planar or len(PLANES[bits]) == 1):
        return as_bytes(words)
    values = unpack_words(words, bits, planar)
    return pack(values if index is None else values.index_select(-1, index.to(values.device)), bits)


def _order(form: Format, tensors: Mapping[str, Tensor], k: int) -> Tensor | None:
    """The columns sorted by group, or None where they are."""
    if ".g_idx" not in tensors:
        if form.transforms:
            raise CheckpointError(".g_idx is missing: desc_act is on, and it says which group each column belongs to")
        return None
    g_idx = want(".g_idx", tensors[".g_idx"], (torch.int32, torch.int64), (k,)).long()
    group = one_group(form.weight, k)
    regular = torch.arange(k) // group
    if torch.equal(g_idx, regular):
        return None
    groups = -(-k // group)
    outside = (g_idx < 0) | (g_idx >= groups)
    if bool(outside.any()):
        column = int(outside.nonzero()[0])
        raise CheckpointError(f".g_idx: column {column} is in group {int(g_idx[column])}; there are {groups} groups")
    index = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[index], regular):
        sizes = torch.bincount(g_idx, minlength=groups)
        odd = int((sizes != torch.bincount(regular)).nonzero()[0])
        raise CheckpointError(f".g_idx: group {odd} has {int(sizes[odd])} columns; group_size says {group}")
    return index


def write_gptq(q: Quantized, dialect: str, less: int, planar: bool = False) -> Tensors:
    """The inverse of read_gptq; g_idx is always there, because its readers ask for it."""
    _, k = matrix(dialect, q)
    bits = int(q.weight.spec.element.bits)
    values, zeros = offset_binary(q.weight), zeros_of(q.weight)
    if less and not zeros.is_meta and bool((zeros < less).any()):
        raise refuse(dialect, "a zero of 0", "it stores zeros less one, and readers differ on what that wraps to", HINT)
    g_idx = torch.arange(k, device=q.weight.device) // one_group(q.weight.spec, k)
    if q.transforms:
        back = q.transforms[0].tensors["index"].argsort()
        values, g_idx = values.index_select(-1, back), g_idx.index_select(0, back)
    return {
        ".qweight": pack_words(values, bits, planar).T.contiguous(),
        ".qzeros": pack_words((zeros.T - less) & (2**bits - 1), bits, planar),
        ".scales": q.weight.planes["scale0"].T.contiguous(),
        ".g_idx": g_idx.int(),
    }


def read_awq(form: Format, tensors: Mapping[str, Tensor]) -> Quantized:
    """AWQ's gemm layout; without zeros in the spec, stored ones must all be in the middle."""
    words = tuple(tensors[".qweight"].shape)
    if len(words) != 2:
        raise CheckpointError(f".qweight: want [K, N / 8], found {list(words)}")
    k, n = words[0], words[1] * 8
    groups = -(-k // one_group(form.weight, k))
    qweight = want(".qweight", tensors[".qweight"], torch.int32, words)
    scales = want(".scales", tensors[".scales"], FLOAT_DTYPES, (groups, n)).T
    zeros = None
    if ".qzeros" in tensors or form.weight.zeros:
        zeros = _columns(want(".qzeros", tensors[".qzeros"], torch.int32, (groups, n // 8))).T.contiguous()
    weight = assemble(form.weight, pack(_columns(qweight).T, 4), scales, zeros, (n, k))
    return Quantized(Format(weight.spec), weight)


def _columns(words: Tensor) -> Tensor:
    """[r, n / 8] int32 -> [r, n] uint8, columns in their order."""
    return unpack_words(words, 4).reshape(words.shape[0], -1, 8)[..., list(COLUMNS)].flatten(1)


def write_awq(q: Quantized, dialect: str) -> Tensors:
    """AWQ's gemm layout, with zeros also where the tensor is symmetric."""
    matrix(dialect, q)
    return {
        ".qweight": _awq_words(offset_binary(q.weight).T),
        ".qzeros": _awq_words(zeros_of(q.weight).T),
        ".scales": q.weight.planes["scale0"].T.contiguous(),
    }


def _awq_words(values: Tensor) -> Tensor:
    if values.shape[-1] % 8:
        raise UnsupportedError(f"{values.shape[-1]} rows do not fill words of eight codes", ["AWQ packs along rows"])
    return pack_words(values.reshape(values.shape[0], -1, 8)[..., list(NIBBLES)].flatten(1), 4)


def as_bytes(words: Tensor) -> Tensor:
    """[..., w] int32 -> [..., 4 w] uint8."""
    return _fresh(words).view(torch.uint8)


def _as_words(plane: Tensor) -> Tensor:
    """[..., 4 w] uint8 -> [..., w] int32."""
    return _fresh(plane).view(torch.int32)


def _fresh(x: Tensor) -> Tensor:
    """A copy, because contiguous() leaves the stride of an axis of 1 alone, and a view of other width minds it."""
    return x.clone(memory_format=torch.contiguous_format)


def unpack_words(words: Tensor, bits: int, planar: bool = False) -> Tensor:
    """[..., w] int32 -> [..., w * 32 / bits] uint8, first value in the lowest bits."""
    if planar and len(PLANES[bits]) > 1:
        return _unpack_planes(words, bits)
    return unpack(as_bytes(words), bits, words.shape[-1] * 32 // bits)


def pack_words(values: Tensor, bits: int, planar: bool = False) -> Tensor:
    """The inverse: [..., n] uint8 -> [..., n * bits / 32] int32."""
    step = 32 if planar or bits not in (2, 4, 8) else 32 // bits
    if values.shape[-1] % step:
        reason = f"{values.shape[-1]} is not a multiple of {step}"
        raise UnsupportedError(f"{values.shape[-1]} codes of {bits} bits do not fill 32-bit words", [reason])
    if planar and len(PLANES[bits]) > 1:
        return _pack_planes(values, bits)
    return _as_words(pack(values, bits))


def _unpack_planes(words: Tensor, bits: int) -> Tensor:
    if words.shape[-1] % bits:
        raise CheckpointError(f"{words.shape[-1]} words of {bits} planes: want a multiple of {bits} for every 32 codes")
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
    return _as_words(torch.cat(planes, -1).flatten(-2))


def assemble(weight: QuantSpec, plane: Tensor, scales: Tensor, zeros: Tensor | None, shape: tuple[int, int]) -> QTensor:
    """plane: offset-binary codes, packed along K; scales: [N, G]; zeros: [N, G] uint8, None = all in the middle."""
    weight = with_scale_element(weight, scales)
    bits = int(weight.element.bits)
    planes = {"scale0": scales.contiguous()}
    if weight.zeros:
        assert zeros is not None
        planes |= {"codes": plane, "zero0": store(zeros, weight.zeros[0].element)}
    else:
        if zeros is not None:
            _check_middle(zeros, bits)
        turned = torch.full((shape[1],), _middle(bits), dtype=torch.uint8, device=plane.device)
        planes["codes"] = plane ^ pack(turned, bits)
    return make(weight, shape, planes)


def _check_middle(zeros: Tensor, bits: int) -> None:
    """A tensor that is declared symmetric has every zero at 2**(b-1)."""
    middle = _middle(bits)
    wrong = zeros != middle
    if zeros.is_meta or not bool(wrong.any()):
        return
    first = int(zeros[wrong][0])
    all_off_by_one = bool((zeros == first).all()) and abs(first - middle) == 1
    hint = "; all are one off: another checkpoint_format (gptq, gptq_v2) would fit" if all_off_by_one else ""
    raise CheckpointError(
        f".qzeros: the config says symmetric, so every zero should be {middle}; {int(wrong.sum())} of {zeros.numel()} "
        f"are not (the first is {first}){hint}"
    )


def _middle(bits: int) -> int:
    """The zero of a symmetric tensor."""
    return 1 << (bits - 1)


def matrix(dialect: str, q: Quantized) -> tuple[int, int]:
    """[N, K] of a tensor that is no stack of experts."""
    if len(q.weight.shape) != 2:
        raise refuse(dialect, f"a stack of experts {list(q.weight.shape)}", "it holds one matrix per expert")
    return q.weight.shape[0], q.weight.shape[1]


def offset_binary(q: QTensor) -> Tensor:
    """-> [N, K] uint8, whatever the sign of the element."""
    bits = int(q.spec.element.bits)
    return codes(q) ^ _middle(bits) if q.spec.element.signed else codes(q)


def zeros_of(q: QTensor) -> Tensor:
    """-> [N, G] uint8: the zero of each group, also where the spec has none."""
    shape = grid(q.shape, q.spec.scales[0].block)
    if not q.spec.zeros:
        return torch.full(shape, _middle(int(q.spec.element.bits)), dtype=torch.uint8, device=q.device)
    return load(q.planes["zero0"], q.spec.zeros[0].element, shape[1])


def one_group(weight: QuantSpec, k: int) -> int:
    """How many columns share a scale."""
    return weight.scales[0].block[1] or k
