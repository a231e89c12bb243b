"""What a device can multiply: number types of activations, as a table. What it cannot, only software rounds to."""

from dataclasses import replace

import torch

from fewbit.kernels.packed import slow
from fewbit.quant.formats import TOKEN_INT8
from fewbit.quant.spec import Format

# element of an activation -> the least compute capability whose matrix units take it
LEAST: dict[str, tuple[int, int]] = {
    "int8": (7, 5), "int4": (7, 5), "e4m3": (8, 9), "e5m2": (8, 9), "e2m1": (10, 0), "e2m3": (10, 0), "e3m2": (10, 0),
}  # fmt: skip
CPU = frozenset({"int8"})


def lacking(format: Format, device: torch.device) -> str | None:
    """Why a device cannot multiply inputs rounded as the format says; None where it can, or none are rounded."""
    if format.act is None:
        return None
    name = format.act.element.name
    if device.type == "cpu":
        return None if name in CPU else f"no processor multiplies {name}"
    if device.type == "cuda" and name in LEAST:
        found, least = torch.cuda.get_device_capability(device), LEAST[name]
        return None if found >= least else f"{name} needs compute capability {least[0]}.{least[1]}, this is {found}"
    return f"nothing known multiplies {name} on {device.type}"


def not_fast(format: Format, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `activations="fast"` leaves the inputs of a format as they are; None where it rounds them to int8."""
    if format.act is not None:
        return "its activations are declared"
    if device.type != "cpu" or dtype != torch.bfloat16:
        return "it is for processors, in bfloat16"
    return slow(format.weight)


def run_as(format: Format, device: torch.device, dtype: torch.dtype, activations: str) -> Format:
    """A format with what its inputs are rounded to here: see modules.linear.Options."""
    if activations == "off" or (activations in ("hardware", "fast") and lacking(format, device)):
        return replace(format, act=None)
    if activations == "fast" and not_fast(format, device, dtype) is None:
        return replace(format, act=TOKEN_INT8)
    return format
