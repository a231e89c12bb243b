"""Scales by trial: shrink a block's range, round, and keep what loses least of the (weighted) squared error.

Starts from the planes that the spec's own rule chooses and only ever replaces one by a better one, block by block.
After the trials the winner's scale is fitted to its own codes. Values are laid out as [n, R, C]: the n values of a
block come first, so that sums over them run along contiguous memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.algos.rounding import decoded, middle, nearest
from fewbit.quant import elements
from fewbit.quant.blocks import At, blocked, over, part, pieces, regrid
from fewbit.quant.elements import E8M0, Element
from fewbit.quant.ggml_rules import FITS, GGML_RULES, encode_blocks
from fewbit.quant.qtensor import Planes, QTensor, codes, scale_codes, scale_of, store
from fewbit.quant.reference import assign, decode, encode
from fewbit.quant.spec import QuantSpec, Scale

Walk = Callable[["Trial", int], Planes]  # how a search goes on from where it starts

CHUNK = 1 << 17  # values worked on at a time on a CPU
BATCH = 1 << 16  # values of all trials that are made at once
TRIALS = 16
LEAST = {1: 0.3, 2: 0.3, 3: 0.45, 4: 0.6, 5: 0.7, 6: 0.8, 7: 0.85, 8: 0.9}  # bits -> the most that a range shrinks


@dataclass(frozen=True, slots=True)
class Chain:
    """The innermost plane of a chain whose outer planes are values: codes <-> the multiplier of each block."""

    scales: tuple[Scale, ...]
    outer: tuple[Tensor, ...]

    def value(self, stored: Tensor) -> Tensor:
        inner = decoded(stored, self.scales[0].element)
        total = 1 / inner if self.scales[0].op == "div" else inner
        for scale, outer in zip(self.scales[1:], self.outer, strict=True):
            total = total + outer if scale.op == "add" else total / outer if scale.op == "div" else total * outer
        return total

    def codes(self, value: Tensor) -> Tensor:
        for scale, outer in reversed(list(zip(self.scales[1:], self.outer, strict=True))):
            value = value - outer if scale.op == "add" else value * outer if scale.op == "div" else value / outer
        return elements.encode(1 / value if self.scales[0].op == "div" else value, self.scales[0].element)


def chain(scales: tuple[Scale, ...], planes: Planes, shape: tuple[int, ...]) -> Chain:
    """planes: unpacked codes scale1, scale2 ... of a tensor of `shape`."""
    outer = [elements.decode(planes[f"scale{i}"], s.element) for i, s in enumerate(scales[1:], 1)]
    spread = (regrid(v, shape, s.block, scales[0].block) for v, s in zip(outer, scales[1:], strict=True))
    return Chain(scales, tuple(spread))


def encode_searched(
    w: Tensor, spec: QuantSpec, weight: Tensor | None = None, given: Planes | None = None, trials: int = TRIALS
) -> QTensor:
    """w: [N, K] -> codes with searched scales. weight: [K], what an error in each column costs."""
    plain = encode(w, spec, given)
    if not spec.scales:
        return plain
    if spec.rule in GGML_RULES and len(spec.scales) > 1:
        if weight is None:
            return plain
        return best_of(w.float(), plain, encode_blocks(FITS[spec.rule], w.float(), spec, weight), weight)
    base = {name: scale_codes(plain, name) for name in plain.planes if name != "codes"}
    return assign(w.float(), spec, search(w.float(), spec, base, weight, trials))


def search(
    w: Tensor,
    spec: QuantSpec,
    base: Planes,
    weight: Tensor | None,
    trials: int = TRIALS,
    walk: Walk | None = None,
    power: float = 2.0,
) -> Planes:
    """w: [N, K] float32; base: the planes to start from, unpacked -> planes that lose no more, in any block."""
    block = spec.scales[0].block
    held = chain(spec.scales, base, tuple(w.shape))
    found = []
    for at in pieces(w.shape, [block], CHUNK if w.device.type == "cpu" else CHUNK << 8):
        outer = tuple(v if v.numel() == 1 else part(v, at, block, w.shape) for v in held.outer)
        start = {n: part(p, at, block, w.shape) for n, p in base.items() if n in ("scale0", "zero0")}
        x, cost = _laid_out(w[at], block), _cost(w, at, block, weight)
        found.append((walk or by_trials)(Trial(x, cost, spec, Chain(spec.scales, outer), start, power), trials))
    axis = -1 if block[0] < 0 else -2
    return base | {name: torch.cat([f[name] for f in found], axis) for name in found[0]}


def _laid_out(w: Tensor, block: tuple[int, int]) -> Tensor:
    """[N, K] -> [n, R, C]."""
    return blocked(w, block).permute(1, 3, 0, 2).flatten(0, 1).contiguous()


def _cost(w: Tensor, at: At, block: tuple[int, int], weight: Tensor | None) -> Tensor | None:
    """What an error in each value costs, as [n, R, C] or what broadcasts to it; None: the same everywhere."""
    rows, cols = block
    n, k = w[at].shape
    whole = rows in (0, 1) and (not cols or k % cols == 0)
    if weight is None:
        ragged = (n % rows if rows > 0 else 0) or (k % cols if cols and rows >= 0 else 0) or (rows < 0 and n * k % cols)
        return _laid_out(torch.ones(n, k, device=w.device), block) if ragged else None
    floor = weight.float().clamp(min=0) + 1e-6 * weight.float().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return _laid_out(floor.expand(1 if whole and rows == 1 else n, k), block)


def by_trials(state: "Trial", trials: int) -> Planes:
    """The best of start and every trial, block by block."""
    state.shrink(trials)
    if state.spec.scales[0].element != E8M0:
        for _ in range(2):
            state.refit()
    return state.planes


class Trial:
    """x: [n, R, C]; the best planes so far, scale0 (and zero0), and what they lose: cost * |error| ** power.

    Inside, planes are [trials, R, C] and values [n, trials, R, C], so that small blocks try several ranges at once.
    """

    def __init__(self, x: Tensor, cost: Tensor | None, spec: QuantSpec, held: Chain, start: Planes, power: float = 2.0):
        self.x, self.cost = x.unsqueeze(1), None if cost is None else cost.unsqueeze(1)
        self.spec, self.held, self.power = spec, held, power
        self.round = nearest(spec.element, x.device, middle(spec))
        self.best = {name: plane[None] for name, plane in start.items()}
        self.loss = self._loss(self.best)

    @property
    def planes(self) -> Planes:
        return {name: plane[0] for name, plane in self.best.items()}

    def rounded(self, planes: Planes) -> tuple[Tensor, Tensor]:
        """-> the scale, and what it multiplies: code - zero."""
        scale = self.held.value(planes["scale0"])
        zero = zero_units(planes.get("zero0"), scale, self.spec)
        ideal = self.x / scale
        if zero is not None:
            ideal += zero
        found = self.round(ideal, ideal)
        return scale, found if zero is None else found.sub_(zero)

    def _loss(self, planes: Planes) -> Tensor:
        scale, found = self.rounded(planes)
        error = found.mul_(scale).sub_(self.x)
        error = error.square_() if self.power == 2 else error.abs_().pow_(self.power)
        return torch.nan_to_num((error if self.cost is None else error.mul_(self.cost)).sum(0), nan=torch.inf)

    def consider(self, scale0: Tensor, zero0: Tensor | None) -> None:
        planes = {"scale0": scale0} | ({} if zero0 is None else {"zero0": zero0.expand_as(scale0)})
        loss, which = self._loss(planes).min(0, keepdim=True)
        better = loss < self.loss
        self.loss = torch.where(better, loss, self.loss)
        for name, plane in planes.items():
            self.best[name] = torch.where(better, plane.gather(0, which), self.best[name])

    def shrink(self, trials: int) -> None:
        """Try other ranges around that of the planes to start from."""
        scale = self.held.value(self.best["scale0"])
        tried = torch.tensor(factors(self.spec, trials), device=scale.device)[:, None, None]
        at_once = max(1, (BATCH if self.x.device.type == "cpu" else BATCH << 10) // self.x.numel())
        for start in range(0, len(tried), at_once):
            self.consider(*self._shrunk(scale, tried[start : start + at_once]))

    def _shrunk(self, scale: Tensor, factor: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.spec.zeros:
            return self.held.codes(scale * factor), None
        element, zero = self.spec.element, self.spec.zeros[0].element
        low, high = self.x.amin(0).clamp_(max=0) * factor, self.x.amax(0).clamp_(min=0) * factor
        ideal = over(high - low, element.max - element.min)
        stored = self.held.codes(torch.where(ideal > 0, ideal, scale))
        value = self.held.value(stored)
        offset = element.min - low / value if self.spec.zeros_in_codes else element.min * value - low
        return stored, elements.encode(offset, zero)

    def refit(self) -> None:
        """The scale that suits the codes of the best so far; and, with zeros, those of its neighbours."""
        _, found = self.rounded(self.best)
        weighted = found if self.cost is None else found * self.cost
        ideal = (weighted * self.x).sum(0) / (weighted * found).sum(0)
        self.consider(self.stored(ideal), self.best.get("zero0"))
        if "zero0" in self.best and self.spec.zeros_in_codes:
            for step in (-1.0, 1.0):
                self.consider(self.best["scale0"], self.shifted(step))

    def stored(self, ideal: Tensor) -> Tensor:
        """Multipliers as codes; one without sense, or of another sign, leaves the best as it is."""
        known = self.held.value(self.best["scale0"])
        return self.held.codes(torch.where(ideal.isfinite() & (ideal * known > 0), ideal, known))

    def shifted(self, step: Tensor | float) -> Tensor:
        """The zeros of the best, some codes further."""
        element = self.spec.zeros[0].element
        unit = 1.0 if self.spec.zeros_in_codes else self.held.value(self.best["scale0"])
        return elements.encode(decoded(self.best["zero0"], element) + step * unit, element)


def zero_units(zero0: Tensor | None, scale: Tensor, spec: QuantSpec) -> Tensor | None:
    """Stored zeros -> what is added to w / scale before rounding (around the middle code where zeros are codes)."""
    if zero0 is None:
        return None
    value = decoded(zero0, spec.zeros[0].element)
    return value - middle(spec) if spec.zeros_in_codes else value / scale


def factors(spec: QuantSpec, trials: int) -> list[float]:
    """What the range is multiplied with, trial by trial."""
    if spec.scales[0].element == E8M0:
        return [0.5, 2.0]
    least, most = _range(spec.element)
    steps = max(1, trials - 1)
    return [least + (most - least) * i / steps for i in range(trials)]


def _range(element: Element) -> tuple[float, float]:
    if element.kind == "int":
        return LEAST[int(element.bits)], 1.1
    if element.bits <= 4:
        return 0.65, 1.6  # E2M1: the largest value may fall on 4 instead of 6
    return 0.8, 1.25


def best_of(w: Tensor, a: QTensor, b: QTensor, weight: Tensor) -> QTensor:
    """Two ways to hold w: [N, K], block by outermost block the one that loses less."""
    cols = max(s.block[1] for s in (*a.spec.scales, *a.spec.zeros))
    errors = [(decode(q) - w).square_().mul_(weight) for q in (a, b)]
    first, second = (torch.unflatten(e, -1, (-1, cols)).sum(-1) for e in errors)
    better = second < first  # [N, outer blocks]
    planes = {}
    for name in a.planes:
        element = a.spec.element if name == "codes" else scale_of(a.spec, name).element
        one, two = ((codes(q) if name == "codes" else scale_codes(q, name)) for q in (a, b))
        chosen = better.repeat_interleave(one.shape[-1] // better.shape[-1], -1)
        planes[name] = store(torch.where(chosen, two, one), element)
    return replace(a, planes=planes)
