"""What calibration keeps of one input, batch by batch: moments, extremes, x x^T, some rows, a histogram.

Sums run over rows that stay in cache. Rows are drawn by a Weyl sequence over their running number, so that which are
kept depends neither on how batches are cut nor on a generator, and no position in a text comes up beyond its share.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from fewbit.algos.algo import Need, Stats
from fewbit.errors import RequestError, SpecError, UnsupportedError

NEEDS: tuple[Need, ...] = ("moments", "hessian", "sample")
CACHED = 1 << 18  # values summed at a time
FLUSH = 512  # fewer rows than this wait for others before x x^T: an update reads and writes all of it
COLUMNS = 256  # of x x^T at a time: what lies left of the diagonal is not computed
STEP = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed number
BINS = 1 << 13  # sign, exponent and 4 bits of the mantissa of a float32


@dataclass(frozen=True, slots=True)
class Spread:
    """The values of one input as a whole: extremes, and a signed histogram of 16 bins to an octave if one was kept."""

    low: float
    high: float
    counts: Tensor | None = None  # [BINS] int64


@dataclass(slots=True)
class Gather:
    """The running sums of one input [tokens, K]."""

    what: str
    columns: int
    device: torch.device
    needs: frozenset[Need]
    rows: int = 2048
    spread: bool = False
    tokens: int = 0
    low: Tensor = field(init=False)
    high: Tensor = field(init=False)
    total: Tensor = field(init=False)
    square: Tensor = field(init=False)
    outer: Tensor | None = field(init=False, default=None)
    counts: Tensor | None = field(init=False, default=None)
    kept: list[tuple[Tensor, Tensor]] = field(init=False, default_factory=list)  # (priority, rows)
    limit: int | None = field(init=False, default=None)  # rows of a priority above it are not wanted any more
    waiting: list[Tensor] = field(init=False, default_factory=list)
    read: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.needs) - set(NEEDS)):
            raise SpecError(f"statistics {', '.join(unknown)} are not known; known: {', '.join(NEEDS)}")
        self.low, self.high = (torch.full((self.columns,), s, device=self.device) for s in (torch.inf, -torch.inf))
        # sums of millions of rows: float32 would lose the last ones
        self.total, self.square = torch.zeros(2, self.columns, dtype=torch.float64, device=self.device).unbind()
        if "hessian" in self.needs:
            self.outer = torch.zeros(self.columns, self.columns, device=self.device)
        if self.spread:
            self.counts = torch.zeros(BINS, dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """x: [..., K], as the linear reads it."""
        if self.read:
            raise RequestError(f"{self.what}: its statistics were read before the last batch ran")
        x = x.detach().reshape(-1, self.columns)
        if not len(x):
            return
        if x.device != self.device:
            x = x.to(self.device)
        self._sums(x)
        if "sample" in self.needs:
            self._draw(x)
        self.tokens += len(x)
        if self.outer is not None:
            self._wait(x)

    def _sums(self, x: Tensor) -> None:
        for rows in x.split(max(1, CACHED // self.columns) if x.device.type == "cpu" else len(x)):
            part = rows.float()
            if self.counts is not None:
                # a value's upper 13 bits are its bin; minus zero falls on a bin of its own
                bits = part.contiguous().view(torch.int32).bitwise_right_shift(19).bitwise_and_(BINS - 1)
                self.counts += torch.bincount(bits.view(-1), minlength=BINS)
            torch.minimum(self.low, part.amin(0), out=self.low)
            torch.maximum(self.high, part.amax(0), out=self.high)
            part = part.abs()
            self.total += part.sum(0)
            if self.outer is None:
                self.square += part.square_().sum(0)

    def _draw(self, x: Tensor) -> None:
        """Keep the `rows` of lowest priority; a new row must beat the worst of them."""
        order = torch.arange(self.tokens, self.tokens + len(x), device=self.device) * STEP
        if self.limit is not None:
            wanted = order < self.limit
            order, x = order[wanted], x[wanted]
        if not len(order):
            return
        self.kept.append((order, x.clone()))
        if sum(len(o) for o, _ in self.kept) > 2 * self.rows:
            self._prune()

    def _prune(self) -> None:
        order, x = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
        if len(order) > self.rows:
            best = order.topk(self.rows, largest=False).indices.sort().values
            order, x = order[best], x[best]
            self.limit = int(order.max())
        self.kept = [(order, x)]

    def _wait(self, x: Tensor) -> None:
        if len(x) >= FLUSH and not self.waiting:
            return self._outer(x)
        self.waiting.append(x.clone())  # a view would hold on to the whole batch
        if sum(map(len, self.waiting)) >= FLUSH:
            self._flush()
        return None

    def _flush(self) -> None:
        if self.waiting:
            waiting, self.waiting = self.waiting, []
            self._outer(torch.cat(waiting))

    def _outer(self, x: Tensor) -> None:
        assert self.outer is not None
        add_outer(self.outer, x)

    def stats(self) -> Stats:
        """What was gathered, in float32. It hands over the sums, so that nothing may be added from here on."""
        self._flush()
        self.read = True
        amax = torch.maximum(self.low.abs(), self.high.abs()) if self.tokens else torch.zeros_like(self.low)
        if not bool(amax.isfinite().all()):
            bad = int((~amax.isfinite()).sum())
            reason = "the model computes something that overflows: try dtype=float32"
            raise UnsupportedError(f"{self.what}: {bad} channels of its input hold NaN or Inf", [reason])
        count = max(1, self.tokens)
        outer = mirror(self.outer).div_(count) if self.outer is not None else None
        square = outer.diagonal().clone() if outer is not None else (self.square / count).float()
        return Stats(self.tokens, amax, (self.total / count).float(), square, outer, self._sample())

    def _sample(self) -> Tensor | None:
        if "sample" not in self.needs:
            return None
        if not self.kept:
            return torch.zeros(0, self.columns, device=self.device)
        self._prune()
        return self.kept[0][1].float()

    def span(self) -> Spread:
        if not self.tokens:
            return Spread(0.0, 0.0, self.counts)
        return Spread(float(self.low.min()), float(self.high.max()), self.counts)


def add_outer(total: Tensor, x: Tensor) -> None:
    """total [K, K] += x^T x in float32, right of the diagonal (in steps) only. x: [n, K].

    Products of bfloat16 are exact in float32, so a CPU that multiplies bfloat16 loses nothing on them but time.
    """
    k = x.shape[1]
    if x.device.type != "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        total += torch.mm(x.T, x, out_dtype=torch.float32)
        return
    short = x.dtype == torch.bfloat16 and multiplies_bf16()
    x = x.float()
    with bf16_products(short):
        for start in range(0, k, COLUMNS):
            stop = min(start + COLUMNS, k)
            total[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])


def mirror(total: Tensor) -> Tensor:
    """Fill in, in place, what add_outer left out; exactly symmetric, whatever order a product was summed in."""
    for start in range(0, len(total), COLUMNS):
        stop = min(start + COLUMNS, len(total))
        corner = total[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        total[stop:, start:stop] = total[start:stop, stop:].T
    return total


@cache
def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for it; without them torch would only emulate."""
    known: Callable[[], dict[str, object]] = getattr(torch.cpu, "get_capabilities", dict)
    return any(known().get(name) is True for name in ("avx512_bf16", "amx_bf16"))


@contextmanager
def bf16_products(wanted: bool = True) -> Iterator[None]:
    """Within: matrix products of float32 on the CPU read their factors as bfloat16. A setting of the process."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if wanted:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
