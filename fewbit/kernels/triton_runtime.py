"""Whether kernels in Triton can run on a device: compiled for a GPU, or by its interpreter, which tests use on a CPU.

Modules that hold such kernels import triton at their top, so they are imported only once `lacking` says None.
"""

from importlib.util import find_spec

import torch

from fewbit import env


def lacking(device: torch.device) -> str | None:
    """Why they cannot run there."""
    if find_spec("triton") is None:
        return "needs triton: pip install 'fewbit[gpu]'"
    if device.type == "cuda" or env.triton_interpreted():
        return None
    return f"Triton compiles for GPUs, not for {device.type}"


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up: Triton's own takes 4 us, since kernels may call it too."""
    return -(-a // b)


def power(count: int) -> int:
    """The least power of two >= count; 0 of 0."""
    return 1 << (count - 1).bit_length() if count else 0
