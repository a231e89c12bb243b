"""What GPTQ, AWQ and AutoRound configs say about integers: bits, group_size, sym; and what such a dialect can hold."""

from typing import Any

from fewbit.codecs.codec import refuse
from fewbit.errors import CheckpointError
from fewbit.quant.elements import ELEMENTS, F16
from fewbit.quant.spec import FLAT, Format, spec


def int_format(bits: int, group: int, sym: bool, transforms: tuple[str, ...] = ()) -> Format:
    """Integers of `bits` in groups along K (-1: one group a row)."""
    block = (1, max(group, 0))
    if sym:
        return Format(spec(ELEMENTS[f"int{bits}"], (F16, *block), rule="range"), None, transforms)
    unsigned = ELEMENTS[f"uint{bits}"]
    return Format(spec(unsigned, (F16, *block), zeros=((unsigned, *block),), rule="range"), None, transforms)


def fit_int(dialect: str, form: Format, widths: tuple[int, ...], asym: bool | None = None) -> Format:
    """The format with codes of one of `widths`, groups along K and F16 scales. asym: always, never, or as it is."""
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


def setting(form: Format) -> dict[str, Any]:
    """The inverse of int_format."""
    weight = form.weight
    group = weight.scales[0].block[1] or -1
    return {"bits": int(weight.element.bits), "group_size": group, "sym": not weight.zeros}


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


def names(config: dict[str, Any], key: str) -> list[str]:
    """A list of names (or of lists of them), flat; empty where there is none."""
    value = config.get(key)
    flat = [name for part in (value or []) for name in ([part] if isinstance(part, str) else part)]
    if not isinstance(value, list | None) or not all(isinstance(name, str) for name in flat):
        raise CheckpointError(f"quantization_config.{key}: want a list of names, found {value!r}")
    return flat


def _list(values: tuple[int, ...]) -> str:
    return ", ".join(str(value) for value in values)
