"""Which tokens a row may choose at all: ids it allows, its grammar's mask, ends banned until it has its least tokens.

All three are one bit mask a row, int32 words of 32 tokens, made on the host and opened on the device.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from fewbit.engine.sampler_row import Row


def masked(row: Row) -> bool:
    return row.allowed is not None or row.params.allowed_token_ids is not None or waiting(row)


def waiting(row: Row) -> bool:
    """Too short to end yet, and with ends that could be banned."""
    return len(row.output) < row.params.min_tokens and bool(row.ends or row.params.stop_token_ids)


def bits(row: Row, vocab: int) -> np.ndarray:
    """-> [ceil(vocab / 32)] uint32."""
    words = _grammar(row, vocab)
    if row.params.allowed_token_ids is not None:
        words = words & _only(tuple(row.params.allowed_token_ids), vocab)
    if waiting(row):
        longer = words & ~_only((*row.ends, *(row.params.stop_token_ids or ())), vocab)
        # a grammar may be done before min_tokens are: then an end is all that is left
        words = longer if longer.any() else words
    return words


def open_bits(words: Tensor, vocab: int) -> Tensor:
    """words: [R, W] int32 -> [R, vocab] bool."""
    places = torch.arange(32, device=words.device, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> places) & 1).bool().flatten(1)[:, :vocab]


def _grammar(row: Row, vocab: int) -> np.ndarray:
    count = (vocab + 31) // 32
    if row.allowed is None:
        words = np.full(count, 0xFFFFFFFF, dtype=np.uint32)
        words[-1] >>= np.uint32(-vocab % 32)
        return words
    given = row.allowed.cpu().numpy().view(np.uint32)[:count]
    return np.pad(given, (0, count - len(given)))  # a token that the grammar does not know is not allowed


@functools.lru_cache(maxsize=64)
def _only(ids: tuple[int, ...], vocab: int) -> np.ndarray:
    chosen = np.fromiter(ids, dtype=np.int64, count=len(ids))
    chosen = chosen[chosen < vocab]
    words = np.zeros((vocab + 31) // 32, dtype=np.uint32)
    np.bitwise_or.at(words, chosen >> 5, np.uint32(1) << (chosen & 31).astype(np.uint32))
    return words
