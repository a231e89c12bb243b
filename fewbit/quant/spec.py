"""Scale, QuantSpec, Format: what a low-bit tensor is, as values.

value = element[code] * scale - zero, where scale is a chain of planes from inner to outer. Per tensor, per channel, per
token, per group and per block are one field: the `block` of a Scale. See docs/structure.md.
"""

from dataclasses import dataclass, replace
from typing import Literal

from fewbit.errors import SpecError
from fewbit.quant.elements import Element

FLAT = -1  # as the rows of a block: the block runs over the flattened matrix (bitsandbytes)
Op = Literal["mul", "div", "add"]


@dataclass(frozen=True, slots=True)
class Scale:
    """One plane of multipliers (or offsets), one value for each block of the tensor.

    block: rows x cols that share a value; 0 = the whole axis; rows FLAT = runs of the flattened matrix.
    op: how it joins the planes inside it: most multiply, a stored reciprocal divides, a mean taken out is added.
    dynamic: chosen from the data at each call (activations), so no checkpoint stores it.
    """

    element: Element
    block: tuple[int, int]
    op: Op = "mul"
    dynamic: bool = False


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How one tensor is stored.

    scales, zeros: chains of planes, inner to outer. Zeros that end in an integer element are in units of codes,
    value = scale * (code - zero); zeros that end in a float are in units of the value, value = scale * code - zero.
    rule: how encode chooses the scales (a name in reference.RULES); decoding never looks at it.
    """

    element: Element
    scales: tuple[Scale, ...] = ()
    zeros: tuple[Scale, ...] = ()
    rule: str = "amax"

    def __post_init__(self) -> None:
        for scale in (*self.scales, *self.zeros):
            rows, cols = scale.block
            if rows < FLAT or cols < 0 or (rows == FLAT and cols == 0):
                raise SpecError(f"block {scale.block} of a {self.element.name} spec: rows and cols must be >= 0")

    @property
    def zeros_in_codes(self) -> bool:
        return bool(self.zeros) and self.zeros[-1].element.kind == "int"

    @property
    def dynamic(self) -> bool:
        """True when some scale is chosen at each call."""
        return any(scale.dynamic for scale in self.scales)

    @property
    def stored(self) -> "QuantSpec":
        """The same without what only encode looks at: equal `stored` means equal bytes."""
        return replace(self, rule="amax")


@dataclass(frozen=True, slots=True)
class Format:
    """What one linear holds: a weight spec, what its input is rounded to, and the kinds of transform beside them."""

    weight: QuantSpec
    act: QuantSpec | None = None
    transforms: tuple[str, ...] = ()  # kinds, see qtensor.Transform


def spec(
    element: Element,
    *scales: tuple[Element, int, int],
    zeros: tuple[tuple[Element, int, int], ...] = (),
    rule: str = "amax",
    dynamic: int = 0,
) -> QuantSpec:
    """Shorthand for tables: spec(E2M1, (E4M3, 1, 16), (F32, 0, 0)); the first `dynamic` scales are per call."""
    chain = tuple(Scale(e, (rows, cols), dynamic=i < dynamic) for i, (e, rows, cols) in enumerate(scales))
    offsets = tuple(Scale(e, (rows, cols), dynamic=i < dynamic) for i, (e, rows, cols) in enumerate(zeros))
    return QuantSpec(element, chain, offsets, rule)


def describe(s: QuantSpec) -> str:
    """A spec in one line: `e2m1 x e4m3[1x16] x f32[tensor]`."""
    signs = {"mul": "x", "div": "/", "add": "+"}
    parts = [s.element.name, *(f"{signs[c.op]} {c.element.name}[{_block(c)}]" for c in s.scales)]
    return " ".join(parts + (["-", *(f"{c.element.name}[{_block(c)}]" for c in s.zeros)] if s.zeros else []))


def _block(scale: Scale) -> str:
    rows, cols = scale.block
    shapes = {(0, 0): "tensor", (1, 0): "row"}
    text = shapes.get((rows, cols)) or (f"flat{cols}" if rows == FLAT else f"{rows or 'all'}x{cols or 'all'}")
    return text + (" dynamic" if scale.dynamic else "")
