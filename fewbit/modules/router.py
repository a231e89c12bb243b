"""Router: which experts a token goes to and with what weights, in the forms that models have; the choice is one kernel.

Scores are made of the logits, experts chosen by them (a bias added, whole groups of experts left out first), and the
scores of those chosen become weights: made anew, divided by their sum, scaled. All of it is in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

Score = Literal["softmax", "sigmoid", "none"]
SCORES: dict[Score, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "sigmoid": torch.sigmoid,
    "none": lambda x: x,
}
Product = Literal["own", "wide", "cast"]  # in x's type; of float32; in x's type, then cast to float32
By = Literal["two", "one"]  # what a group is worth: its two best added up, its best
Divide = Literal["no", "plus", "least"]  # by no sum; by the sum + eps; by the sum, eps at least
GIVEN = "given"  # a bias that is no tensor of the module's, but given with every call


@dataclass(frozen=True, slots=True)
class Groups:
    """Names of two numbers of a module: of groups, and of those left in. The others' scores become `fill`."""

    count: str
    kept: str
    by: By = "two"
    fill: float = -inf
    weighed: bool = False  # what is filled in is also what would be weighed


@dataclass(frozen=True, slots=True)
class RouteForm:
    """Strings are names of what a module holds, "" for none. bias: added to scores to choose; shift: to logits.

    then: what chosen scores become. narrow: weights have x's type at the end. ordered: the best expert comes first.
    """

    top: str
    product: Product = "own"
    score: Score = "softmax"
    bias: str = ""
    shift: str = ""
    groups: Groups | None = None
    then: Score = "none"
    divide: Divide = "no"
    eps: float = 0.0
    scale: str = ""
    narrow: bool = False
    ordered: bool = True

    def __str__(self) -> str:
        parts = [
            f"best {self.top} by {'logit' if self.score == 'none' else self.score}",
            f" + {self.bias}" if self.bias else "",
            f" within {self.groups.kept} of {self.groups.count}" if self.groups else "",
            f", {self.then} of those" if self.then != "none" else "",
            "" if self.divide == "no" else ", by their sum",
            f", times {self.scale}" if self.scale else "",
        ]
        return "".join(parts)


@dataclass(frozen=True, slots=True)
class Choice:
    """A form with the numbers of one module in it."""

    form: RouteForm
    top: int
    scale: float = 1.0
    groups: int = 1
    kept: int = 1

    @classmethod
    def of(cls, module: nn.Module, form: RouteForm) -> "Choice":
        groups = (getattr(module, form.groups.count), getattr(module, form.groups.kept)) if form.groups else (1, 1)
        return cls(form, getattr(module, form.top), getattr(module, form.scale) if form.scale else 1.0, *groups)


def forward(module: Any, form: RouteForm, hidden: Tensor, *given: Tensor, **named: Tensor) -> Any:
    """What stands for a router's own forward. hidden: [..., H] -> logits [T, E], weights [T, k], experts [T, k]."""
    if form.product != "wide" and hidden.dtype != module.weight.dtype:
        return type(module).forward(module, hidden, *given, **named)
    x = hidden.reshape(-1, hidden.shape[-1])
    logits = product(x, module.weight, held(module, form.shift), form.product)
    bias = (*given, *named.values())[0] if form.bias == GIVEN else held(module, form.bias)
    weights, experts = choose(logits, bias, Choice.of(module, form), x.dtype if form.narrow else torch.float32)
    return logits, weights, experts


def held(module: Any, name: str) -> Tensor | None:
    """A tensor of a module or of its children."""
    if not name:
        return None
    path, _, leaf = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(path), leaf)
    return found


def product(x: Tensor, weight: Tensor, shift: Tensor | None, how: Product) -> Tensor:
    """x: [T, H], weight: [E, H], shift: [E] -> [T, E]."""
    if how != "wide":
        y = linear(x, weight, shift)
        return y.float() if how == "cast" else y
    learning = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if x.dtype == weight.dtype and shift is None and not learning:
        return wide(x, weight)
    return linear(x.float(), weight.float(), None if shift is None else shift.float())


def wide(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in float32 of values of one type: products of 16-bit values are exact there, none need be cast before."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, weight.mT, out_dtype=torch.float32)
    return linear(x.float(), weight.float())


def choose(logits: Tensor, bias: Tensor | None, by: Choice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """logits: [T, E] -> weights [T, k] of a type and experts [T, k], by the kernel that takes them."""
    if logits.is_cuda and kernel().takes(logits, bias, by.top):
        found: tuple[Tensor, Tensor] = kernel().choose(logits, bias, by, dtype)
        return found
    weights, experts = chosen(logits, bias, by)
    return weights.to(dtype), experts


def chosen(logits: Tensor, bias: Tensor | None, by: Choice) -> tuple[Tensor, Tensor]:
    """The same in the operations that models write; the oracle. -> weights in float32."""
    form = by.form
    scores = SCORES[form.score](logits.float())
    wanted = scores if bias is None else scores + bias.float().flatten()
    if form.groups is not None:
        out = left_out(wanted, by.groups, by.kept, form.groups.by)
        wanted = wanted.masked_fill(out, form.groups.fill)
        scores = scores.masked_fill(out, form.groups.fill) if form.groups.weighed else scores
    experts = torch.topk(wanted, by.top, dim=-1, sorted=form.ordered).indices
    weights = SCORES[form.then](scores.gather(-1, experts))
    if form.divide != "no":
        total = weights.sum(-1, keepdim=True)
        weights = weights / (total + form.eps if form.divide == "plus" else total.clamp(min=form.eps))
    return weights * by.scale if form.scale else weights, experts


def left_out(wanted: Tensor, groups: int, kept: int, by: By) -> Tensor:
    """[T, E] -> which experts are in none of the best groups, [T, E]."""
    each = wanted.unflatten(-1, (groups, -1))
    worth = each.topk(2, dim=-1)[0].sum(-1) if by == "two" else each.amax(-1)
    best = torch.topk(worth, kept, dim=-1, sorted=False).indices
    out = torch.ones_like(worth, dtype=torch.bool).scatter_(-1, best, False)
    return out[..., None].expand_as(each).flatten(-2)


@cache
def kernel() -> Any:
    from fewbit.kernels import triton_choose

    return triton_choose
