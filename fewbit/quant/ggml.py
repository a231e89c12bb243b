"""ggml's block types as algebra: a spec for each, and where every bit of its block goes, as a table.

A row of K weights is a run of blocks, each a few bytes of scales and packed codes. `from_blocks` spreads the bytes over
the planes of a QTensor and `to_blocks` gathers them again, exactly. Codebook and trit types keep their bytes as they
are and decode in quant.runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewbit.errors import SpecError
from fewbit.quant.elements import (
    E2M1,
    E4M3,
    E8M0,
    F16,
    F32,
    INT3,
    INT4,
    INT5,
    INT6,
    INT8,
    IQ4,
    UINT2,
    UINT4,
    UINT5,
    UINT6,
    Element,
)  # fmt: skip
from fewbit.quant.ggml_rules import GGML_RULES as GGML_RULES
from fewbit.quant.qtensor import Planes, QTensor, empty, load, make, scale_of, store
from fewbit.quant.runs import RUNS
from fewbit.quant.spec import QuantSpec, describe, spec

CHUNK = 1 << 20  # weights moved at a time: the temporaries stay in cache
SIGN = Element("sign", "table", 1, table=(-1.0, 1.0), note="ggml's Q1_0")
TRIT = Element("trit", "table", 2, table=(-1.0, 0.0, 1.0, 2.0), note="ggml's TQ2_0; its encoder makes no 2")


@dataclass(frozen=True, slots=True)
class Bits:
    """Where some bits of one plane's codes sit in a block.

    The bytes from `start` on are `outer` groups of `inner`; lane l of a byte is its `width` bits from `at` + l * width.
    Code first + (group * lanes + lane) * inner + place takes them as its own bits from `to` on.
    """

    plane: str
    start: int
    inner: int
    width: int
    outer: int = 1
    lanes: int = 0  # 0: as many as the byte holds
    at: int = 0
    to: int = 0
    first: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.outer, self.lanes or 8 // self.width, self.inner


@dataclass(frozen=True, slots=True)
class BlockType:
    """One ggml type: its spec, weights and bytes of a block, and the place of every plane.

    halves: planes of float16, with the byte they start at. flip: bits inverted between the file and the plane, which
    turns an offset into two's complement and a stored minimum into the zero of value = scale * code - zero.
    """

    spec: QuantSpec
    weights: int
    nbytes: int
    bits: tuple[Bits, ...] = ()
    halves: Mapping[str, int] = field(default_factory=dict)
    flip: Mapping[str, int] = field(default_factory=dict)

    @property
    def side(self) -> tuple[str, ...]:
        """Planes that the blocks do not hold: the file keeps them in a tensor of their own."""
        held = {b.plane for b in self.bits} | self.halves.keys()
        names = [f"scale{i}" for i in range(len(self.spec.scales))] + [f"zero{i}" for i in range(len(self.spec.zeros))]
        return tuple(name for name in names if name not in held and self.spec.element.kind != "run")

    def count(self, plane: str) -> int:
        """Codes of a plane in one block."""
        return self.weights // (1 if plane == "codes" else scale_of(self.spec, plane).block[1])


def _nibbles(start: int, inner: int = 16, outer: int = 1) -> Bits:
    return Bits("codes", start, inner, 4, outer)


def _simple(weight: QuantSpec, nbytes: int, flip: int, *bits: Bits) -> BlockType:
    """d, then codes."""
    return BlockType(weight, weight.scales[0].block[1], nbytes, bits, {"scale0": 0}, {"codes": flip} if flip else {})


def _with_minimum(weight: QuantSpec, nbytes: int, *bits: Bits) -> BlockType:
    """d, m, then codes: value = d * code + m."""
    return BlockType(weight, 32, nbytes, bits, {"scale0": 0, "zero0": 2}, {"zero0": 0x8000})


def _k_scales(start: int) -> tuple[Bits, ...]:
    """Eight 6-bit scales and eight 6-bit minima in 12 bytes; the top bits of the later four hide in the earlier."""
    s = start
    return (
        Bits("scale0", s, 4, 6, lanes=1),
        Bits("scale0", s + 8, 4, 4, lanes=1, first=4),
        Bits("scale0", s, 4, 2, lanes=1, at=6, to=4, first=4),
        Bits("zero0", s + 4, 4, 6, lanes=1),
        Bits("zero0", s + 8, 4, 4, lanes=1, at=4, first=4),
        Bits("zero0", s + 4, 4, 2, lanes=1, at=6, to=4, first=4),
    )


def _k_spec(element: Element, scale: Element, step: int, rule: str, zeros: bool = False) -> QuantSpec:
    chain = ((scale, 1, step), (F16, 1, 256))
    return spec(element, *chain, zeros=chain if zeros else (), rule=rule)


def _block(element: Element, cols: int, rule: str, zeros: bool = False) -> QuantSpec:
    return spec(element, (F16, 1, cols), zeros=((F16, 1, cols),) if zeros else (), rule=rule)


_FIFTH_BIT = {"inner": 1, "width": 1, "outer": 4, "to": 4}

TYPES: dict[str, BlockType] = {
    "q1_0": _simple(_block(SIGN, 128, "sign-mean"), 18, 0, Bits("codes", 2, 1, 1, outer=16)),
    "q4_0": _simple(_block(INT4, 32, "q4_0"), 18, 8, _nibbles(2)),
    "q4_1": _with_minimum(_block(UINT4, 32, "q4_1", True), 20, _nibbles(4)),
    "q5_0": _simple(_block(INT5, 32, "q5_0"), 22, 16, _nibbles(6), Bits("codes", 2, **_FIFTH_BIT)),
    "q5_1": _with_minimum(_block(UINT5, 32, "q5_1", True), 24, _nibbles(8), Bits("codes", 4, **_FIFTH_BIT)),
    "q8_0": _simple(_block(INT8, 32, "q8_0"), 34, 0, Bits("codes", 2, 32, 8)),
    "q2_k": BlockType(
        _k_spec(UINT2, UINT4, 16, "q2_k", zeros=True), 256, 84,
        (
            Bits("scale0", 0, 16, 4, lanes=1), Bits("zero0", 0, 16, 4, lanes=1, at=4),
            Bits("codes", 16, 32, 2, outer=2),
        ),
        {"scale1": 80, "zero1": 82},
    ),
    "q3_k": BlockType(
        _k_spec(INT3, INT6, 16, "q3_k"), 256, 110,
        (
            Bits("codes", 32, 32, 2, outer=2), Bits("codes", 0, 32, 1, to=2),
            Bits("scale0", 96, 8, 4), Bits("scale0", 104, 4, 2, to=4),
        ),
        {"scale1": 108}, {"codes": 4, "scale0": 32},
    ),
    "q4_k": BlockType(
        _k_spec(UINT4, UINT6, 32, "q4_k", zeros=True), 256, 144,
        (*_k_scales(4), _nibbles(16, 32, 4)), {"scale1": 0, "zero1": 2},
    ),
    "q5_k": BlockType(
        _k_spec(UINT5, UINT6, 32, "q5_k", zeros=True), 256, 176,
        (*_k_scales(4), _nibbles(48, 32, 4), Bits("codes", 16, 32, 1, to=4)), {"scale1": 0, "zero1": 2},
    ),
    "q6_k": BlockType(
        _k_spec(INT6, INT8, 16, "q6_k"), 256, 210,
        (_nibbles(0, 64, 2), Bits("codes", 128, 32, 2, outer=2, to=4), Bits("scale0", 192, 16, 8)),
        {"scale1": 208}, {"codes": 32},
    ),
    "iq4_nl": _simple(_block(IQ4, 32, "iq4_nl"), 18, 0, _nibbles(2)),
    "iq4_xs": BlockType(
        _k_spec(IQ4, INT6, 32, "iq4_xs"), 256, 136,
        (
            Bits("scale0", 4, 1, 4, outer=4), Bits("scale0", 2, 1, 2, outer=2, to=4),
            _nibbles(8, 16, 8),
        ),
        {"scale1": 0}, {"scale0": 32},
    ),
    "tq2_0": BlockType(
        _block(TRIT, 256, "tq2_0"), 256, 66, (Bits("codes", 0, 32, 2, outer=2),), {"scale0": 64}
    ),
    "mxfp4": BlockType(
        spec(E2M1, (E8M0, 1, 32), rule="mxfp4-ggml"), 32, 17, (Bits("scale0", 0, 1, 8), _nibbles(1))
    ),
    "nvfp4": BlockType(
        spec(E2M1, (E4M3, 1, 16), (F32, 0, 0)), 64, 36, (Bits("scale0", 0, 4, 8), _nibbles(4, 8, 4))
    ),
    **{e.name: BlockType(QuantSpec(e, rule="run"), e.run, round(e.bits * e.run) // 8) for e in RUNS},
}  # fmt: skip

# rows for FORMATS; NVFP4 is the same format wherever it is stored, MXFP4 only rounds in another way here
GGML_SPECS: dict[str, QuantSpec] = {
    {"mxfp4": "mxfp4-ggml"}.get(name, name): t.spec for name, t in TYPES.items() if name != "nvfp4"
}


def type_of(weight: QuantSpec) -> str | None:
    """The type whose blocks hold exactly this spec."""
    return next((name for name, t in TYPES.items() if t.spec.stored == weight.stored), None)


def from_blocks(raw: Tensor, name: str, shape: Sequence[int], side: Planes | None = None) -> QTensor:
    """raw: [..., N, row bytes] uint8 -> the QTensor of `shape` [..., N, K]. side: planes stored apart, by plane."""
    t = TYPES[name]
    _check(raw, t, name, shape)
    side = {**{plane: torch.ones(*shape[:-2], 1, 1) for plane in t.side}, **(side or {})}
    if t.spec.element.kind == "run":
        return make(t.spec, shape, {"codes": raw})
    out = empty(t.spec, shape, raw.device)
    flat = {plane: out.planes[plane].flatten(0, -2) for plane in _held(t)}
    blocks = raw.reshape(-1, shape[-1] // t.weights, t.nbytes)
    for rows in _chunks(blocks.shape[0], shape[-1]):
        for plane, target in flat.items():
            target[rows] = _gather(blocks[rows], t, plane)
    return make(t.spec, shape, {**out.planes, **side})


def to_blocks(q: QTensor, name: str | None = None) -> Tensor:
    """The inverse: -> [..., N, row bytes] uint8, without the side planes."""
    name = name or type_of(q.spec) or ""
    if name not in TYPES or TYPES[name].spec.stored != q.spec.stored:
        raise SpecError(f"{describe(q.spec)} is not {name or 'a ggml type'}; known: {', '.join(TYPES)}")
    t = TYPES[name]
    if t.spec.element.kind == "run":
        return q.planes["codes"]
    if q.shape[-1] % t.weights:
        raise SpecError(f"{name} holds rows in blocks of {t.weights}; a row of {q.shape[-1]} does not divide")
    flat = {plane: q.planes[plane].flatten(0, -2) for plane in _held(t)}
    blocks = torch.zeros(flat["codes"].shape[0], q.shape[-1] // t.weights, t.nbytes, dtype=torch.uint8, device=q.device)
    for rows in _chunks(blocks.shape[0], q.shape[-1]):
        for plane, source in flat.items():
            _scatter(source[rows], t, plane, blocks[rows])
    return blocks.reshape(*q.shape[:-1], -1)


def _check(raw: Tensor, t: BlockType, name: str, shape: Sequence[int]) -> None:
    if len(shape) < 2 or shape[-1] % t.weights:
        raise SpecError(f"{name} holds rows in blocks of {t.weights}; a tensor of {list(shape)} does not divide")
    want = (*shape[:-1], shape[-1] // t.weights * t.nbytes)
    if tuple(raw.shape) != want or raw.dtype != torch.uint8:
        raise SpecError(f"{name} {list(shape)}: want uint8 {list(want)}, got {raw.dtype} {list(raw.shape)}")


def _held(t: BlockType) -> list[str]:
    return ["codes", *t.halves, *{b.plane: 0 for b in t.bits if b.plane != "codes"}]


def _chunks(rows: int, cols: int) -> list[slice]:
    step = max(1, CHUNK // cols)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _element(t: BlockType, plane: str) -> Element:
    return t.spec.element if plane == "codes" else scale_of(t.spec, plane).element


def _gather(blocks: Tensor, t: BlockType, plane: str) -> Tensor:
    """blocks: [rows, B, bytes] -> the plane's rows, packed."""
    flip = t.flip.get(plane, 0)
    if plane in t.halves:
        start = t.halves[plane]
        half = blocks[..., start : start + 2].contiguous().view(torch.int16).squeeze(-1)
        return (half ^ _signed(flip)).view(torch.float16)
    codes = torch.empty(*blocks.shape[:-1], t.count(plane), dtype=torch.uint8, device=blocks.device)
    for b in (b for b in t.bits if b.plane == plane):
        _spread(blocks, codes, b)
    return store((codes ^ flip if flip else codes).flatten(-2), _element(t, plane))


