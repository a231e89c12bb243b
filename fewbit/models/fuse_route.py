"""Which form of a router a piece of model code is, told by its values alone.

Its weight is made to hand the first channels through as logits, so any can be shown to it: far ones, equal ones, some
so low that only what is added to a sum keeps it from zero. A number is a name: those of a twin are small and alike, so
they are changed, and the code must follow.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import permutations, product
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.models.fuse_forms import differing, elsewhere, random, same, unknown
from fewbit.modules import router
from fewbit.modules.router import GIVEN, SCORES, Groups, RouteForm

LIMIT = 1e-6  # relative, of each weight
EPS = (0.0, 1e-20, 1e-15, 1e-12, 1e-9, 1e-6, 1e-5)
OTHER = {"top": 3, "groups": 4, "kept": 2}  # numbers that a twin has not


@dataclass(frozen=True, slots=True)
class Shown:
    """A copy of a router whose logits are its input's first channels, what it was shown and what it gave."""

    module: Any
    x: Tensor
    given: tuple[Tensor, ...]
    weights: Tensor
    experts: Tensor


def is_router(args: Sequence[Any], output: Any) -> bool:
    """Whether a call's result is logits [T, E], weights [T, k] and experts [T, k]."""
    if not (
        isinstance(output, tuple) and len(output) == 3 and all(isinstance(t, Tensor) and t.dim() == 2 for t in output)
    ):
        return False
    logits, weights, experts = output
    return (
        len(args) in (1, 2) and logits.is_floating_point() and experts.dtype == torch.int64
        and weights.is_floating_point() and weights.shape == experts.shape and logits.shape[1] > weights.shape[1]
    )  # fmt: skip


@torch.no_grad()
def route_form(module: nn.Module, args: Sequence[Tensor], logits: Tensor) -> RouteForm | str | None:
    """None: its product is that of some linear in it, or of no matrix at all."""
    weight = module._parameters.get("weight")
    experts, width = logits.shape[1], args[0].shape[-1]
    if weight is None or weight.shape != (experts, width) or experts > width:
        return None
    if any(t.numel() != experts for t in args[1:]):
        return None
    vectors = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.numel() == experts]
    numbers = [n for n, v in vars(module).items() if type(v) is int and v not in (experts, width)]
    made = next(products(module, vectors, args), None)
    if made is None:
        return "its logits are no product of its weight and its input"
    top = next((n for n in numbers if follows(module, n, args)), None)
    if top is None:
        return "how many it chooses is no number that it holds"
    others = [n for n in numbers if n != top]
    return chooses(module, replace(made, top=top), [v for v in vectors if v != made.shift], others, args)


def products(module: nn.Module, vectors: Sequence[str], args: Sequence[Tensor]) -> Iterator[RouteForm]:
    """Forms that have its logits, also in 16 bits."""
    narrow = deepcopy(module).bfloat16()
    given = [t.bfloat16() for t in args]
    wanted, rounded = module(*args)[0], narrow(*given)[0]
    for shift, how in product(("", *vectors), ("own", "wide", "cast")):
        pairs = ((module, args, wanted), (narrow, given, rounded))
        made = [router.product(a[0].flatten(0, -2), m.weight, router.held(m, shift), how) for m, a, _ in pairs]
        if all(same(got, want) for got, (*_, want) in zip(made, pairs, strict=True)):
            yield RouteForm("", how, shift=shift)


def follows(module: nn.Module, name: str, args: Sequence[Tensor]) -> bool:
    """Whether a number of this name is how many experts it chooses."""
    copy = deepcopy(module)
    setattr(copy, name, OTHER["top"])
    try:
        return bool(copy(*args)[2].shape[1] == OTHER["top"])
    except (RuntimeError, IndexError):
        return False


def chooses(
    module: nn.Module, start: RouteForm, vectors: Sequence[str], numbers: Sequence[str], args: Sequence[Tensor]
) -> RouteForm | str:
    """The form of the choice and of the weights."""
    shown = show(module, args)
    biases = ["", *vectors, *([GIVEN] if args[1:] else [])]
    errors: dict[RouteForm, float] = {}
    for form in choices(start, biases, numbers):
        if not torch.equal(run(shown, form)[1], shown.experts):
            continue
        other = changed(module, form, args)
        if other is None or not torch.equal(run(other, form)[1], other.experts):
            continue
        for full in weighings(module, form):
            errors[full] = max(off(run(s, full)[0], s.weights) for s in (shown, other))
            if not errors[full]:
                return rounding(module, full, args)
    best = min(errors, key=errors.__getitem__, default=None)
    return rounding(module, best, args) if best and errors[best] <= LIMIT else unknown("router", errors.values())


