"""Whether a piece of model code is latent attention as modules.latent has it, told by its values alone.

Twice: as it stands, and through its latent over pages, where a query sees what is before it.
"""

from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.models.fuse_forms import differing, distance, elsewhere, off, unknown
from fewbit.modules import latent, paged
from fewbit.modules.latent import HELD, LOW, LatentForm
from fewbit.modules.paged import Span, Step
from fewbit.modules.rotary import FORMS, RotaryForm

LIMIT = 1e-6  # relative, in float32
TIMES = 2  # how much farther than its own code from float32 it may be in bfloat16 through the latent, squared
COMPLEX = tuple(f for f in FORMS if f.table == "short" and f.wide)  # of tables of complex numbers
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
    turns = given[GIVEN[1]]
    for rotary in COMPLEX if isinstance(turns, Tensor) and turns.is_complex() else rotaries:
        form = LatentForm(rotary, getattr(module, LOW[0], None) is not None)
        errors.append(off(run(module, form, given), wanted))
        if errors[-1] <= LIMIT:
            shares.append(differing(run(narrow, form, small), rounded))
            if not shares[-1]:
                return replace(form, through=goes_through(module, narrow, form, given, small))
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


def goes_through(
    module: Any, narrow: Any, form: LatentForm, given: Mapping[str, Any], small: Mapping[str, Any]
) -> bool:
    """Whether it gives the same so, in float32 and as far as rounding goes in bfloat16. narrow, small: in bfloat16."""
    if not isinstance(getattr(module, "layer_idx", None), int) or latent.plain(module.kv_b_proj) is None:
        return False
    truth = before(module, given)
    if off(through(module, form, given), truth) > LIMIT:
        return False
    return distance(through(narrow, form, small), truth) <= TIMES * distance(before(narrow, small), truth)


def before(module: Any, given: Mapping[str, Any]) -> Tensor:
    """Its own code on the first text, each token seeing those before it."""
    one = first(given)
    count = one[GIVEN[0]].shape[1]
    mask = torch.full((1, 1, count, count), torch.finfo(one[GIVEN[0]].dtype).min, dtype=one[GIVEN[0]].dtype).triu(1)
    found: tuple[Tensor, ...] = module(**one, attention_mask=mask)
    return found[0]


def through(module: Any, form: LatentForm, given: Mapping[str, Any]) -> Tensor:
    """The same over pages, in two steps."""
    there, one = copy(module), first(given)
    there.config = copy(module.config)
    there.config._attn_implementation = paged.NAME
    count = one[GIVEN[0]].shape[1]
    slots, caches, found = torch.randperm(count, generator=torch.Generator().manual_seed(0)), {}, []
    for start, stop in ((0, count - 1), (count - 1, count)):
        spans = [Span(0, stop - start, stop, slots[:stop])]
        step = Step(slots[start:stop], lambda spans=spans: spans, caches, count)  # type: ignore[misc]
        with paged.stepping(step):
            part = {name: cut(value, start, stop) for name, value in one.items()}
            found.append(latent.forward(there, replace(form, through=True), refuse, **part)[0])
    return torch.cat(found, 1)


def first(given: Mapping[str, Any]) -> dict[str, Any]:
    """The first text of a call."""

    def one(value: Any) -> Any:
        return tuple(map(one, value)) if isinstance(value, tuple) else value[:1]

    return {name: one(value) for name, value in given.items()}


def cut(value: Any, start: int, stop: int) -> Any:
    """Some of its tokens."""
    return tuple(cut(t, start, stop) for t in value) if isinstance(value, tuple) else value[:, start:stop]


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("its own code is not called without a cache")


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(cast(t, dtype) for t in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
