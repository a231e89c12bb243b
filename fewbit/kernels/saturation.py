"""How many values static scales cut off: counted on the device where they are, read when somebody asks.

A GPU is not waited for: what is read is what had come to the host when it was last asked.

A scale that is chosen at each call cuts nothing off. Kernels that round inputs to codes themselves do not count.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fewbit.quant.qtensor import Planes
from fewbit.quant.reference import fake_quant
from fewbit.quant.spec import QuantSpec

_COUNTS: dict[torch.device, Tensor] = {}
_COMING: dict[torch.device, Tensor] = {}  # of a GPU: pinned memory that its count is copied to
ENDLESS = 1e30


def count(x: Tensor, spec: QuantSpec, planes: Planes) -> None:
    """How many of x these scales cut off."""
    if spec.scales and not spec.dynamic and x.numel():
        low, high = (
            fake_quant(x.new_full((1, 1), end, dtype=torch.float32), spec, planes) for end in (-ENDLESS, ENDLESS)
        )
        count_of(x.device).add_(((x < low) | (x > high)).sum())


@contextmanager
def uncounted(device: torch.device) -> Iterator[None]:
    """Within, nothing is counted there: the values were, once already."""
    held = count_of(device)
    before = held.clone()
    try:
        yield
    finally:
        held.copy_(before)


def total() -> int:
    return sum(_read(device, count) for device, count in _COUNTS.items())


def _read(device: torch.device, count: Tensor) -> int:
    if device.type != "cuda":
        return int(count)
    if device not in _COMING:
        _COMING[device] = torch.zeros((), dtype=torch.int64, pin_memory=True)
    found = int(_COMING[device])
    _COMING[device].copy_(count, non_blocking=True)
    return found


def count_of(device: torch.device) -> Tensor:
    if device not in _COUNTS:
        with torch.inference_mode(False):  # whoever counts first, everybody can count
            _COUNTS[device] = torch.zeros((), dtype=torch.int64, device=device)
    return _COUNTS[device]
