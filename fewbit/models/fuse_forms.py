"""Which form of a norm, a gated MLP or a rotary embedding a piece of model code is, told by its values alone.

In float32 a form must give the same to a few units in the last place. In bfloat16 the one is taken that rounds where
the original does; a gated MLP may also round better than it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import permutations, product
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.models import twin
from fewbit.models.fuse_values import ALREADY
from fewbit.modules import glu, norm, rotary
from fewbit.modules.glu import ACTIVATIONS, ALPHA, HALVES, Gating, GluForm
from fewbit.modules.norm import TIMES, NormForm
from fewbit.modules.rotary import FORMS, RotaryForm

LIMIT = 1e-6  # relative, in float32
REACH = torch.tensor([1.0, 1.0, 30.0, 1e3, 1e5, 1e5])[:, None, None]  # a limit shows only in values beyond it
SPREAD = torch.tensor([1.0, 30.0, 1e3, 1e5, 1e-2, 1e-3, 1e-3, 1e-4])[:, None, None]  # eps matters in small ones
HEAD = 16
Types = tuple[torch.dtype, torch.dtype]
ALIKE = tuple((dtype, dtype) for dtype in (torch.float32, torch.bfloat16))
MIXED = ((torch.bfloat16, torch.float32),)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def norm_form(module: nn.Module, width: int) -> NormForm | str | None:
    """None: it is nothing like a norm."""
    x = random(len(SPREAD), 5, width) * SPREAD
    narrow, small = deepcopy(module).bfloat16(), x.bfloat16()
    wanted, rounded = module(x), narrow(small)
    errors = {f: off(norm.norm(x, *parameters(module), f), wanted) for f in norm_forms(module)}
    forms = [f for f, error in errors.items() if error <= LIMIT]
    if not forms:
        return None if module._parameters.get("weight") is None else unknown("norm", errors.values())
    parted = {f: differing(norm.norm(small, *parameters(narrow), f), rounded) for f in forms}
    found = next((f for f, share in parted.items() if not share), None)
    if type(module).__module__.startswith("torch."):
        return ALREADY
    return found or elsewhere(parted.values())


def norm_forms(module: nn.Module) -> Iterator[NormForm]:
    for eps in {value: None for value in vars(module).values() if isinstance(value, float) and 0 < value < 0.1}:
        yield from (NormForm(eps, times, centred) for centred in (False, True) for times in TIMES)


def parameters(module: nn.Module) -> tuple[Any, Any]:
    return module._parameters.get("weight"), module._parameters.get("bias")


@torch.no_grad()
def glu_form(module: nn.Module, names: Sequence[str], width: int) -> GluForm | str | None:
    """names: of its linears. None: they cannot be a gated MLP's."""
    forms = list(glu_forms(module, names))
    if not forms:
        return None
    x = random(6, 5, width)
    beyond = x * REACH
    wanted = module(beyond)
    errors = {f: each_off(glu.forward(module, f, beyond), wanted) for f in forms}
    forms = [f for f, error in errors.items() if error <= LIMIT]
    if not forms:
        return unknown("gated MLP", errors.values())
    narrow, small = deepcopy(module).bfloat16(), x.bfloat16()
    truth, rounded = deepcopy(narrow).float()(small.float()), narrow(small)
    theirs, ours = distance(rounded, truth), []
    for form in forms:
        got = glu.forward(narrow, form, small)
        ours.append(distance(got, truth))
        if same(got, rounded) or ours[-1] <= theirs:
            return form
    times = sqrt(min(ours) / theirs) if theirs else inf
    return f"it rounds 16-bit values better than the kernel would, whose error is {times:.3g} times as large"


@torch.no_grad()
def gate_form(stack: Any) -> GluForm | str:
    """What a stack of experts does between its projections, if that is act(gate) * up of two halves."""
    x = random(6, 5, 64) * REACH
    wanted, rounded = stack._apply_gate(x), stack._apply_gate(x.bfloat16())
    errors, parted = [], []
    for gating, half in product(gatings(stack), HALVES):
        got, narrow = (glu.act_mul(*HALVES[half](t), gating) for t in (x, x.bfloat16()))
        errors.append(each_off(got, wanted))
        if errors[-1] <= LIMIT:
            parted.append(differing(narrow, rounded))
            if not parted[-1]:
                return GluForm(gating, "gate_up_proj", "", "down_proj", half)
    return elsewhere(parted) if parted else unknown("gate", errors)


