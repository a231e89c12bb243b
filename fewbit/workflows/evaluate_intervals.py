"""Estimates over documents: a figure of the whole text, and the interval that a bootstrap over its documents gives.

The interval is the percentile interval, its levels widened as Student's t asks for where documents are few: 20 windows
of a text would otherwise cover the truth in 92 of 100 texts, not in 95.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import torch
from torch import Tensor

RESAMPLES = 2000
LEVEL = 0.95
CHUNK = 1 << 22  # draws made at a time
Figure = Callable[[Tensor], Tensor]  # sums [..., F] -> [...]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure, and the interval that holds it with 95 %; None where one document leaves nothing to compare."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.value:.5g}"
        return f"{self.value:.5g} [{self.low:.5g}, {self.high:.5g}]"


def estimates(
    sums: Tensor, figures: Mapping[str, Figure], seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Estimate]:
    """sums: [D, F] of every document; a figure is a function of sums over documents. All see the same resamples."""
    sums = sums.double()
    found = {name: float(figure(sums.sum(0))) for name, figure in figures.items()}
    if len(sums) < 2:
        return {name: Estimate(value, None, None) for name, value in found.items()}
    drawn = resampled(sums, seed, resamples)
    low = tail(len(sums))
    levels = torch.tensor([low, 1 - low], dtype=torch.float64)
    ends = {name: torch.quantile(figure(drawn), levels).tolist() for name, figure in figures.items()}
    return {name: Estimate(found[name], *ends[name]) for name in figures}


def resampled(sums: Tensor, seed: int, resamples: int) -> Tensor:
    """-> [resamples, F]: sums over as many documents, drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    documents = len(sums)
    step, out = max(1, CHUNK // documents), []
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = torch.randint(documents, (rows, documents), generator=generator)
        counts = torch.zeros(rows, documents, dtype=sums.dtype)
        out.append(counts.scatter_add_(1, drawn, torch.ones_like(counts)) @ sums)
    return torch.cat(out)


def tail(documents: int) -> float:
    """The lower level of a percentile interval that is as wide as Student's t says."""
    normal = NormalDist()
    return normal.cdf(-student((1 + LEVEL) / 2, documents - 1) * sqrt(documents / (documents - 1)))


def student(p: float, freedom: int) -> float:
    """The quantile of Student's t, by its expansion around the normal one: within 1 % from 3 degrees of freedom."""
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**i for i, term in enumerate(terms, 1))
