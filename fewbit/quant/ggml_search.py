"""The search for scales behind the K types and IQ4: least weighted squared error, by trial and refinement.

Given the codes c of a sub-block, the best scale is a ratio of sums; given the scale, the best codes are the nearest.
Trials lay the extreme value on several points around the end of the range; the winner is refined with its own codes.
Scales that are themselves integers times a float16 are fitted the same way one level up, weighted by what an error in
each would cost, and then their neighbours are tried against the weights themselves.

x: [..., n], one sub-block along its last axis; w: None, or weights of its squared error that broadcast to it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewbit.quant import elements
from fewbit.quant.elements import Element

Quantize = Callable[[Tensor], Tensor]
TRIALS = tuple(i / 4 for i in range(-4, 5))  # in steps of the element, around the end of its range
ROUNDS = 2


def inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 where d is too small to have a reciprocal."""
    return torch.where(d.abs() < torch.finfo(torch.float32).tiny, 0.0, 1 / d)


def extreme(x: Tensor) -> Tensor:
    """[..., n] -> [..., 1]: the first of the values that are largest in magnitude."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


def quantizer(element: Element) -> Quantize:
    """-> a function that rounds to the values of an element."""
    if element.kind == "int":
        return lambda x: x.round().clamp_(element.min, element.max)
    # midpoints of IQ4 are whole or half numbers, so bins of a half decide; 25 times as fast as a search by bisection
    bins = torch.arange(-256, 256) / 2 + 0.25
    nearest = elements.decode(elements.encode(bins, element), element)
    return lambda x: nearest.to(x.device).index_select(0, (x * 2 + 256).clamp_(0, 511).int().view(-1)).view(x.shape)


def half(x: Tensor) -> Tensor:
    """Rounded to float16, in float32."""
    return x.half().float()


def symmetric(x: Tensor, w: Tensor | None, element: Element) -> tuple[Tensor, Tensor]:
    """value = c * d -> (codes, d [..., 1] float32 that float16 holds)."""
    d = half(best_scale(x, w, element)[0])
    return elements.encode(x * inverse(d), element), d


def two_level(x: Tensor, w: Tensor | None, element: Element, inner: Element) -> tuple[Tensor, Tensor, Tensor]:
    """x: [..., S, n]; value = c * i * d -> (codes, i [..., S], d [..., 1])."""
    quantize, integer = quantizer(element), quantizer(inner)
    scale, cost = (t.squeeze(-1) for t in best_scale(x, w, element))
    d = half(best_scale(scale, cost, inner)[0])
    i = integer(scale * inverse(d))
    kept: list[tuple[Tensor, ...]] = []
    for _ in range(ROUNDS):
        i, a, b = _neighbours(x, w, quantize, integer, d, i)
        error = (i * d * (i * d * b - 2 * a)).sum(-1, keepdim=True)
        kept.append((error, d, i))
        d = half((i * a).sum(-1, keepdim=True) * inverse((i * i * b).sum(-1, keepdim=True)))
    d, i = _least(kept)
    return elements.encode(x * inverse(i * d).unsqueeze(-1), element), i, d


def two_level_offset(x: Tensor, w: Tensor | None, element: Element, inner: Element) -> tuple[Tensor, ...]:
    """x: [..., S, n]; value = c * i * d - j * e -> (codes, i, j [..., S], d, e [..., 1])."""
    quantize, integer = quantizer(element), quantizer(inner)
    scale, offset, sums = _best_line(x, w, element)
    d = half(best_scale(scale, sums[2], inner)[0])
    e = half(best_scale(offset, sums[0], inner)[0])
    i, j = integer(scale * inverse(d)), integer(offset * inverse(e))
    kept: list[tuple[Tensor, ...]] = []
    for _ in range(ROUNDS):
        i, j, *sums = _line_neighbours(x, w, quantize, integer, (d, e), (i, j))
        kept.append((_line_error(i * d, j * e, sums).sum(-1, keepdim=True), d, e, i, j))
        d, e = (half(t) for t in _refit(i, j, sums))
    d, e, i, j = _least(kept)
    ideal = (x + (j * e).unsqueeze(-1)) * inverse(i * d).unsqueeze(-1)
    return elements.encode(ideal, element), i, j, d, e


def best_scale(x: Tensor, w: Tensor | None, element: Element) -> tuple[Tensor, Tensor]:
    """-> [..., 1]: the scale with the least error, and what an error in it costs."""
    quantize = quantizer(element)
    ends = [element.max] if element.min >= 0 else [element.min, element.max]
    step = (element.max - element.min) / (2**element.bits - 1)
    top = inverse(extreme(x))
    a, b = torch.zeros_like(top), torch.ones_like(top)
    for point in [end + trial * step for end in ends for trial in TRIALS]:
        a, b = _better(a, b, *_sums(x, w, quantize(x * (point * top))))
    a, b = _better(a, b, *_sums(x, w, quantize(x * inverse(a / b))))
    return a / b, b


def _sums(x: Tensor, w: Tensor | None, c: Tensor) -> tuple[Tensor, Tensor]:
    """sum(w x c), sum(w c c): a / b is the best scale of these codes, a * a / b the error it takes away."""
    wc = c if w is None else c * w
    return (x * wc).sum(-1, keepdim=True), (c * wc).sum(-1, keepdim=True)


def _better(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    better = a2 * a2 * b > a * a * b2
    return torch.where(better, a2, a), torch.where(better, b2, b)


def _least(trials: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Element by element the trial whose first tensor is least, without that tensor."""
    best = trials[0]
    for trial in trials[1:]:
        better = trial[0] < best[0]
        best = tuple(torch.where(better, *pair) for pair in zip(trial, best, strict=True))
    return best[1:]


