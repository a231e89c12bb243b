"""Kernels that may begin before the last one ends: between the small ones of a step, launching is half of the time.

Where a GPU can do that (compute capability 9.0), a kernel's first act is to let the next one be launched, and then to
wait until all that the ones before it have written is there. So nothing may be read or written, and no program may
leave, before `begin`. What is launched without it waits as ever.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fewbit.kernels import few


@triton.jit
def begin(EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@cache
def early(device: torch.device) -> dict[str, bool]:
    """What a launch there is given beside its arguments."""
    able = device.type == "cuda" and torch.version.cuda is not None
    if able and torch.cuda.get_device_capability(device) >= few.LEAST:
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}
