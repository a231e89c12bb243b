"""What a sampler knows of one row of logits."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fewbit.engine.params import SamplingParams


@dataclass(slots=True)
class Row:
    """One continuation at one step. ends: the model's own end tokens, banned until min_tokens are there."""

    params: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]
    seed: int
    allowed: Tensor | None = None  # [ceil(V / 32)] int32
    ends: Sequence[int] | frozenset[int] = ()
