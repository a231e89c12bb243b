"""From logits to tokens. Plain greedy rows cost one argmax; a row pays only for what it asks for.

Everything stays on the logits' device until one copy brings tokens and logprobs to the host, and nobody waits for that
copy before its values are asked for. A row's token depends on its own logits, parameters, seed and step, never on the
rows beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.engine.outputs import Logprob
from fewbit.engine.sampler_draw import draw
from fewbit.engine.sampler_edits import edit, edited
from fewbit.engine.sampler_row import Row
from fewbit.engine.transfer import Reading, sent
from fewbit.kernels.triton_runtime import lacking


@dataclass(slots=True)
class Sampled:
    """bad: the row had NaN, or no finite logit to choose; its token means nothing."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob] | None]
    bad: list[bool]


class Drawn:
    """What was drawn. tokens: [B] int64, on the device; the rest once it has come to the host."""

    def __init__(self, best: Tensor, extra: Sequence[Tensor], asked: Sequence[int], rows: Sequence[Row]):
        """best: [2, B] as `_tokens` gives it; extra: flat, float64."""
        self.tokens, self._asked, self._counts = best[0], asked, [row.params.logprobs or 0 for row in rows]
        bits = [each.view(torch.int64) for each in extra]
        self._reading = Reading(torch.cat([best.flatten(), *bits]) if bits else best.flatten())

    def read(self) -> Sampled:
        host, count = self._reading.done(), len(self._counts)
        tokens, wide = host[:count].tolist(), host[count:].view(torch.float64).tolist()
        finite = [abs(value) < float("inf") for value in wide[:count]]
        found: list[dict[int, Logprob] | None] = [None] * count
        for i, values in zip(self._asked, _pieces(wide[count:], len(self._asked)), strict=True):
            found[i] = _named(tokens[i], values, self._counts[i])
        return Sampled(tokens, found, [not one for one in finite])


class Sampler:
    def __init__(self, vocab: int, device: torch.device | str) -> None:
        self.vocab, self.device = vocab, torch.device(device)

    @torch.inference_mode()
    def draw(self, logits: Tensor, rows: Sequence[Row]) -> Drawn:
        """logits: [B, V] of any float type."""
        asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        best = _tokens(logits, rows)
        extra = [] if not asked else _tops(logits, best[0], asked, max(rows[i].params.logprobs or 0 for i in asked))
        return Drawn(best, extra, asked, rows)

    def sample(self, logits: Tensor, rows: Sequence[Row]) -> Sampled:
        """Draw, and wait for it."""
        return self.draw(logits, rows).read()


@torch.inference_mode()
def prompt_logprobs(logits: Tensor, ids: Sequence[int], count: int) -> list[dict[int, Logprob]]:
    """logits: [T, V], ids: the T tokens that followed -> of each, itself and the `count` likeliest."""
    if not ids:
        return []
    tokens = torch.tensor(ids, device=logits.device)
    host = torch.cat(_tops(logits, tokens, list(range(len(ids))), count)).tolist()
    return [_named(token, values, count) for token, values in zip(ids, _pieces(host, len(ids)), strict=True)]


def _tokens(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """-> [2, B] int64: tokens, and the bits of a float64 that is finite where the row was sound."""
    changed = any(edited(row) for row in rows)
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    used = logits
    if changed or drawn:
        used = logits.to(torch.float32, copy=changed)
    if changed:
        edit(used, rows)
    best = _largest(used)
    tokens, values = best[0], best[1].view(torch.float64)
    if changed:  # a mask may have hidden a NaN
        values += 0 * logits.amax(-1).double()
    if len(drawn) == len(rows):
        tokens.copy_(draw(used, rows))
    elif drawn:
        where = sent(drawn, torch.int64, logits.device)
        tokens.index_copy_(0, where, draw(used[where], [rows[i] for i in drawn]))
    return best


def _largest(logits: Tensor) -> Tensor:
    """-> [2, B] int64: where each row is largest, the first of equals, and that value's bits in float64; NaN is over
    all."""
    if logits.is_cuda and logits.stride(1) == 1 and lacking(logits.device) is None:
        from fewbit.kernels.triton_argmax import argmax

        return argmax(logits)
    if logits.device.type == "cpu":  # numpy takes a thirtieth of torch's time, and has the same rules
        tokens = torch.from_numpy(logits.float().numpy().argmax(-1))
    else:
        tokens = logits.argmax(-1)
    values = logits.gather(1, tokens.unsqueeze(-1)).squeeze(-1)
    return torch.stack([tokens, values.double().view(torch.int64)])


def _tops(logits: Tensor, tokens: Tensor, chosen: list[int], count: int) -> list[Tensor]:
    """Of the chosen rows: logprob and rank of the token, `count` likeliest logprobs and their ids -> each flat, f64."""
    if len(chosen) < logits.shape[0]:
        where = sent(chosen, torch.int64, logits.device)
        logits, tokens = logits[where], tokens[where]
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, tokens.unsqueeze(-1))
    rank = (logprobs > own).sum(-1, keepdim=True) + 1
    values, ids = logprobs.topk(min(count, logprobs.shape[1]))
    return [torch.cat([own.double(), rank.double(), values.double(), ids.double()], dim=1).flatten()]


def _pieces(values: list[float], count: int) -> list[list[float]]:
    size = len(values) // max(count, 1)
    return [values[i * size : (i + 1) * size] for i in range(count)]


def _named(token: int, values: list[float], count: int) -> dict[int, Logprob]:
    """The token itself first, then the likeliest by rank."""
    found = {token: Logprob(values[0], int(values[1]))}
    half = (len(values) - 2) // 2
    for rank in range(min(count, half)):
        found.setdefault(int(values[2 + half + rank]), Logprob(values[2 + rank], rank + 1))
    return found
