"""GPTQ (arXiv 2210.17323): columns rounded one by one, the error of each made up for by those that follow.

Two things go beyond the paper. The scales of a block are searched with errors weighted by the diagonal of H. And
afterwards codes, scales and zeros are revisited one by one with all others held, which only ever lowers tr(E H E^T).

order: "weight" takes blocks by their largest diagonal and keeps each together; "static" takes columns alone, with
scales chosen before; "group" makes blocks of columns in the new order, which a checkpoint must store.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

import torch
from torch import Tensor

from fewbit.algos.algo import Algo, Encoded, Stats, shared_planes
from fewbit.algos.hessian import Factor, Order, cost, dead_columns, factor, order, rotated, rotation, usable
from fewbit.algos.rounding import middle, nearest
from fewbit.algos.search import TRIALS
from fewbit.algos.stacks import LONGEST, Stack
from fewbit.algos.sweep import descend, feed, runs
from fewbit.errors import SpecError
from fewbit.quant.qtensor import QTensor, Transform
from fewbit.quant.reference import decode
from fewbit.quant.reference import encode as encode_plain
from fewbit.quant.spec import QuantSpec

ORDERS = ("off", "weight", "group", "static")
RETRIES = 4  # times that damping is raised tenfold


@dataclass(frozen=True, slots=True)
class Options:
    damp: float = 0.01  # of the mean of H's diagonal
    order: Order = "weight"
    block: int = LONGEST  # columns worked on at a time
    scale: Literal["amax", "mse"] = "mse"
    trials: int = TRIALS  # ranges tried by mse
    hadamard: int = 0  # inputs are rotated in runs of this many columns
    refine: int = 2  # passes of coordinate descent

    def __post_init__(self) -> None:
        if self.scale not in ("amax", "mse") or self.order not in ORDERS:
            raise SpecError(f"gptq: scale={self.scale!r}, order={self.order!r}; want amax or mse, {', '.join(ORDERS)}")
        if self.damp < 0 or self.block < 1 or self.trials < 1 or self.refine < 0:
            raise SpecError(f"gptq: damp, block, trials and refine cannot be below 0, 1, 1 and 0: {self}")
        if self.hadamard < 0 or self.hadamard & (self.hadamard - 1):
            raise SpecError(f"gptq: hadamard={self.hadamard}; want a power of two, or 0 for none")


def encode(group: Sequence[Tensor], specs: Sequence[QuantSpec], stats: Stats | None, options: Options) -> list[Encoded]:
    plain = _plain(group, specs)
    h = None if stats is None or stats.hessian is None else usable(stats.hessian.float())
    reason = _hopeless(h)
    if reason or h is None:
        return [Encoded(q, log={"why": f"rounded to nearest: {reason}"}) for q in plain]
    weights = [w.float() for w in group]
    floor = [cost(decode(q) - w, h) for q, w in zip(plain, weights, strict=True)]
    options, notes = _possible(options, h)
    found = _attempt(weights, specs, h, options, floor)
    if any(e.transforms for e in found) and not _good(found, floor):
        notes.append("no transform: it lost more than rounding to nearest")
        found = _attempt(weights, specs, h, replace(options, hadamard=0, order="weight"), floor)
    return [_settled(e, q, f, notes) for e, q, f in zip(found, plain, floor, strict=True)]


def _plain(group: Sequence[Tensor], specs: Sequence[QuantSpec]) -> list[QTensor]:
    held = shared_planes(group, specs)
    return [encode_plain(w, spec, given) for w, spec, given in zip(group, specs, held, strict=True)]


def _hopeless(h: Tensor | None) -> str:
    """Why a Hessian is of no use, if it is not."""
    if h is None:
        return "no hessian among the statistics"
    if not bool(torch.isfinite(h).all()):
        return "the hessian is not finite"
    return "no input was ever active" if bool(dead_columns(h).all()) else ""


def _possible(options: Options, h: Tensor) -> tuple[Options, list[str]]:
    if options.hadamard and h.shape[0] % options.hadamard:
        note = f"no rotation: runs of {options.hadamard} do not divide {h.shape[0]} columns"
        return replace(options, hadamard=0), [note]
    return options, []


def _good(found: Sequence[Encoded], floor: Sequence[float]) -> bool:
    return all(e.log["loss"] <= f for e, f in zip(found, floor, strict=True))


def _settled(found: Encoded, plain: QTensor, floor: float, notes: Sequence[str]) -> Encoded:
    log = {**found.log, "rtn_loss": floor}
    if found.log["loss"] > floor:
        notes = [*notes, f"rounded to nearest: that lost {floor:.6g}, and this {found.log['loss']:.6g} at best"]
        found, log = replace(found, weight=plain, transforms=()), log | {"loss": floor}
    return replace(found, log=log | ({"why": "; ".join(notes)} if notes else {}))


def _attempt(
    weights: Sequence[Tensor], specs: Sequence[QuantSpec], h: Tensor, options: Options, floor: Sequence[float]
) -> list[Encoded]:
    """Spec by spec, each on its own stack."""
    beside: tuple[Transform, ...] = ()
    if options.hadamard:
        beside = (rotation(options.hadamard, h.device),)
        weights, h = rotated(weights, h, options.hadamard)
    found: dict[int, Encoded] = {}
    held = shared_planes(weights, specs)
    for spec in dict.fromkeys(specs):
        members = [i for i, s in enumerate(specs) if s == spec]
        stack = Stack(spec, [weights[i] for i in members], held[members[0]], options.trials * (options.scale == "mse"))
        solved = _damped(stack, h, options, [floor[i] for i in members])
        found |= {i: replace(e, transforms=(*beside, *e.transforms)) for i, e in zip(members, solved, strict=True)}
    return [found[i] for i in range(len(weights))]


def _damped(stack: Stack, h: Tensor, options: Options, floor: Sequence[float]) -> list[Encoded]:
    """Of each weight the best, over as much damping as it takes until all are better than rounding to nearest."""
    best: list[Encoded] = []
    damp = options.damp
    for _ in range(1 + RETRIES):
        found = _solve(stack, h, options, damp)
        if found:
            best = [a if a.log["loss"] <= b.log["loss"] else b for a, b in zip(best or found, found, strict=True)]
        if best and _good(best, floor):
            break
        damp = max(10 * damp, 1e-4)
    lost = {"loss": inf, "damp": damp}
    return best or [Encoded(encode_plain(w, stack.spec, stack.given), log=lost) for w in stack.weights]


def _solve(stack: Stack, h: Tensor, options: Options, damp: float) -> list[Encoded]:
    """One solution at one damping; none where H has no factors, or the errors grow beyond what scales can hold."""
    cols = stack.cols if stack.cols < stack.k else 0
    index = order(h, options.order, cols)
    beside: tuple[Transform, ...] = ()
    if index is not None and cols and options.order == "group":
        beside = (Transform("permute", {"index": index}),)
        stack, h, index = replace(stack, weights=[w[:, index] for w in stack.weights]), h[index][:, index], None
    if index is None:
        index = torch.arange(stack.k, device=h.device)
    factors = factor(h, damp, index)
    try:
        solved = factors and _loop(stack, factors, index, options)
    except SpecError:
        solved = None
    dead = int(dead_columns(h).sum())
    out = []
    for q, w in zip(solved or (), stack.weights, strict=False):
        log = {"loss": cost(decode(q) - w, h), "damp": damp, "dead": dead, "order": options.order}
        out.append(Encoded(q, beside, log))
    return out


def _loop(stack: Stack, factors: Factor, index: Tensor, options: Options) -> list[QTensor]:
    whole = torch.cat(list(stack.weights))
    back = index.argsort()
    diagonal = factors.h.diagonal()
    rounding = nearest(stack.spec.element, whole.device, middle(stack.spec))
    wait = stack.waits and options.order != "static"
    codes = stack.begin(whole, index, diagonal[back], wait)
    w = whole.T[index].contiguous()
    cut = runs(codes.group, stack.cols if wait else options.block)

    def choose(g: int, target: Tensor, at: slice) -> None:
        stack.choose(codes, g, target, diagonal[at])

    feed(w, factors.a, codes, rounding, cut, choose if wait else None)
    moves = stack.moves() if wait else None
    for _ in range(options.refine):
        descend(w, factors.h, codes, rounding, cut, moves)
    if moves is not None and options.refine:
        stack.settle(codes)
    return stack.finish(codes.weight(slice(None))[back].T)


def leaves(options: Options) -> tuple[str, ...]:
    """What stands beside the codes: the turned runs of inputs, the order of columns."""
    return (("rotate",) if options.hadamard else ()) + (("permute",) if options.order == "group" else ())


ALGO = Algo(
    "gptq", "columns rounded one by one, the error of each made up for by the next", Options, encode,
    frozenset({"hessian"}), leaves=leaves,
)  # fmt: skip
