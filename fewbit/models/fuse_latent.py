"""Whether a piece of model code is latent attention as modules.latent has it, told by its values alone."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.models.fuse_forms import differing, elsewhere, off, unknown
from fewbit.modules import latent
from fewbit.modules.latent import HELD, LOW, LatentForm
from fewbit.modules.rotary import RotaryForm

LIMIT = 1e-6  # relative, in float32
GIVEN = "hidden_states", "position_embeddings"  # what of a call is shown again: neither mask nor cache


def is_latent(module: nn.Module) -> bool:
    named = ("q_proj",) if getattr(module, LOW[0], None) is None else LOW
    return all(getattr(module, name, None) is not None for name in (*HELD, *named))


@torch.no_grad()
def latent_form(module: Any, call: Mapping[str, Any], rotaries: Sequence[RotaryForm]) -> LatentForm | str | None:
    """call: by name, as it was seen. rotaries: of functions that its code can call. None: its code asks for more."""
    narrow = deepcopy(module).bfloat16()
    given = {name: cast(call.get(name), torch.float32) for name in GIVEN}
    small = {name: cast(value, torch.bfloat16) for name, value in given.items()}
    try:
        wanted, rounded = (run(m, m, g) for m, g in ((module, given), (narrow, small)))
    except Exception:  # an indexer's masks, another layer's choices
        return None
    errors, shares = [], []
    for rotary in rotaries:
        form = LatentForm(rotary, getattr(module, LOW[0], None) is not None)
        errors.append(off(run(module, form, given), wanted))
        if errors[-1] <= LIMIT:
            shares.append(differing(run(narrow, form, small), rounded))
            if not shares[-1]:
                return form
    if shares:
        return elsewhere(shares)
    return unknown("latent attention", errors) if errors else None


def run(module: Any, how: Any, given: Mapping[str, Any]) -> Tensor:
    """how: a form, or the module itself."""
    if isinstance(how, LatentForm):
        found: tuple[Tensor, ...] = latent.forward(module, how, refuse, **given, attention_mask=None)
    else:
        found = how(**given, attention_mask=None)
    return found[0]


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("its own code is not called without a cache")


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(cast(t, dtype) for t in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
