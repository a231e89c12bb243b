"""Between the host and a device, without waiting for what the device still computes.

A copy from ordinary memory to a GPU waits for everything before it; one from pinned memory is only queued.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def sent(
    values: Sequence[int] | Sequence[Sequence[float]] | np.ndarray, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """values -> the same on the device."""
    held = torch.as_tensor(values, dtype=dtype)
    return held.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else held.to(device)


class Reading:
    """A tensor on its way to the host."""

    def __init__(self, tensor: Tensor):
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = tensor

    def done(self) -> Tensor:
        """Wait for it."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
