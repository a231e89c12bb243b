"""rotate: Hadamard matrices of many orders, and weights whose inputs or outputs are turned by them.

A rotation spreads outliers over all channels and changes no length. Q = diag(signs) x (H / sqrt(order)), H in blocks
where no matrix of the whole size is known. Row vectors turn: x' = x Q.
"""

from dataclasses import dataclass
from functools import cache
from math import isqrt, prod, sqrt

import torch
from torch import Tensor

from fewbit.errors import SpecError, UnsupportedError

DENSE = 2048  # the largest factor that is multiplied as a matrix
STEP = 64  # the power of two that is multiplied at once

# First rows of four circulants whose periodic autocorrelations add up to nothing, by their length: orders 4 x length
# that the quadratic residues of primes do not give.
CIRCULANTS = {
    13: ("++--+-++-+--+", "++-++----++-+", "+-+-++--++-+-", "++----------+"),
    23: (
        "+-+-++----+--+----++-+-", "+--++-+--++++++--+-++--", "++++-+---++--++---+-+++", "+-++++-+++----+++-++++-",
    ),
    25: (
        "+--++-+--+++--+++--+-++--", "+-++++--+---++---+--++++-", "++-+--+-+--------+-+--+-+",
        "+---+-+++--------+++-+---",
    ),
    29: (
        "++--++--+-++------++-+--++--+", "+++--++-+-++------++-+-++--++", "+++-+-++---+-++++-+---++-+-++",
        "+-+++++-+++-+----+-+++-+++++-",
    ),
    39: (
        "++++-+-+++-++---++--+-++---+--+-+-+-+++", "++++-+---+--++--++---++++--+--+-++--+-+",
        "++++++---++-+-+-++-+--++-+-++++++--++-+", "+++--++------+-+++++-++++-+-+--+++----+",
    ),
    43: (
        "++--+-++--++----+-+--+-++-+-++++--++--+-++-", "++-+++-+---++---+-++++----+-+++--+++-+---+-",
        "++++++--+--++---+--++++----+----++-+-+-+-++", "++--+----+-+-+++++---+---+---------++----+-",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """An orthogonal matrix [size, size], in blocks of `order`. signs: [size] of +1 and -1, or None."""

    size: int
    order: int
    signs: Tensor | None = None


def rotation(size: int, seed: int | None = None) -> Rotation:
    """The rotation of `size` channels; with a seed, after random signs that it alone decides."""
    if size < 1:
        raise SpecError(f"a rotation of {size} channels")
    if seed is None:
        return Rotation(size, order(size))
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
    return Rotation(size, order(size), signs)


def order(size: int) -> int:
    """The size itself where a Hadamard matrix of it is known, else the largest power of two that divides it."""
    return size if factors(size) else size & -size


@cache
def factors(n: int) -> tuple[int, ...]:
    """Orders whose matrices' Kronecker product is one of order n; none: not known."""
    power = n & -n
    odd = n // power
    base = next((odd * p for p in _powers(power) if odd * p <= DENSE and buildable(odd * p)), 0)
    if not base:
        return ()
    left, out = n // base, []
    while left > 1:
        out.append(min(left, STEP))
        left //= out[-1]
    return (*out, base) if base > 1 or not out else tuple(out)


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())]


def buildable(n: int) -> bool:
    """Whether there is a way here to a matrix of this order that is no Kronecker product."""
    return n in (1, 2) or paley(n) > 0 or (n % 4 == 0 and n // 4 in CIRCULANTS)


def paley(n: int) -> int:
    """The prime whose residues give a matrix of order n; 0: none."""
    if n % 4:
        return 0
    if prime(n - 1):
        return n - 1  # 3 mod 4
    half = n // 2 - 1
    return half if half % 4 == 1 and prime(half) else 0


def prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, isqrt(n) + 1))


def hadamard(n: int) -> Tensor:
    """-> [n, n] float64 of +1 and -1 with H H^T = n I."""
    parts = factors(n)
    if not parts:
        raise UnsupportedError(f"no Hadamard matrix of order {n} is known here")
    out = matrix_of(parts[0])
    for part in parts[1:]:
        out = torch.kron(out, matrix_of(part))
    return out


