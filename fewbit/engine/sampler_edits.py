"""What rows ask to change in their logits before a token is drawn: masks, bias, then penalties, as vLLM orders them.

Bias and penalties touch few logits: those are listed on the host, for all rows, and changed in one gather and scatter.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fewbit.engine import sampler_masks as masks
from fewbit.engine.sampler_row import Row


def edited(row: Row) -> bool:
    return masks.masked(row) or bool(row.params.logit_bias) or _penalized(row)


def edit(logits: Tensor, rows: Sequence[Row]) -> None:
    """Change logits [B, V] f32 in place."""
    _mask(logits, rows)
    _bias(logits, rows)
    _penalize(logits, rows)


def _mask(logits: Tensor, rows: Sequence[Row]) -> None:
    chosen = [i for i, row in enumerate(rows) if masks.masked(row)]
    if not chosen:
        return
    words = np.stack([masks.bits(rows[i], logits.shape[1]) for i in chosen]).view(np.int32)
    banned = ~masks.open_bits(torch.from_numpy(words).to(logits.device), logits.shape[1])
    where = torch.tensor(chosen, device=logits.device)
    logits[where] = logits[where].masked_fill(banned, -torch.inf)


def _bias(logits: Tensor, rows: Sequence[Row]) -> None:
    chosen = [i for i, row in enumerate(rows) if row.params.logit_bias]
    if not chosen:
        return
    given = [rows[i].params.logit_bias or {} for i in chosen]
    flat = np.concatenate([_places(i, one, logits.shape[1]) for i, one in zip(chosen, given, strict=True)])
    add = np.concatenate([np.fromiter(one.values(), np.float32, len(one)) for one in given])
    at = torch.from_numpy(flat).to(logits.device)
    view = logits.view(-1)
    view[at] = view[at] + torch.from_numpy(add).to(logits.device)


def _penalize(logits: Tensor, rows: Sequence[Row]) -> None:
    chosen = [i for i, row in enumerate(rows) if _penalized(row)]
    if not chosen:
        return
    seen = [_seen(rows[i]) for i in chosen]
    at = torch.from_numpy(np.concatenate(
        [_places(i, one, logits.shape[1]) for i, one in zip(chosen, seen, strict=True)])).to(logits.device)  # fmt: skip
    terms = np.concatenate([_terms(rows[i], one) for i, one in zip(chosen, seen, strict=True)], axis=1)
    factor, less = torch.from_numpy(terms).to(logits.device)
    view = logits.view(-1)
    now = view[at]
    view[at] = torch.where(now > 0, now / factor, now * factor) - less


def _penalized(row: Row) -> bool:
    params = row.params
    return params.repetition_penalty != 1 or bool(params.frequency_penalty or params.presence_penalty)


def _seen(row: Row) -> Counter[int]:
    """How often each token stands in the output; with a repetition penalty the prompt's too, as 0 times."""
    found = Counter(row.output)
    if row.params.repetition_penalty != 1:
        found.update(dict.fromkeys(row.prompt, 0))
    return found


def _places(row: int, ids: "dict[int, float] | Counter[int]", vocab: int) -> np.ndarray:
    """-> [len(ids)] int64, into the flat logits."""
    return np.fromiter(ids, np.int64, len(ids)) + row * vocab


def _terms(row: Row, seen: Counter[int]) -> np.ndarray:
    """-> [2, len(seen)] f32: what to divide by, what to take off."""
    counts = np.fromiter(seen.values(), np.float64, len(seen))
    less = row.params.frequency_penalty * counts + row.params.presence_penalty * (counts > 0)
    return np.stack([np.full_like(counts, row.params.repetition_penalty), less]).astype(np.float32)
