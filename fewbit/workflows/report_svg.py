"""SVG and HTML elements as escaped text, and the arithmetic of axes.

`el` escapes every child and attribute that is not markup already: whatever a stranger named a module stays words.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

STEPS = 9  # colours of a ramp
WIDTH = 1080  # of a chart that fills the page


def el(tag: str, *children: object, **attrs: object) -> Markup:
    """One element; `class_` is class, `data_tip` is data-tip, None leaves an attribute out."""
    given = (f' {key.rstrip("_").replace("_", "-")}="{escape(_value(v))}"' for key, v in attrs.items() if v is not None)
    inner = Markup("").join(str(c) if not hasattr(c, "__html__") else c for c in children)
    return Markup(f"<{tag}{''.join(given)}>{inner}</{tag}>")


def svg(width: float, height: float, *children: object, label: str, class_: str = "chart", **attrs: object) -> Markup:
    """A picture with a label for those who cannot see it."""
    return el(
        "svg", *children, class_=class_, viewBox=f"0 0 {width:g} {height:g}", width=width, height=height, role="img",
        aria_label=label, **attrs,
    )  # fmt: skip


def text(x: float, y: float, words: object, anchor: str = "start", class_: str = "t") -> Markup:
    return el("text", words, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str = "axis") -> Markup:
    return el("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def rect(x: float, y: float, width: float, height: float, **attrs: object) -> Markup:
    return el("rect", x=x, y=y, width=max(width, 0), height=max(height, 0), **attrs)


def _value(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


@dataclass(frozen=True, slots=True)
class Ramp:
    """Values from low to high in STEPS equal steps, of the logarithm where they span much."""

    low: float
    high: float
    log: bool

    def share(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.0

    def step(self, value: float) -> int:
        return min(int(self.share(value) * STEPS), STEPS - 1)

    def at(self, share: float) -> float:
        if self.log:
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        return self.low + share * (self.high - self.low)


def ramp(values: Sequence[float]) -> Ramp:
    """The ramp that fits; a logarithm needs everything above zero and a span of more than 4."""
    low, high = min(values), max(values)
    return Ramp(low, high, low > 0 and high / low > 4)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers inside low to high."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
