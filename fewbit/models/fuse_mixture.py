"""Whether a module adds up a router's experts and a shared one, told by its values alone."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch

from fewbit.models.fuse_forms import differing, off, random
from fewbit.modules import mixture
from fewbit.modules.mixture import MixtureForm

LIMIT = 1e-6  # relative, in float32


@torch.no_grad()
def mixture_form(
    module: Any, router: str, stack: str, others: Sequence[str], flat: bool, width: int
) -> MixtureForm | None:
    """others: names of children, one of which may be the shared expert. None: it does something else."""
    x, narrow = random(2, 9, width), deepcopy(module).bfloat16()
    wanted, rounded = module(x), narrow(x.bfloat16())
    for form in (MixtureForm(router, stack, shared, flat) for shared in others):
        got = mixture.forward(module, form, x)
        if off(got, wanted) <= LIMIT and not differing(mixture.forward(narrow, form, x.bfloat16()), rounded):
            return form
    return None