def _neighbours(
    x: Tensor, w: Tensor | None, quantize: Quantize, integer: Quantize, d: Tensor, i: Tensor
) -> tuple[Tensor, ...]:
    """The best of i - 1, i, i + 1 for each sub-block, and its sums."""
    trials = []
    for step in (0.0, -1.0, 1.0):
        near = integer(i + step)
        scale = near * d
        a, b = (t.squeeze(-1) for t in _sums(x, w, quantize(x * inverse(scale).unsqueeze(-1))))
        trials.append((scale * (scale * b - 2 * a), near, a, b))
    return _least(trials)


def _line_sums(x: Tensor, w: Tensor | None, c: Tensor) -> list[Tensor]:
    """sum(w), sum(w c), sum(w c c), sum(w x), sum(w x c), each [...]."""
    if w is None:
        n = torch.full_like(x[..., 0], x.shape[-1])
        return [n, c.sum(-1), (c * c).sum(-1), x.sum(-1), (x * c).sum(-1)]
    wc, wx = w * c, w * x
    return [w.expand_as(x).sum(-1), wc.sum(-1), (wc * c).sum(-1), wx.sum(-1), (wx * c).sum(-1)]


def _line(sums: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The s, m >= 0 of least error in s * c - m."""
    n, c, cc, x, xc = sums
    scale = ((n * xc - c * x) * inverse(n * cc - c * c)).clamp(min=0)
    offset = (scale * c - x) * inverse(n)
    return torch.where(offset < 0, xc * inverse(cc), scale).clamp(min=0), offset.clamp(min=0)


def _line_error(scale: Tensor, offset: Tensor, sums: Sequence[Tensor]) -> Tensor:
    """sum(w (s c - m - x)^2), less what does not depend on s, c and m."""
    n, c, cc, x, xc = sums
    return scale * (scale * cc - 2 * (offset * c + xc)) + offset * (offset * n + 2 * x)


def _best_line(x: Tensor, w: Tensor | None, element: Element) -> tuple[Tensor, Tensor, list[Tensor]]:
    """-> [...]: scale and offset with the least error, and their sums."""
    quantize = quantizer(element)
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True)
    width = inverse(high - low)
    trials = [_line_trial(x, w, quantize((x - low) * ((element.max + trial) * width))) for trial in TRIALS]
    scale, offset, *_ = best = _least(trials)
    ideal = (x + offset.unsqueeze(-1)) * inverse(scale).unsqueeze(-1)
    scale, offset, *sums = _least([_with_error(best), _line_trial(x, w, quantize(ideal))])
    return scale, offset, sums


def _line_trial(x: Tensor, w: Tensor | None, c: Tensor) -> tuple[Tensor, ...]:
    sums = _line_sums(x, w, c)
    return _with_error((*_line(sums), *sums))


def _with_error(line: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return _line_error(line[0], line[1], line[2:]), *line


def _line_neighbours(
    x: Tensor,
    w: Tensor | None,
    quantize: Quantize,
    integer: Quantize,
    outer: tuple[Tensor, Tensor],
    integers: tuple[Tensor, Tensor],
) -> tuple[Tensor, ...]:
    """The best of i - 1, i, i + 1, each with the j that suits its codes, and the sums."""
    (d, e), (i, j) = outer, integers
    trials = []
    for step in (0.0, -1.0, 1.0):
        near = integer(i + step)
        scale = near * d
        sums = _line_sums(x, w, quantize((x + (j * e).unsqueeze(-1)) * inverse(scale).unsqueeze(-1)))
        beside = integer((scale * sums[1] - sums[3]) * inverse(sums[0] * e))
        trials.append((_line_error(scale, beside * e, sums), near, beside, *sums))
    return _least(trials)


def _refit(i: Tensor, j: Tensor, sums: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The d and e of least error with all integers held."""
    n, c, cc, x, xc = sums
    totals = [t.sum(-1, keepdim=True) for t in (j * j * n, i * j * c, i * i * cc, j * x, i * xc)]
    return _line(totals)
