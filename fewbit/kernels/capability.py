"""What a device can multiply: number types of activations, as a table. What it cannot, only software rounds to."""

import torch

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
