"""A stack: weights of one spec that read the same input, one below the other, so that one loop over columns serves all.

Where every row has scales of its own a stack keeps them in stored form and may move them; other blocks (tensors,
rectangles, runs that do not end with a row, scales of scales) are chosen before the loop and stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fewbit.algos.rounding import middle
from fewbit.algos.search import Chain, Trial, by_trials, chain, encode_searched, search, zero_units
from fewbit.algos.sweep import Codes, Moves
from fewbit.quant import elements
from fewbit.quant.blocks import blocked, per_block, unblocked
from fewbit.quant.elements import E8M0
from fewbit.quant.qtensor import Planes, QTensor, grid, scale_codes
from fewbit.quant.reference import assign, choose, encode, scale_values, zero_values
from fewbit.quant.spec import FLAT, QuantSpec

TINY = 1e-30  # stands for a scale of 0: every code means about 0, and nothing is divided by it
LONGEST = 128  # columns of a run
WIDEST = 512  # columns of a block whose scales wait until the loop gets there
ROWWISE = ("amax", "range", "mx-ceil", "mx-floor", "mx-round", "four-over-six")

# rules that take whole weights, and where a search may start instead
FREE = {"q4_0": "range", "q5_0": "range", "q8_0": "range", "q4_1": "amax", "q5_1": "amax"}
FREE |= {"mxfp4-ggml": "mx-floor"}


@dataclass(slots=True)
class Stack:
    """weights: [N_i, K] float32 of one spec; given: planes they share; trials: 0 = the rule's own scales."""

    spec: QuantSpec
    weights: Sequence[Tensor]
    given: Planes
    trials: int
    local: QuantSpec | None = None  # the spec with blocks of one row, where it has such
    stored: Planes = field(default_factory=dict)  # scale0, zero0 of all rows: [N, C]
    fixed: list[Planes] = field(default_factory=list)  # else the planes of each weight

    def __post_init__(self) -> None:
        self.local = rowwise(self.spec, self.given, self.k, self.trials > 0)

    @property
    def k(self) -> int:
        return self.weights[0].shape[-1]

    @property
    def cols(self) -> int:
        """Columns of a block, as far as it can be said: 0 = all."""
        return self.spec.scales[0].block[1] if self.spec.scales else 0

    @property
    def waits(self) -> bool:
        """True where scales can be chosen on the way."""
        return self.local is not None and 0 < self.cols <= WIDEST

    def begin(self, whole: Tensor, index: Tensor, cost: Tensor, wait: bool) -> Codes:
        """whole: [N, K] all weights; index: [K] the order of the loop; cost: [K] of an error in each column."""
        self.fixed = []
        if self.local is None:
            scale, zero, cols = self._choose_fixed(cost)
        else:
            cols = self.cols or self.k
            planes = self._empty(whole) if wait else self._choose_rows(whole, cost)
            self.stored = {n: p.contiguous() for n, p in planes.items() if n in ("scale0", "zero0")}
            scale, zero = self._units(self.stored, whole.shape)
        flat = None if zero is None else zero.T.contiguous()
        return Codes(whole.new_empty(whole.T.shape), scale.T.contiguous(), flat, index // cols)

    def choose(self, codes: Codes, g: int, target: Tensor, cost: Tensor) -> None:
        """The scales of block g, from what its columns [n, N] have become."""
        assert self.local is not None
        planes = choose(target.T.contiguous(), self.local, self.given)
        own = {name: planes[name] for name in self.stored}
        if self.trials:
            held = self._held((target.shape[1], target.shape[0]))
            own = by_trials(Trial(target[..., None], cost[:, None, None], self.local, held, own), self.trials)
        for name, plane in own.items():
            self.stored[name][:, g : g + 1] = plane
        scale, zero = self._units(own, (target.shape[1], target.shape[0]))
        codes.scale[g] = scale[:, 0]
        if codes.zero is not None and zero is not None:
            codes.zero[g] = zero[:, 0]

    def moves(self) -> Moves | None:
        """How blocks may change once they have codes; None: not at all."""
        if not self.waits or self.spec.scales[0].element == E8M0 or (self.spec.zeros and not self.spec.zeros_in_codes):
            return None
        held = self._held((sum(w.shape[0] for w in self.weights), self.k))

        def fitted(g: int, ideal: Tensor) -> Tensor:
            return held.value(held.codes(ideal[:, None]))[:, 0]

        if not self.spec.zeros:
            return Moves(fitted, None)
        zero, shift = self.spec.zeros[0].element, middle(self.spec)
        return Moves(fitted, (zero.min - shift, zero.max - shift))

    def settle(self, codes: Codes) -> None:
        """Bring the stored planes to what moves have made of them: they gave values that can be stored."""
        held = self._held((codes.scale.shape[1], self.k))
        self.stored["scale0"] = held.codes(codes.scale.T)
        if codes.zero is not None:
            self.stored["zero0"] = elements.encode(codes.zero.T + middle(self.spec), self.spec.zeros[0].element)

    def finish(self, whole: Tensor) -> list[QTensor]:
        """whole: [N, K] decoded values -> the weights that hold them."""
        out, start = [], 0
        for i, w in enumerate(self.weights):
            rows = slice(start, start := start + w.shape[0])
            planes = self.fixed[i] if self.local is None else self._planes(rows)
            out.append(assign(whole[rows].contiguous(), self.spec, planes))
        return out

    def _planes(self, rows: slice) -> Planes:
        flat = self.spec.scales[0].block[0] == FLAT
        own = {name: plane[rows].reshape(1, -1) if flat else plane[rows] for name, plane in self.stored.items()}
        return self.given | own

    def _held(self, shape: tuple[int, int]) -> Chain:
        assert self.local is not None
        return chain(self.local.scales, self.given, shape)

    def _units(self, planes: Planes, shape: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        assert self.local is not None
        scale = self._held((shape[0], shape[1])).value(planes["scale0"])
        return scale, zero_units(planes.get("zero0"), scale, self.local)

    def _empty(self, whole: Tensor) -> Planes:
        assert self.local is not None
        size = grid(whole.shape, self.local.scales[0].block)
        named = [("scale0", self.spec.scales[0]), *(("zero0", zero) for zero in self.spec.zeros)]
        return {name: torch.ones(size, dtype=s.element.dtype, device=whole.device) for name, s in named}

    def _choose_rows(self, whole: Tensor, cost: Tensor) -> Planes:
        assert self.local is not None
        planes = choose(whole, self.local, self.given)
        return search(whole, self.local, planes, cost, self.trials) if self.trials else planes

    def _choose_fixed(self, cost: Tensor) -> tuple[Tensor, Tensor | None, int]:
        """-> scale and zero [N, C] of all rows, and the columns of each of C."""
        scales, zeros, cols = [], [], self.k
        for w in self.weights:
            given = (w, self.spec)
            q = encode_searched(*given, cost, self.given, self.trials) if self.trials else encode(*given, self.given)
            self.fixed.append({name: scale_codes(q, name) for name in q.planes if name != "codes"})
            scale, zero = scale_values(q), zero_values(q)
            blocks = [s.block for s in (*self.spec.scales[:1], *self.spec.zeros[:1])] or [(0, 0)]
            cols = min(_columns(block, self.k) for block in blocks)
            scales.append(_by_row(torch.where(scale == 0, TINY, scale), blocks[0], q.shape, cols))
            if zero is not None:
                zeros.append(_by_row(zero, blocks[-1], q.shape, cols))
        whole, offset = torch.cat(scales), torch.cat(zeros) if zeros else None
        if offset is not None:
            offset = offset - middle(self.spec) if self.spec.zeros_in_codes else offset / whole
        return whole, offset, cols


def rowwise(spec: QuantSpec, given: Planes, k: int, searched: bool) -> QuantSpec | None:
    """The spec with blocks of one row, if that is what it amounts to for rows of k columns."""
    if searched and spec.rule in FREE:
        spec = replace(spec, rule=FREE[spec.rule])
    if not spec.scales or spec.rule not in ROWWISE or any(f"scale{i}" not in given for i in range(1, len(spec.scales))):
        return None
    (rows, cols), *others = [scale.block for scale in (spec.scales[0], *spec.zeros)]
    if others and others != [(rows, cols)]:
        return None
    if rows == FLAT and k % cols == 0:
        return replace(spec, scales=(replace(spec.scales[0], block=(1, cols)), *spec.scales[1:]))
    return spec if rows == 1 else None


def _columns(block: tuple[int, int], k: int) -> int:
    rows, cols = block
    if rows == FLAT:
        return cols if k % cols == 0 else 1
    return cols or k


def _by_row(values: Tensor, block: tuple[int, int], shape: Sequence[int], cols: int) -> Tensor:
    """values of blocks [R, C] -> [N, blocks of `cols` columns]."""
    n, k = shape[-2:]
    if block == (0, 0):
        return values.expand(n, -(-k // cols))
    seen = blocked(torch.empty(n, k, device="meta"), block).shape
    return unblocked(per_block(values).expand(seen), (n, k))[:, ::cols]
