"""Folds: scales that a tool took out of one module and put into the next, so that both differ and the model does not.

A norm, or the rows of a linear, divided by s per channel, and the columns of what reads it multiplied by s. Found on
the weights; then a's inputs and outputs are brought into b's scaling before they are compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewbit.modules.linear import Linear
from fewbit.workflows.diff_calls import Call
from fewbit.workflows.diff_rounding import Matrix, matrix

NEAR = 0.05  # how near two scales must be to be each other's inverse
AGREE = 0.15  # how near those of one channel must be
BETTER = 0.7  # how much of the difference may remain


@dataclass(frozen=True, slots=True)
class Fold:
    """b's scaling of a module: its input is a's divided by `into`, its output a's divided by `out`."""

    into: Tensor | None = None
    out: Tensor | None = None

    def call(self, call: Call) -> Call:
        args, output = call.args, call.output
        if self.into is not None:
            args = (args[0] / self.into.to(args[0].dtype), *args[1:])
        if self.out is not None and output is not None:
            output = output / self.out.to(output.dtype)
        return replace(call, args=args, output=output)

    @property
    def back(self) -> "Fold":
        """From b's scaling to a's."""
        return Fold(*(None if s is None else 1 / s for s in (self.into, self.out)))

    def matrix(self, m: Matrix) -> Matrix:
        if self.into is None and self.out is None:
            return m
        w = m.values(0, m.rows)
        w = w if self.into is None else w * self.into
        return Matrix(dense=w if self.out is None else w / self.out[:, None])


def folds(calls: Sequence[Call], modules: Mapping[str, tuple[Any, Any]], head: int) -> dict[str, Fold]:
    """What is folded among the calls of a unit; modules: path -> (of a, of b); head: width of an attention head."""
    linears = {c.path: c for c in calls if isinstance(modules[c.path][0], Linear)}
    found: dict[str, Fold] = {}
    for call in calls:
        readers = [path for path, c in linears.items() if call.output is not None and c.args[0] is call.output]
        if readers and call.path not in linears:
            _norm(found, call, readers, modules)
    for path in linears:
        _rows(found, path, linears, modules, head)
    return found


def _norm(found: dict[str, Fold], call: Call, readers: list[str], modules: Mapping[str, tuple[Any, Any]]) -> None:
    """What b's module makes of the same input, per channel; believed when half of the readers undo it."""
    after, before = call.again(modules[call.path][1]), call.output
    if after is None or before is None:
        return
    scale = ratio(before.flatten(0, -2), after.flatten(0, -2), 0)
    if not bool((scale.abs() > 1e-4).all()) or float((scale - 1).abs().max()) < 2.0**-7:
        return
    pairs = [weights(modules[path]) for path in readers]
    if 2 * sum(undoes(*pair, 1 / scale) for pair in pairs) >= len(readers):
        into = agreed(1 / scale, [scales(modules[path], 0) for path in readers])
        found[call.path] = Fold(out=into)
        found.update({path: Fold(into=into) for path in readers})


def agreed(scale: Tensor, columns: Sequence[Tensor]) -> Tensor:
    """The scale of each channel as the norm has it, where some reader has it too; else as the readers have it."""
    held = torch.stack(list(columns))
    near = ((held / scale - 1).abs() < AGREE).any(0)
    return torch.where(near, scale, held.median(0).values)


def _rows(
    found: dict[str, Fold], path: str, linears: Mapping[str, Call], modules: Mapping[str, tuple[Any, Any]], head: int
) -> None:
    """Columns of a linear whose scales stand in the rows of another one."""
    if path in found and found[path].into is not None:
        return
    a, b = weights(modules[path])
    scale = scales(modules[path], 0)
    if not bool((scale > 1e-4).all()) or not undoes(a, b, scale):
        return
    for other in linears:
        held = found.get(other, Fold())
        if other == path or held.out is not None or not fits(matrix(modules[other][0]).rows, len(scale), head):
            continue
        rows = scales(modules[other], 1, held)
        if float((expanded(rows, len(scale), head) * scale - 1).abs().median()) < NEAR:
            found[other] = replace(held, out=1 / rows)
            found[path] = replace(found.get(path, Fold()), into=expanded(1 / rows, len(scale), head))
            return


def weights(pair: tuple[Any, Any], fold: Fold | None = None) -> tuple[Tensor, Tensor]:
    a, b = (matrix(m) for m in pair)
    a = a if fold is None else fold.matrix(a)
    return a.values(0, a.rows), b.values(0, b.rows)


def scales(pair: tuple[Any, Any], axis: int, fold: Fold | None = None) -> Tensor:
    """The factors between two weights, taken where possible from the one that is not rounded: rounding blurs them."""
    a, b = weights(pair, fold)
    forth, back = ratio(a, b, axis), 1 / ratio(b, a, axis)
    rounded = [bool(matrix(m).parts) for m in pair]
    if rounded[0] == rounded[1]:
        return (forth * back).clamp(min=0).sqrt()
    return back if rounded[0] else forth


def ratio(a: Tensor, b: Tensor, axis: int) -> Tensor:
    """The factors that bring a nearest to b, one for each place of the other axis."""
    a, b = a.float(), b.float()
    norm = a.square().sum(axis)
    return torch.where(norm > 0, (a * b).sum(axis) / norm, 1.0)


def undoes(a: Tensor, b: Tensor, scale: Tensor) -> bool:
    """True when scaled columns explain most of what two weights differ by."""
    return float((b - a * scale).norm()) < BETTER * float((b - a).norm())


def expanded(rows: Tensor, count: int, head: int) -> Tensor:
    """Rows of value heads as the columns of the output projection, where several query heads share one."""
    if len(rows) == count:
        return rows
    return rows.view(-1, 1, head).expand(-1, count // len(rows), head).reshape(-1)


def fits(rows: int, count: int, head: int) -> bool:
    return rows == count or (count % rows == 0 and rows % head == 0)
