"""Checks of one field's value each: the value in its one form, or a RequestError that names the field."""

import math
import numbers
import reprlib
from collections.abc import Mapping
from typing import Any

from fewbit.errors import RequestError

STOPS, STOP_LENGTH = 64, 4096
TOKEN_IDS = 4096
ALLOWED_IDS = 1 << 19  # no vocabulary is larger
INT64 = 1 << 63


def shown(value: object) -> str:
    """A short form of any value, for a message."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    try:
        return reprlib.repr(value)[:80]
    except Exception:  # a value's own repr may raise anything
        return f"a {type(value).__name__}"


def integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise RequestError(f"{name} is {shown(value)}; it takes an integer from {low} to {high}")
    return int(value)


def real(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    found = _float(value)
    if found is None or not math.isfinite(found) or not low <= found <= high:
        bounds = "" if (low, high) == (-math.inf, math.inf) else f" from {low:g} to {high:g}"
        raise RequestError(f"{name} is {shown(value)}; it takes a finite number{bounds}")
    return found


def _float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except (OverflowError, ValueError):
        return None


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {shown(value)}; it takes True or False")
    return value


def listed(name: str, value: Any, most: int) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise RequestError(f"{name} is {shown(value)}; it takes a list")
    if len(value) > most:
        raise RequestError(f"{name} has {len(value)} entries; at most {most} are taken")
    return tuple(value)


def stops(value: Any) -> tuple[str, ...]:
    found = (value,) if isinstance(value, str) else () if value is None else listed("stop", value, STOPS)
    for one in found:
        if not isinstance(one, str) or not 1 <= len(one) <= STOP_LENGTH:
            raise RequestError(f"stop holds {shown(one)}; it takes strings of 1 to {STOP_LENGTH} characters")
    return found


def token_ids(name: str, value: Any, most: int = TOKEN_IDS) -> tuple[int, ...]:
    return tuple(integer(f"an id in {name}", one, 0, INT64 - 1) for one in listed(name, value, most))


def biases(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias is {shown(value)}; it takes a mapping of token ids to numbers")
    if len(value) > TOKEN_IDS:
        raise RequestError(f"logit_bias has {len(value)} entries; at most {TOKEN_IDS} are taken")
    return {_token(key): real("a value of logit_bias", one, -100, 100) for key, one in value.items()}


def _token(key: Any) -> int:
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20:  # JSON has no other keys
        key = int(key)
    return integer("a key of logit_bias", key, 0, INT64 - 1)
