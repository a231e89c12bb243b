"""QTensor: a spec, a shape, and the planes that hold it. Plain data; every function here returns a new value.

Planes are named codes, scale0, scale1 ..., zero0, zero1 ... (inner to outer). Each is [*leading, rows, cols], packed
along cols by quant.pack when its element is narrower than a byte. Experts are leading axes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewbit.errors import SpecError
from fewbit.quant.elements import Element
from fewbit.quant.pack import pack, packed_size, unpack
from fewbit.quant.spec import FLAT, Format, QuantSpec, Scale

Planes = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class QTensor:
    """A quantized [*leading, N, K] tensor."""

    spec: QuantSpec
    shape: tuple[int, ...]
    planes: Planes

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes.values())

    @property
    def device(self) -> torch.device:
        return self.planes["codes"].device

    def to(self, device: str | torch.device) -> "QTensor":
        return QTensor(self.spec, self.shape, {name: plane.to(device) for name, plane in self.planes.items()})


@dataclass(frozen=True, slots=True)
class Transform:
    """An exact rewrite beside the codes. kind and tensors:

    permute: index [K]; the linear reads x[..., index] (GPTQ's activation order).
    input_scale: scale [K]; the linear reads x * scale (AWQ's pre_quant_scale).
    rotate: matrix [b, b]; the linear reads x in runs of b, each times the matrix.
    low_rank: a [r, K], b [N, r]; the linear adds (x a^T) b^T, x taken after the other transforms and before rounding.
    """

    kind: str
    tensors: Planes


@dataclass(frozen=True, slots=True)
class Quantized:
    """One quantized linear as a checkpoint holds it (its bias is an ordinary tensor beside it)."""

    format: Format
    weight: QTensor
    act: Planes = field(default_factory=dict)  # static activation planes: scale0, scale1 ..., zero0 ...
    transforms: tuple[Transform, ...] = ()


def grid(shape: Sequence[int], block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks (rows, cols) cover the last two axes of `shape`."""
    n, k = shape[-2:]
    rows, cols = block
    if rows == FLAT:
        return 1, -(-n * k // cols)
    return (1 if rows == 0 else -(-n // rows)), (1 if cols == 0 else -(-k // cols))


def plane_shape(shape: Sequence[int], element: Element, block: tuple[int, int]) -> tuple[int, ...]:
    """The stored shape of one plane."""
    rows, cols = grid(shape, block)
    if element.kind == "native":
        return (*shape[:-2], rows, cols)
    return (*shape[:-2], rows, packed_size(cols, int(element.bits)))


def planes_of(spec: QuantSpec, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> stored (shape, dtype) of every plane a QTensor of this spec and shape has."""
    out = {"codes": (code_shape(spec.element, shape), spec.element.dtype)}
    for stem, chain in (("scale", spec.scales), ("zero", spec.zeros)):
        for i, scale in enumerate(chain):
            out[f"{stem}{i}"] = plane_shape(shape, scale.element, scale.block), scale.element.dtype
    return out


def code_shape(element: Element, shape: Sequence[int]) -> tuple[int, ...]:
    n, k = shape[-2:]
    if element.kind == "native":
        return tuple(shape)
    if element.kind == "run":
        if k % element.run:
            raise SpecError(f"{element.name} holds rows in runs of {element.run}; a row of {k} does not divide")
        return (*shape[:-2], n, round(k * element.bits) // 8)
    return (*shape[:-2], n, packed_size(k, int(element.bits)))


def make(spec: QuantSpec, shape: Sequence[int], planes: Planes) -> QTensor:
    """Check the planes against the spec and shape, and bind them."""
    want = planes_of(spec, shape)
    if planes.keys() != want.keys():
        raise SpecError(f"a {spec.element.name} tensor holds planes {sorted(want)}, got {sorted(planes)}")
    for name, (plane, dtype) in want.items():
        if tuple(planes[name].shape) != plane or planes[name].dtype != dtype:
            what = f"plane {name} of {list(shape)} {spec.element.name}"
            found = f"{list(planes[name].shape)} {planes[name].dtype}"
            raise SpecError(f"{what}: want {list(plane)} {dtype}, got {found}")
    return QTensor(spec, tuple(shape), planes)


def empty(spec: QuantSpec, shape: Sequence[int], device: str | torch.device = "cpu") -> QTensor:
    """A QTensor whose planes are allocated and not yet filled."""
    planes = {n: torch.empty(s, dtype=d, device=device) for n, (s, d) in planes_of(spec, shape).items()}
    return QTensor(spec, tuple(shape), planes)


def store(codes: Tensor, element: Element) -> Tensor:
    """Unpacked codes [..., n] -> a plane."""
    narrow = element.kind not in ("native", "run") and element.bits < 8
    return pack(codes, int(element.bits)) if narrow else codes.contiguous()


def load(plane: Tensor, element: Element, cols: int) -> Tensor:
    """A plane -> unpacked codes [..., cols]."""
    narrow = element.kind not in ("native", "run") and element.bits < 8
    return unpack(plane, int(element.bits), cols) if narrow else plane


def codes(q: QTensor) -> Tensor:
    """-> [*leading, N, K] uint8."""
    return load(q.planes["codes"], q.spec.element, q.shape[-1])


def scale_codes(q: QTensor, name: str) -> Tensor:
    """Unpacked codes of plane `scale0`, `zero1` ...: [*leading, rows, cols] of its grid."""
    scale = scale_of(q.spec, name)
    return load(q.planes[name], scale.element, grid(q.shape, scale.block)[1])


def scale_of(spec: QuantSpec, name: str) -> Scale:
    chain = spec.scales if name.startswith("scale") else spec.zeros
    return chain[int(name[-1])]


def bits_per_weight(spec: QuantSpec, shape: Sequence[int] | None = None) -> float:
    """By arithmetic alone; without a shape, whole-axis blocks count as nothing."""
    total = float(spec.element.bits)
    for scale in (*spec.scales, *spec.zeros):
        if shape is not None:
            rows, cols = grid(shape, scale.block)
            total += scale.element.bits * rows * cols / (shape[-1] * shape[-2])
        elif scale.block[1] and scale.block[0]:
            total += scale.element.bits / (abs(scale.block[0]) * scale.block[1])
    return total


def _cut(start: int, stop: int, size: int, block: int, name: str) -> tuple[int, int]:
    """The range of blocks that covers [start, stop) of an axis cut in blocks."""
    if block == 0:
        return 0, 1
    if start % block or (stop % block and stop != size):
        raise SpecError(f"{name} shares a value over {block}: cannot cut an axis of {size} at {start}:{stop}")
    return start // block, -(-stop // block)


def slice(q: QTensor, axis: int, start: int, stop: int) -> QTensor:
    """q[..., start:stop] along axis -1 or -2, or along a leading axis; cuts must fall on block edges."""
    axis = axis if axis < 0 else axis - len(q.shape)
    shape = list(q.shape)
    if not 0 <= start < stop <= shape[axis]:
        raise SpecError(f"cannot cut {start}:{stop} from an axis of {shape[axis]}")
    shape[axis] = stop - start
    if axis < -2:
        return QTensor(q.spec, tuple(shape), {n: p.narrow(axis, start, stop - start) for n, p in q.planes.items()})
    planes = {"codes": _cut_codes(q, axis, start, stop)}
    for stem, chain in (("scale", q.spec.scales), ("zero", q.spec.zeros)):
        for i, scale in enumerate(chain):
            planes[f"{stem}{i}"] = _cut_plane(q, f"{stem}{i}", scale, axis, start, stop)
    return QTensor(q.spec, tuple(shape), planes)


def _cut_codes(q: QTensor, axis: int, start: int, stop: int) -> Tensor:
    if axis == -2:
        return q.planes["codes"][..., start:stop, :]
    element = q.spec.element
    if element.kind == "run":
        first, last = _cut(start, stop, q.shape[-1], element.run, "codes")
        step = round(element.run * element.bits) // 8
        return q.planes["codes"][..., first * step : last * step]
    return store(codes(q)[..., start:stop], element)


def _cut_plane(q: QTensor, name: str, scale: Scale, axis: int, start: int, stop: int) -> Tensor:
    rows, cols = scale.block
    plane = scale_codes(q, name)
    if rows == FLAT:
        if axis == -1:
            raise SpecError(f"{name} runs over the flattened matrix: its columns cannot be cut")
        k = q.shape[-1]
        first, last = _cut(start * k, stop * k, q.shape[-2] * k, cols, name)
        return store(plane[..., first:last], scale.element)
    first, last = _cut(start, stop, q.shape[axis], rows if axis == -2 else cols, name)
    return store(plane.narrow(axis, first, last - first), scale.element)


def rows(q: QTensor, index: Tensor) -> QTensor:
    """The rows of q in another order (a permutation of N)."""
    planes = {"codes": q.planes["codes"].index_select(-2, index)}
    for stem, chain in (("scale", q.spec.scales), ("zero", q.spec.zeros)):
        for i, scale in enumerate(chain):
            if scale.block[0] not in (0, 1):
                raise SpecError(f"{stem}{i} shares a value over {scale.block[0]} rows: the rows cannot be reordered")
            plane = q.planes[f"{stem}{i}"]
            planes[f"{stem}{i}"] = plane.index_select(-2, index) if scale.block[0] else plane
    return QTensor(q.spec, q.shape, planes)


def columns(q: QTensor, index: Tensor) -> Tensor:
    """Unpacked codes with columns in another order: [*leading, N, K]; scales are the caller's to place."""
    return codes(q).index_select(-1, index)


def stack(parts: Sequence[QTensor]) -> QTensor:
    """Equal QTensors [N, K] -> one [E, N, K]."""
    first = parts[0]
    for part in parts:
        if part.spec.stored != first.spec.stored or part.shape != first.shape:
            raise SpecError(f"cannot stack {list(part.shape)} {part.spec.element.name} on {list(first.shape)}")
    planes = {name: torch.stack([p.planes[name] for p in parts]) for name in first.planes}
    return QTensor(first.spec, (len(parts), *first.shape), planes)