def choices(start: RouteForm, biases: Sequence[str], numbers: Sequence[str]) -> Iterator[RouteForm]:
    groups = [
        Groups(*names, by, fill)  # type: ignore[arg-type]
        for names, by, fill in product(permutations(numbers, 2), ("two", "one"), (-inf, 0.0))
    ]
    for held, score, bias, ordered in product((None, *groups), ("softmax", "sigmoid", "none"), biases, (True, False)):
        yield replace(start, score=score, bias=bias, groups=held, ordered=ordered)  # type: ignore[arg-type]


def weighings(module: nn.Module, form: RouteForm) -> Iterator[RouteForm]:
    held = {n: v for n, v in vars(module).items() if type(v) in (int, float) and n != form.top}
    eps = dict.fromkeys((*EPS, *(v for v in held.values() if 0 < v < 0.1)))
    divides = [("no", 0.0), *(("plus", e) for e in eps), *(("least", e) for e in eps if e)]
    scales = ["", *(n for n, v in held.items() if v not in (0, 1))]
    masks = [form.groups] if form.groups is None else [form.groups, replace(form.groups, weighed=True)]
    for groups, then, (divide, e), scale in product(masks, SCORES, divides, scales):
        yield replace(form, groups=groups, then=then, divide=divide, eps=e, scale=scale)  # type: ignore[arg-type]


def show(module: nn.Module, args: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Shown:
    copy = deepcopy(module).to(dtype)
    weight = copy._parameters["weight"]
    assert weight is not None
    experts, width = weight.shape
    weight.copy_(torch.eye(experts, width))
    for n, (_, t) in enumerate((*copy.named_parameters(), *copy.named_buffers())):
        if t.numel() == experts and t.is_floating_point():
            t.copy_(random(*t.shape, seed=n + 2) / 2)
    x = random(7 * 16, width, seed=1)
    rows = x.split(16)
    rows[1].mul_(30)
    for row, low in zip(rows[2:6], (-14, -21, -28, -46), strict=True):  # sigmoids of 1e-6 to 1e-20
        row.add_(low)
    rows[6].round_()  # equal ones
    given = tuple(random(*t.shape, seed=9).to(dtype) / 2 for t in args[1:])
    x = x.to(dtype) if args[0].dim() == 2 else x.to(dtype)[None]
    _, weights, index = copy(x, *given)
    return Shown(copy, x, given, weights, index)


def changed(module: nn.Module, form: RouteForm, args: Sequence[Tensor]) -> Shown | None:
    """More experts, and other numbers under the form's names. None: its code does not go on with them."""
    copy, width = deepcopy(module), args[0].shape[-1]
    experts = len(module._parameters["weight"])  # type: ignore[arg-type]
    for held in (held for part in copy.modules() for held in (part._parameters, part._buffers)):
        for name, t in held.items():
            if t is not None and t.numel() == experts:
                made = t.new_empty(*t.shape[:-1], width)
                held[name] = nn.Parameter(made) if isinstance(t, nn.Parameter) else made
    copy._parameters["weight"] = nn.Parameter(torch.empty(width, width))
    for name in [n for n, v in vars(copy).items() if type(v) is int and v == experts]:
        setattr(copy, name, width)
    setattr(copy, form.top, OTHER["top"])
    if form.groups is not None:
        setattr(copy, form.groups.count, OTHER["groups"])
        setattr(copy, form.groups.kept, OTHER["kept"])
    try:
        return show(copy, (args[0], *(t.new_empty(width) for t in args[1:])))
    except (RuntimeError, IndexError):
        return None


def run(shown: Shown, form: RouteForm) -> tuple[Tensor, Tensor]:
    """-> weights and experts as the form has them, for the logits that were shown."""
    try:
        _, weights, experts = router.forward(shown.module, form, shown.x, *shown.given)
    except (RuntimeError, IndexError):  # numbers that cannot be those of groups
        return shown.weights.new_empty(0), shown.experts.new_empty(0)
    return weights, experts


def rounding(module: nn.Module, form: RouteForm, args: Sequence[Tensor]) -> RouteForm | str:
    """The form that gives the same in 16 bits."""
    shown = show(module, args, torch.bfloat16)
    shares = []
    for narrow in (False, True):
        weights, experts = run(shown, replace(form, narrow=narrow))
        shares.append(differing(weights, shown.weights) if torch.equal(experts, shown.experts) else 1.0)
        if not shares[-1]:
            return replace(form, narrow=narrow)
    return elsewhere(shares)


def off(got: Tensor, wanted: Tensor) -> float:
    """The most of any weight, relative to itself."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype or not bool(wanted.isfinite().all()):
        return inf
    error = (got - wanted).abs() / wanted.abs().clamp_min(torch.finfo(wanted.dtype).tiny)
    return float(error.nan_to_num(inf).max())
