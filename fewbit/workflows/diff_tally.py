"""Tally: how far two modules are apart, summed over batches."""

from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import SpecError, UnsupportedError
from fewbit.modules.embedding import Embedding
from fewbit.modules.embedding import rows as table_rows
from fewbit.modules.linear import Linear
from fewbit.quant.formats import name_of
from fewbit.quant.qtensor import Quantized
from fewbit.quant.reference import decode, encode
from fewbit.quant.spec import Format, describe
from fewbit.workflows.diff_calls import Call, own
from fewbit.workflows.diff_folds import Fold
from fewbit.workflows.diff_rounding import Matrix, Rounding, apart, matrix, roundings

FACTOR = 3.0  # of what the format explains, an error is still its doing
STORAGE = 2.0**-7  # what bfloat16 makes of a value, twice
FLOOR = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-17}  # what arithmetic explains


@dataclass(frozen=True, slots=True)
class ModuleDifference:
    """One module of b against the same of a; errors are relative Frobenius norms."""

    name: str
    kind: str
    format_a: str
    format_b: str
    weight: float | None  # of the decoded weights
    own: float | None  # of the outputs, each model with its own inputs; None for experts, whose rows differ
    same: float | None  # of the outputs, both with a's inputs
    explained: float | None  # what the formats alone would make of it; None where that cannot be said
    limit: float | None  # what it may be
    exceeded: bool


@dataclass(slots=True)
class Tally:
    name: str
    kind: str = ""
    formats: tuple[str, str] = ("", "")
    weight: float | None = None
    norm: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)  # squared errors: own, same, explained
    roundings: dict[int, list[Rounding] | None] = field(default_factory=dict)  # by expert, while the unit is loaded
    unknown: bool = False  # some format could not be encoded
    wrong: bool = False  # plain parameters, and not the same

    def add(self, what: str, squared: float) -> None:
        self.sums[what] = self.sums.get(what, 0.0) + squared

    def result(self, dtype: torch.dtype) -> ModuleDifference:
        own_error, same, explained = (self._relative(what) for what in ("own", "same", "explained"))
        explained = None if self.unknown else explained or 0.0
        limit = None if explained is None else FACTOR * explained + FLOOR[dtype]
        found = self.weight if same is None else same  # weights alone, where nothing can be run
        exceeded = self.wrong or (limit is not None and found is not None and not found <= limit)
        return ModuleDifference(
            self.name, self.kind, *self.formats, self.weight, own_error, same, explained, limit, exceeded
        )

    def _relative(self, what: str) -> float | None:
        if what not in self.sums:
            return None
        return relative(self.sums[what], self.norm)


def relative(squared: float, norm: float) -> float:
    return sqrt(squared / norm) if norm > 0 else sqrt(squared)


def squared(x: Tensor) -> float:
    return float(x.float().square().sum(dtype=torch.float64))


def begin(tally: Tally, call: Call, a: nn.Module, b: nn.Module, fold: Fold) -> None:
    """What does not depend on the inputs: formats and weights."""
    tally.kind = "Experts" if call.projection else type(a).__name__
    pairs = [(matrices(a, call), matrices(b, call))] if weighty(a, call) else []
    if pairs:
        tally.formats = told(pairs[0][0][0]), told(pairs[0][1][0])
        found = [apart(fold.matrix(x), y) for x, y in zip(*pairs[0], strict=True)]
    else:
        found = [vectors(a, b)] if fold == Fold() else []
        tally.wrong = bool(found) and changed(a, b)
        tally.formats = tuple(str(p[0].dtype)[6:] if (p := own(m)) else "" for m in (a, b))  # type: ignore[assignment]
    if found:
        tally.weight = relative(sum(gap for gap, _ in found), sum(norm for _, norm in found))


def weighty(module: nn.Module, call: Call) -> bool:
    return bool(call.projection) or isinstance(module, Linear | Embedding | nn.Embedding)


def matrices(module: Any, call: Call) -> list[Matrix]:
    if call.projection:
        return [matrix(module, call.projection, e) for e in range(module.num_experts)]
    if isinstance(module, Linear):
        return [matrix(module)]
    return [table(module)]


def table(module: Any) -> Matrix:
    if isinstance(module, Embedding):
        return Matrix((Quantized(Format(module.table.spec), module.table),))
    return Matrix(dense=module.weight)


