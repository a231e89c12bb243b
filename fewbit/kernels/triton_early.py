"""Kernels that may begin before the last one ends: between the small ones of a step, launching is half of the time.

Where a GPU can do that (compute capability 9.0), a kernel's first act is to let the next one be launched, and then it
waits until all that the ones before it have written is there. No program may write before that; some may leave, but not
all. Read may be what no such kernel has made: weights, and what plain kernels or copies have (where texts lie, rotary
tables), for those wait as ever and are waited for. So a chain of such reads, half of what a small kernel takes, goes
between `let_next` and `await_last`; `begin` is both.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fewbit.kernels import few


@triton.jit
def begin(EARLY: tl.constexpr):
    let_next(EARLY)
    await_last(EARLY)


@triton.jit
def let_next(EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def await_last(EARLY: tl.constexpr):
    if EARLY:
        gdc_wait()


@cache
def early(device: torch.device) -> dict[str, bool]:
    """What a launch there is given beside its arguments."""
    able = device.type == "cuda" and torch.version.cuda is not None
    if able and torch.cuda.get_device_capability(device) >= few.LEAST:
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}