def _spread(blocks: Tensor, codes: Tensor, b: Bits) -> None:
    outer, lanes, inner = b.shape
    source = torch.unflatten(blocks[..., b.start : b.start + outer * inner], -1, (outer, inner))
    target = torch.unflatten(codes[..., b.first : b.first + outer * lanes * inner], -1, (outer, lanes, inner))
    for lane in range(lanes):
        part = source if b.width == 8 else (source >> (b.at + lane * b.width)) & (2**b.width - 1)
        if b.to:
            target[..., lane, :] |= part << b.to
        else:
            target[..., lane, :] = part


def _scatter(packed: Tensor, t: BlockType, plane: str, blocks: Tensor) -> None:
    """The plane's rows -> their bits in blocks [rows, B, bytes], which start as zeros."""
    flip = t.flip.get(plane, 0)
    if plane in t.halves:
        start = t.halves[plane]
        half = packed.contiguous().view(torch.int16) ^ _signed(flip)
        blocks[..., start : start + 2] = half.unsqueeze(-1).view(torch.uint8)
        return
    count = t.count(plane)
    codes = torch.unflatten(load(packed, _element(t, plane), blocks.shape[1] * count), -1, (-1, count))
    codes = codes ^ flip if flip else codes
    for b in (b for b in t.bits if b.plane == plane):
        outer, lanes, inner = b.shape
        source = torch.unflatten(codes[..., b.first : b.first + outer * lanes * inner], -1, (outer, lanes, inner))
        target = torch.unflatten(blocks[..., b.start : b.start + outer * inner], -1, (outer, inner))
        for lane in range(lanes):
            target |= ((source[..., lane, :] >> b.to) & (2**b.width - 1)) << (b.at + lane * b.width)


def _signed(bits: int) -> int:
    return bits - 0x10000 if bits >= 0x8000 else bits
