"""compressed-tensors, what llm-compressor writes: every layout of one module's tensors, told apart by what is there.

Packed integers are offset binary (code + 2**(b-1)) in a dense bit stream: our canonical planes with one bit of each
code flipped, padded to whole int32 words. NVFP4 keeps the reciprocal of its outer scale, so it divides.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewbit.codecs.codec import FLOATS, Codec, Located, Tensors, by_header, by_method
from fewbit.codecs.compressed_tensors_config import config, packing_of, plan, shared
from fewbit.codecs.compressed_tensors_extras import ORDER, SPARSE, expanded, in_order, rotation
from fewbit.codecs.compressed_tensors_fit import fit
from fewbit.codecs.planes import FP8, bound, matrix, need, placed, raw, static_act, stored_act, typed, weight_matrix
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.elements import Element
from fewbit.quant.pack import pack, packed_size, unpack
from fewbit.quant.qtensor import Planes, QTensor, Quantized, Transform, empty, grid, store
from fewbit.quant.reference import assign
from fewbit.quant.spec import Format, QuantSpec

NAME = "compressed-tensors"
PACKED, WEIGHT, SCALE, ZERO = ".weight_packed", ".weight", ".weight_scale", ".weight_zero_point"
SHAPE, OUTER = ".weight_shape", ".weight_global_scale"
INPUT, INPUT_ZERO, INPUT_OUTER = ".input_scale", ".input_zero_point", ".input_global_scale"


def _claims(located: Located) -> str | None:
    named = by_method(NAME, "sparseml")(located)
    old = located.where.endswith("compression_config") and f"{located.where} is there"
    return named or old or None


def _read(form: Format, tensors: Mapping[str, Tensor]) -> Quantized:
    weight = _weight(form.weight, tensors)
    transforms: list[Transform] = []
    if ORDER in tensors or "permute" in form.transforms:
        weight, transforms = in_order(weight, need(tensors, ORDER, "actorder = group scatters the columns"))
    transforms += [rotation(kind, weight, tensors) for kind in form.transforms if kind.startswith("rotate:")]
    act, planes = _act(form.act, tensors) if form.act else (None, {})
    kinds = tuple(t.kind for t in transforms)
    return Quantized(Format(weight.spec, act, kinds), weight, planes, tuple(transforms))


def _weight(spec: QuantSpec, tensors: Mapping[str, Tensor]) -> QTensor:
    scale = (SCALE, need(tensors, SCALE, "every quantized module has one"))
    if PACKED in tensors:
        if tensors[PACKED].dtype == torch.int32:
            return _packed(spec, tensors)
        if spec.element.kind == "int" and tensors[PACKED].dtype == torch.uint8:
            raise CheckpointError(f"{PACKED}: integers are packed in int32 words, found {tensors[PACKED].dtype}")
        codes = matrix(PACKED, tensors[PACKED], torch.uint8)
        outer = [(OUTER, need(tensors, OUTER, "NVFP4 has two levels of scales"))] if len(spec.scales) == 2 else []
        return bound(spec, (codes.shape[0], codes.shape[1] * 2), codes, scale, *outer)
    weight = expanded(tensors) if SPARSE[1] in tensors else need(tensors, WEIGHT, f"or {PACKED}")
    if weight.dtype in FLOATS:
        return _uncompressed(spec, weight, tensors)
    if spec.element.kind != "int":
        return bound(spec, weight.shape, raw(matrix(WEIGHT, weight, FP8)), scale)
    codes = _codes_of(matrix(WEIGHT, weight, torch.int8), spec.element)
    return bound(spec, weight.shape, store(codes, spec.element), scale, zero=_zero(spec, weight.shape, tensors))


def _packed(spec: QuantSpec, tensors: Mapping[str, Tensor]) -> QTensor:
    """weight_packed: [N, K * b / 32] int32."""
    words, bits = matrix(PACKED, tensors[PACKED], torch.int32), int(spec.element.bits)
    if spec.element.kind != "int":
        raise CheckpointError(f"{PACKED}: int32 words hold integers, and the config says {spec.element.name}")
    n, k = _shape(tensors)
    if tuple(words.shape) != (n, -(-k * bits // 32)):
        want = f"[{n}, {-(-k * bits // 32)}] words ({bits} bits for each of [{n}, {k}])"
        raise CheckpointError(f"{PACKED}: want {want}, found {list(words.shape)}; {SHAPE} or num_bits is wrong")
    codes = words.contiguous().view(torch.uint8)[:, : packed_size(k, bits)] ^ _flip(spec.element, k, words.device)
    return bound(spec, (n, k), codes, (SCALE, tensors[SCALE]), zero=_zero(spec, (n, k), tensors))


def _shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    found = need(tensors, SHAPE, "the packed columns do not say where they end").reshape(-1).tolist()
    if len(found) != 2 or min(found) <= 0 or not all(isinstance(size, int) for size in found):
        raise CheckpointError(f"{SHAPE}: want two positive sizes, found {found}")
    return int(found[0]), int(found[1])


def _flip(element: Element, k: int, device: torch.device) -> Tensor:
    """What turns offset binary into two's complement, as a packed row; nothing where codes are unsigned."""
    bits = int(element.bits)
    top = (1 << (bits - 1)) if element.signed else 0
    return pack(torch.full((k,), top, dtype=torch.uint8, device=device), bits)


