"""The largest of each row in Triton's interpreter: the first of equals, NaN over all, as one row or among others."""

import pytest
import torch
from torch import Tensor

from fewbit.kernels.triton_runtime import lacking

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(lacking(torch.device(DEVICE)) is not None, reason=str(lacking(torch.device(DEVICE))))


def first(row: Tensor) -> int:
    """The oracle."""
    hits = row.isnan() if bool(row.isnan().any()) else row == row.max()
    return int(hits.nonzero()[0])


def named(best: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens, and the values whose bits stand below them."""
    return best[0], best[1].view(torch.float64)


def rows(n: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(9, n, generator=torch.Generator().manual_seed(n)).round(decimals=1).to(dtype)  # many are equal
    x[1] = -torch.inf
    x[2] = torch.finfo(dtype).min
    x[3] -= 100.0
    x[4, n // 2 :: 3] = torch.nan
    x[5, n // 3], x[5, -1] = torch.inf, torch.nan
    x[6, n // 3 :: 2] = torch.inf
    x[7] = -0.0
    x[7, 1::5] = 0.0
    x[8, -1] = 100.0
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 5, 2048, 2049, 7000])
def test_first_of_the_largest(n: int, dtype: torch.dtype) -> None:
    from fewbit.kernels.triton_argmax import argmax

    x = rows(n, dtype)
    wide = torch.full((9, n + 3), torch.inf, dtype=dtype)
    wide[:, :n] = x
    for given in (x.to(DEVICE), wide.to(DEVICE)[:, :n]):
        best = argmax(given)
        tokens, values = named(best)
        assert tokens.tolist() == [first(row) for row in x] and best.dtype == torch.int64
        assert torch.equal(
            values.cpu().nan_to_num(7.0), x.gather(1, tokens.cpu()[:, None])[:, 0].double().nan_to_num(7.0)
        )
        for i, row in enumerate(given):
            assert int(argmax(row[None])[0, 0]) == int(tokens[i])


def test_no_rows() -> None:
    from fewbit.kernels.triton_argmax import argmax

    assert argmax(torch.zeros(0, 8, device=DEVICE)).shape == (2, 0)