def told(m: Matrix) -> str:
    if m.dense is not None:
        return str(m.dense.dtype).removeprefix("torch.")
    return ", ".join(dict.fromkeys(name_of(q.format) or describe(q.format.weight) for q in m.parts))


def vectors(a: nn.Module, b: nn.Module) -> tuple[float, float]:
    """Squared norms of the difference of all parameters, and of the parameters."""
    pairs = list(zip(own(a), own(b), strict=True))
    return sum(squared(y.float() - x.float()) for x, y in pairs), sum(squared(x) for x, _ in pairs)


def changed(a: nn.Module, b: nn.Module) -> bool:
    """True when some parameter is further off than storage in another float type brings it."""
    pairs = [(x.float(), y.float()) for x, y in zip(own(a), own(b), strict=True)]
    return any(bool(((y - x).abs() > STORAGE * x.abs() + 1e-6 * x.abs().amax()).any()) for x, y in pairs)


def add(tally: Tally, mine: Call, other: Call | None, a: Any, b: Any, fold: Fold) -> None:
    """Count one call: mine of a (in b's scaling), other of b (with its own inputs)."""
    wanted = mine.again(a) if mine.output is None else mine.output
    got = mine.again(b)
    if wanted is None or got is None:
        return
    norm = squared(wanted)
    tally.norm += norm
    tally.add("same", squared(got.float() - wanted.float()))
    if other is not None and other.output is not None and other.output.shape == wanted.shape:
        tally.add("own", squared(other.output.float() - wanted.float()))
    if mine.projection:
        _explain_experts(tally, mine, wanted, a, b)
    elif isinstance(a, Linear):
        _explain(tally, 0, matrix(a), matrix(b), mine.args[0], wanted, fold)
    elif isinstance(a, Embedding | nn.Embedding):
        _explain_lookup(tally, mine.args[0], table(a), table(b), norm)


def _explain(tally: Tally, e: int, a: Matrix, b: Matrix, x: Tensor, wanted: Tensor, fold: Fold) -> None:
    if e not in tally.roundings:
        tally.roundings[e] = _roundings(a, b, fold, x.dtype)
    found = tally.roundings[e]
    tally.unknown |= found is None
    for side in found or ():
        error = squared(side.error(x))
        start, stop = side.span
        if len(side.rows) < stop - start:  # some rows stand for all
            seen = squared(wanted.index_select(-1, side.rows))
            error *= squared(wanted[..., start:stop]) / seen if seen else 1.0
        tally.add("explained", error)


def _roundings(a: Matrix, b: Matrix, fold: Fold, dtype: torch.dtype) -> list[Rounding] | None:
    """b's format in b's scaling; where scales were folded, a's format in a's."""
    found = roundings(fold.matrix(a), b, dtype)
    if found is None or not a.parts or fold == Fold():
        return found
    back = roundings(a, fold.back.matrix(Matrix(dense=b.values(0, b.rows))), dtype)
    if back is None:
        return None
    return found + [replace(r, before=fold.into, after=None if fold.out is None else fold.out[r.rows]) for r in back]


def _explain_experts(tally: Tally, call: Call, wanted: Tensor, a: Any, b: Any) -> None:
    x, counts = call.args
    for e, (run, out) in enumerate(zip(x.split(counts), wanted.split(counts), strict=True)):
        if len(run):
            _explain(tally, e, matrix(a, call.projection, e), matrix(b, call.projection, e), run, out, Fold())


def _explain_lookup(tally: Tally, ids: Tensor, a: Matrix, b: Matrix, norm: float) -> None:
    """Rounding of the rows that were looked up."""
    needed, places = ids.unique(return_inverse=True)
    specs = [m.parts[0].weight.spec if m.parts else None for m in (a, b)]
    if specs[0] == specs[1]:
        return
    for of, to in ((a, b), (b, a)):
        if not to.parts:
            continue
        w = table_rows(of.parts[0].weight, needed) if of.dense is None else of.dense[needed].float()
        try:
            gap = decode(encode(w, to.parts[0].weight.spec)) - w
        except (SpecError, UnsupportedError):
            tally.unknown = True
            continue
        tally.add("explained", norm * squared(gap[places]) / max(squared(w[places]), 1e-30))