def _codes_of(values: Tensor, element: Element) -> Tensor:
    """int8 values around zero -> unpacked codes."""
    bits = int(element.bits)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if bits < 8 and not values.is_meta and (int(values.min()) < low or int(values.max()) > high):
        found = f"{int(values.min())} .. {int(values.max())}"
        raise CheckpointError(f"int8 values of {bits}-bit codes must lie in {low} .. {high}, found {found}")
    codes = values.view(torch.uint8) if element.signed else values.view(torch.uint8) + (1 << (bits - 1))
    return codes & ((1 << bits) - 1)


def _zero(spec: QuantSpec, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The zero plane: int8 values, or packed along the rows like the weight along its columns."""
    if not spec.zeros:
        if ZERO in tensors and not tensors[ZERO].is_meta and bool(tensors[ZERO].any()):
            raise CheckpointError(f"{ZERO} is not zero, and the config says symmetric")
        return None
    zero, element = need(tensors, ZERO, "the weights are asymmetric"), spec.zeros[0].element
    rows, cols = grid(shape, spec.zeros[0].block)
    bits = int(element.bits)
    if zero.dtype == torch.int32:
        words = -(-rows * bits // 32)
        if tuple(zero.shape) != (words, cols):
            raise CheckpointError(f"{ZERO}: want [{words}, {cols}] words of {bits} bits, found {list(zero.shape)}")
        stream = zero.t().contiguous().view(torch.uint8)[:, : packed_size(rows, bits)]
        return store(unpack(stream, bits, rows).t().contiguous(), element)
    if zero.dtype != torch.int8 or zero.numel() != rows * cols:
        found = f"{list(zero.shape)} {str(zero.dtype).removeprefix('torch.')}"
        raise CheckpointError(f"{ZERO}: want [{rows}, {cols}] int8, found {found}")
    return store(_codes_of(zero.reshape(rows, cols), element), element)


def _uncompressed(spec: QuantSpec, weight: Tensor, tensors: Mapping[str, Tensor]) -> QTensor:
    """Formats dense and fakequant keep floats beside their scales, and round them at each call."""
    if spec.scales[0].element.kind != "native":
        raise UnsupportedError(f"{WEIGHT} is a plain float beside {spec.scales[0].element.name} scales: not read")
    scale, plane = placed(spec.scales[0], SCALE, tensors[SCALE], weight.shape)
    spec = replace(spec, scales=(scale,))
    if weight.is_meta:
        return empty(spec, weight.shape, "meta")
    zero = _zero(spec, tuple(weight.shape), tensors)
    cols = grid(weight.shape, scale.block)[1]
    planes = {"scale0": plane} | ({} if zero is None else {"zero0": unpack(zero, int(spec.element.bits), cols)})
    return assign(weight.float(), spec, planes)


def _act(act: QuantSpec, tensors: Mapping[str, Tensor]) -> tuple[QuantSpec, Planes]:
    zero = None
    scales = {}
    for level, scale in enumerate(act.scales):
        if not scale.dynamic:
            ending = INPUT if len(act.scales) == 1 else INPUT_OUTER
            scales[level] = ending, need(tensors, ending, "the config says its activations have a static scale")
    if act.zeros and not act.zeros[0].dynamic:
        stored = need(tensors, INPUT_ZERO, "the config says its activations are asymmetric")
        zero = _codes_of(stored.to(torch.int8), act.zeros[0].element)
        zero = store(zero.reshape(1, 1), act.zeros[0].element)
    return static_act(act, scales, zero)


def _write(q: Quantized) -> Tensors:
    weight_matrix(q, NAME)
    form, weight = q.format, q.weight
    packing = packing_of(form)
    out = _codes_out(q, packing)
    scale = form.weight.scales[0]
    plane = typed(scale, weight.planes["scale0"])
    out[SCALE] = plane.reshape(1) if scale.block == (0, 0) else plane
    if len(form.weight.scales) == 2:
        out[OUTER] = weight.planes["scale1"].reshape(1)
    if form.weight.zeros:
        out[ZERO] = _zero_out(weight, packed=packing == "pack-quantized")
    return out | (_act_out(q, form.act) if form.act else {})


def _codes_out(q: Quantized, packing: str) -> Tensors:
    codes, element, (n, k) = q.weight.planes["codes"], q.format.weight.element, q.weight.shape
    if packing == "pack-quantized":
        stream = codes ^ _flip(element, k, codes.device)
        shape = torch.tensor([n, k], device=codes.device)
        return {PACKED: _words(stream), SHAPE: shape}
    if packing == "int-quantized":
        return {WEIGHT: _values_of(unpack(codes, int(element.bits), k), element)}
    return {PACKED: codes} if element.bits == 4 else {WEIGHT: codes.view(FP8)}


def _words(stream: Tensor) -> Tensor:
    whole = pad(stream, (0, -stream.shape[-1] % 4))
    return whole.reshape(-1).view(torch.int32).view(*whole.shape[:-1], -1)


def _values_of(codes: Tensor, element: Element) -> Tensor:
    """The inverse of _codes_of."""
    middle = 1 << (int(element.bits) - 1)
    return ((codes ^ middle if element.signed else codes) - middle).view(torch.int8)


def _zero_out(weight: QTensor, packed: bool) -> Tensor:
    scale = weight.spec.zeros[0]
    bits, cols = int(scale.element.bits), grid(weight.shape, scale.block)[1]
    zero = unpack(weight.planes["zero0"], bits, cols)
    if scale.block == (0, 0):  # one zero is never packed
        return _values_of(zero, scale.element).reshape(1)
    return _words(pack(zero.t().contiguous(), bits)).t().contiguous() if packed else _values_of(zero, scale.element)


def _act_out(q: Quantized, act: QuantSpec) -> Tensors:
    out = {}
    for level, scale in enumerate(act.scales):
        if not scale.dynamic:
            ending = INPUT if len(act.scales) == 1 else INPUT_OUTER
            out[ending] = stored_act(q, NAME, f"scale{level}").reshape(1)
    if act.zeros and not act.zeros[0].dynamic:
        element = act.zeros[0].element
        plane = unpack(stored_act(q, NAME, "zero0"), int(element.bits), 1)
        out[INPUT_ZERO] = _values_of(plane, element).reshape(1)
    return out


CODECS = (
    Codec(
        NAME,
        _claims,
        plan,
        (PACKED, WEIGHT, SCALE, ZERO, SHAPE, ORDER, OUTER, INPUT, INPUT_ZERO, INPUT_OUTER, *SPARSE),
        (PACKED, SCALE, OUTER, SPARSE[1]),
        by_header(_read, SHAPE, ORDER, SPARSE[2]),
        _read,
        fit,
        _write,
        config,
        kv_endings={"k": ".k_scale", "v": ".v_scale"},
        kv_shape=(1,),
        shared=shared,
        summary="llm-compressor: int 1-8, FP8, NVFP4, MXFP4, MXFP8",
    ),
)