@cache
def matrix_of(n: int) -> Tensor:
    """The matrix of one factor, checked."""
    if n & (n - 1) == 0:
        found = torch.ones(1, 1, dtype=torch.float64)
        while len(found) < n:
            found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    else:
        found = residues(n, paley(n)) if paley(n) else goethals_seidel(CIRCULANTS[n // 4])
    if not torch.equal(found @ found.T, n * torch.eye(n, dtype=torch.float64)):
        raise UnsupportedError(f"the matrix made for order {n} is no Hadamard matrix")
    return found


def residues(n: int, q: int) -> Tensor:
    """Paley's constructions, from the quadratic residues of a prime: n - 1 (3 mod 4), or n / 2 - 1 (1 mod 4)."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    core = character[(torch.arange(q)[:, None] - torch.arange(q)) % q]
    skew = q % 4 == 3
    c = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    c[0, 1:], c[1:, 0], c[1:, 1:] = 1, -1 if skew else 1, core
    eye = torch.eye(q + 1, dtype=torch.float64)
    if skew:
        return c + eye
    pair = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    return torch.kron(c, pair) + torch.kron(eye, torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64))


def goethals_seidel(rows: tuple[str, str, str, str]) -> Tensor:
    """Four circulants in the array of Goethals and Seidel."""
    n = len(rows[0])
    shift = (torch.arange(n) - torch.arange(n)[:, None]) % n
    a, b, c, d = (torch.tensor([1.0 if x == "+" else -1.0 for x in row], dtype=torch.float64)[shift] for row in rows)
    r = torch.eye(n, dtype=torch.float64).flip(0)
    blocks = (
        (a, b @ r, c @ r, d @ r),
        (-b @ r, a, d.T @ r, -c.T @ r),
        (-c @ r, -d.T @ r, a, b.T @ r),
        (-d @ r, c.T @ r, -b.T @ r, a),
    )
    return torch.cat([torch.cat(row, 1) for row in blocks])


def turn(x: Tensor, q: Rotation, dtype: torch.dtype | None = None) -> Tensor:
    """x [.., size] -> x Q, computed in dtype (at least float32), given back in x's own."""
    _fits(x.shape[-1], q)
    y = x.to(_wide(x, dtype))
    y = y if q.signs is None else y * q.signs.to(y)
    return _factored(y, q, back=False).to(x.dtype)


def turn_back(x: Tensor, q: Rotation, dtype: torch.dtype | None = None) -> Tensor:
    """x [.., size] -> x Q^T, which undoes turn."""
    _fits(x.shape[-1], q)
    y = _factored(x.to(_wide(x, dtype)), q, back=True)
    return (y if q.signs is None else y * q.signs.to(y)).to(x.dtype)


def rotate_in(w: Tensor, q: Rotation, dtype: torch.dtype | None = None) -> Tensor:
    """w [.., N, K] for inputs that come turned by q: w Q."""
    return turn(w, q, dtype)


def rotate_out(w: Tensor, q: Rotation, dtype: torch.dtype | None = None) -> Tensor:
    """w [.., N, K] whose outputs leave turned by q: Q^T w. A bias turns as an output does: turn(b, q)."""
    return turn(w.mT, q, dtype).mT.contiguous()


def matrix(q: Rotation, dtype: torch.dtype = torch.float64) -> Tensor:
    """-> [size, size], Q itself."""
    return turn(torch.eye(q.size, dtype=torch.float64), q).to(dtype)


def _factored(x: Tensor, q: Rotation, back: bool) -> Tensor:
    """Blocks of q.order along the last axis times the Kronecker product, one factor after another."""
    shape, inner = x.shape, q.order
    sizes = factors(q.order)
    for n in sizes:
        inner //= n
        held = matrix_of(n).to(x)
        held = held.T if back else held
        x = x.reshape(-1, n) @ held if inner == 1 else held.T @ x.reshape(-1, n, inner)
    return (x / sqrt(prod(sizes))).reshape(shape)


def _wide(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or (x.dtype if x.dtype == torch.float64 else torch.float32)


def _fits(n: int, q: Rotation) -> None:
    if n != q.size:
        raise SpecError(f"{n} channels cannot be turned by a rotation of {q.size}")