def glu_forms(module: nn.Module, names: Sequence[str]) -> Iterator[GluForm]:
    sizes = {name: (m.in_features, m.out_features) for name in names if (m := getattr(module, name))}
    for gating, (gate, *up, down) in product(gatings(module), permutations(names)):
        width = sizes[down][0]
        if up and sizes[gate] == sizes[up[0]] and sizes[gate][1] == width:
            yield GluForm(gating, gate, up[0], down)
        elif not up and sizes[gate][1] == 2 * width:
            yield from (GluForm(gating, gate, "", down, half) for half in HALVES)


def gatings(module: nn.Module) -> Iterator[Gating]:
    """Of every activation, with the numbers that a module holds; those without come first."""
    held = {value: None for value in vars(module).values() if isinstance(value, float) and 0 < value < inf}
    for plus, limit, act in product((0.0, 1.0), (inf, *held), ACTIVATIONS):
        alphas = {ALPHA[act]: None, **held} if act in ALPHA else {1.0: None}
        yield from (Gating(act, alpha, limit, plus) for alpha in alphas)


@torch.no_grad()
def rotary_form(function: Callable[..., Any], axis: str) -> RotaryForm | str:
    """axis: the name of the argument that says which axis counts heads, "" for none."""
    for form in FORMS:
        if agrees(function, axis, form, HEAD, ALIKE):
            part = agrees(function, axis, form, HEAD // 2, ALIKE)
            return replace(form, partial=part, mixed=agrees(function, axis, form, HEAD, MIXED))
    alone = (turned(function, axis, form, HEAD, 1, ALIKE[0]) for form in FORMS)
    return unknown("rotary embedding", (max(map(off, *pair)) for pair in alone if pair is not None))


def agrees(function: Callable[..., Any], axis: str, form: RotaryForm, width: int, dtypes: Sequence[Types]) -> bool:
    """Whether a function turns `width` channels of HEAD as the form does. dtypes: of q and k, and of the tables."""
    for heads, types in ((h, d) for h in ((1, 2) if axis else (1,)) for d in dtypes):
        pair = turned(function, axis, form, width, heads, types)
        test = same if types[0] == torch.bfloat16 else close
        if pair is None or not all(map(test, *pair)):
            return False
    return True


def turned(
    function: Callable[..., Any], axis: str, form: RotaryForm, width: int, heads: int, types: Types
) -> tuple[Sequence[Tensor], Sequence[Tensor]] | None:
    """-> queries and keys as the form turns them and as the function does; None where it is not for such shapes."""
    entries = width // 2 if form.table == "short" else width
    q, k, cos, sin = (
        random(2, 5, 4, HEAD),
        random(2, 5, 2, HEAD, seed=1),
        random(2, 5, entries),
        random(2, 5, entries, seed=2),
    )
    given = [t.to(types[0]) for t in ((q, k) if heads == 2 else (q.transpose(1, 2), k.transpose(1, 2)))]
    tables = [t.to(types[1]) for t in (cos, sin)]
    try:
        wanted = function(*given, *tables, **({axis: heads} if axis else {}))
    except (RuntimeError, IndexError):
        return None
    got = rotary.rotate(*given, *tables, form, heads)  # type: ignore[call-arg]
    fits = len(wanted) == 2 and all(a.shape == b.shape for a, b in zip(got, wanted, strict=True))
    return (got, wanted) if fits else None


def unknown(what: str, errors: Iterable[float]) -> str:
    """Of a module that is no form of what it looks like. errors: of each form."""
    return f"its values are those of no {what} that is known, the nearest is off by {min(errors, default=inf):.2g}"


def elsewhere(shares: Iterable[float]) -> str:
    """Of a module that is a form, in float32. shares: of its 16-bit values that each form gives otherwise."""
    return f"it rounds 16-bit values where no form does, {min(shares):.1%} of them otherwise"


def off(got: Tensor, wanted: Tensor) -> float:
    return twin.relative(got, wanted) if got.dtype == wanted.dtype else inf


def each_off(got: Tensor, wanted: Tensor) -> float:
    """The most of any along the first axis, whose sizes differ."""
    return max(map(off, got, wanted), default=inf) if got.shape == wanted.shape else inf


def close(got: Tensor, wanted: Tensor) -> bool:
    return off(got, wanted) <= LIMIT


def same(got: Tensor, wanted: Tensor) -> bool:
    return got.dtype == wanted.dtype and torch.equal(got, wanted)


def differing(got: Tensor, wanted: Tensor) -> float:
    """The share of values that are not equal."""
    return float((got != wanted).float().mean()) if got.dtype == wanted.dtype else 1.0


def distance(got: Tensor, truth: Tensor) -> float:
    return float((got.float() - truth).square().mean())
