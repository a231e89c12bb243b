"""Numbers as people read them: percent, counts, durations, digits that mean something."""

from collections.abc import Callable

from fewbit.workflows.inspect import size

__all__ = ["count", "duration", "interval", "number", "percent", "plural", "quantity", "size"]

SPACE = "\N{NO-BREAK SPACE}"


def number(value: float, digits: int = 4) -> str:
    """Some significant digits, without an exponent where it can be read without."""
    if value == 0 or 1e-4 <= abs(value) < 10**digits:
        text = f"{value:.{digits}g}"
        return text.replace("-", "\N{MINUS SIGN}")
    return f"{value:,.0f}" if 1e-4 <= abs(value) < 1e9 else f"{value:.{digits - 1}g}"


def percent(value: float, signed: bool = False) -> str:
    """0.0183 -> 1.83 %."""
    value *= 100
    places = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2 if abs(value) >= 0.0995 or not value else 3
    text = f"{value:{'+' if signed else ''}.{places}f}"
    return text.replace("-", "\N{MINUS SIGN}") + SPACE + "%"


def count(value: float) -> str:
    """1100048384 -> 1.10 B."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g}{SPACE}{unit}"
    return f"{value:g}"


def duration(seconds: float) -> str:
    """12.3 s, 3 min 20 s, 1 h 05 min."""
    if seconds < 99.5:
        return f"{seconds:.{2 if seconds < 0.95 else 1 if seconds < 9.95 else 0}f}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min {rest:02}{SPACE}s"
    return f"{minutes // 60}{SPACE}h {minutes % 60:02}{SPACE}min"


def quantity(value: float, unit: str) -> str:
    """A number with its unit; bytes and seconds in the ones that fit."""
    if unit == "bytes":
        return size(value).replace(" ", SPACE)
    return duration(value) if unit == "seconds" else f"{number(value)}{SPACE}{unit}".strip()


def interval(low: float | None, high: float | None, say: Callable[[float], str]) -> str:
    """95 %: low to high; nothing where there is none."""
    return "" if low is None or high is None else f"95{SPACE}%: {say(low)} to {say(high)}"


def plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")
