"""Hadamard matrices of every order that models ask for, and weights turned by them."""

import pytest
import torch

from fewbit.errors import SpecError, UnsupportedError
from fewbit.transforms import rotate

ORDERS = (
    1, 2, 4, 12, 20, 24, 28, 36, 40, 44, 48, 52, 60, 64, 68, 76, 84, 92, 100, 108, 116, 140, 148, 156, 172, 180, 576,
    640, 924,
)  # fmt: skip
SIZES = (  # hidden, intermediate and head sizes of models
    64, 80, 96, 112, 128, 576, 640, 768, 896, 1152, 1408, 1536, 2304, 2560, 2880, 3072, 4864, 5120, 5632, 6912, 8960,
    9216, 10240, 11008, 13824, 14336, 14848, 17408, 18944, 21504, 25600, 27648, 29568,
)  # fmt: skip


@pytest.mark.parametrize("n", ORDERS)
def test_hadamard(n: int) -> None:
    h = rotate.hadamard(n)
    assert h.shape == (n, n) and set(h.unique().tolist()) <= {1.0, -1.0}
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


def test_sizes_of_models_are_whole() -> None:
    assert [n for n in SIZES if rotate.order(n) != n] == []


@pytest.mark.parametrize("n", [3, 6, 14, 30, 188])
def test_no_matrix(n: int) -> None:
    with pytest.raises(UnsupportedError, match=str(n)):
        rotate.hadamard(n)
    assert rotate.order(n) == n & -n


@pytest.mark.parametrize(("n", "seed"), [(48, None), (576, 0), (640, 1), (344, 2), (188, 3), (7, 4), (1024, 5), (1, 6)])
def test_turn_is_the_matrix(n: int, seed: int | None) -> None:
    q = rotate.rotation(n, seed)
    whole = rotate.matrix(q)
    assert (whole @ whole.T - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-12
    block = whole.abs()[: q.order, : q.order]
    assert torch.allclose(block, torch.full_like(block, q.order**-0.5))  # every channel goes into every other
    x = torch.randn(3, 2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(rotate.turn(x, q), x @ whole, atol=1e-12)
    assert torch.allclose(rotate.turn_back(x, q), x @ whole.T, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights(dtype: torch.dtype) -> None:
    """x W^T is what it was with the input turned, and turned with the output turned."""
    generator = torch.Generator().manual_seed(0)
    q = rotate.rotation(48, 0)
    w = torch.randn(2, 48, 48, generator=generator).to(dtype)
    b = torch.randn(2, 48, generator=generator).to(dtype)
    x = torch.randn(2, 5, 48, generator=generator, dtype=torch.float64)
    y = x @ w.double().mT + b.double()[:, None]
    turned_in, turned_out = rotate.rotate_in(w, q), rotate.rotate_out(w, q, torch.float64)
    assert turned_in.dtype == turned_out.dtype == dtype
    limit = 0.1 if dtype == torch.bfloat16 else 1e-5
    assert (rotate.turn(x, q) @ turned_in.double().mT + b.double()[:, None] - y).abs().max() < limit
    out = x @ turned_out.double().mT + rotate.turn(b, q).double()[:, None]
    assert (out - rotate.turn(y, q)).abs().max() < limit


def test_seed_decides_the_signs() -> None:
    signs = [rotate.rotation(64, seed).signs for seed in (1, 1, 2)]
    assert torch.equal(signs[0], signs[1]) and not torch.equal(signs[0], signs[2])
    assert rotate.rotation(64).signs is None
    before = torch.get_rng_state()
    rotate.rotation(64, 1)
    assert torch.equal(before, torch.get_rng_state())


def test_wrong_sizes() -> None:
    with pytest.raises(SpecError, match="48"):
        rotate.turn(torch.ones(64), rotate.rotation(48))
    with pytest.raises(SpecError, match="0 channels"):
        rotate.rotation(0)
