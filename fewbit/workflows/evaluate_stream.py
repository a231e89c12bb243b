"""Running a text through a model layer by layer, and scoring what comes out: never a whole model, no file of logits."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import RequestError
from fewbit.models.hidden import Hidden
from fewbit.models.layers import WHOLE, Layers, State
from fewbit.workflows.convert import Progress

PIECE = 16 << 20  # logits made at a time: 64 MB in float32, of which four may be alive


@dataclass(slots=True)
class Run:
    """A model and the hidden states of a text behind its last layer; the loaded whole where it does not run by layers.

    Then its logits are computed anew for every batch, and cut in pieces afterwards.
    """

    layers: Layers
    state: State
    whole: nn.Module | None = None

    def pieces(self, i: int, step: int) -> Iterator[Tensor]:
        """Logits of batch i [B, at most step, V] float32, of every position that has a next token."""
        ids = self.state.ids[i]
        hidden = None if self.whole is not None else self.state.hidden[i]
        end = ids.shape[1] - 1
        if hidden is None or hidden.dim() != 3:
            logits = self._all(i)
            yield from (logits[:, start : min(start + step, end)].float() for start in range(0, end, step))
            return
        for start in range(0, end, step):
            stop = min(start + step, end)
            piece = State([ids[:, start:stop]], Hidden(1))
            piece[0] = hidden[:, start:stop]
            yield self.layers.logits(piece, 0)

    def _all(self, i: int) -> Tensor:
        if self.whole is None:
            return self.layers.logits(self.state, i)
        return self.layers.run(self.layers.units[0], self.whole, self.state, i)

    def step(self, i: int, alive: int = 1) -> int:
        """Tokens of batch i whose logits fit; alive: how many times as many are held."""
        return max(1, PIECE // (alive * len(self.state.ids[i]) * vocabulary(self.layers.config)))


def run(
    layers: Layers, batches: Sequence[Tensor], stack: ExitStack, progress: Progress, label: str, budget: int | None
) -> Run:
    """Take the batches through every layer."""
    state = layers.start(batches, budget)
    units = {unit.name: unit for unit in layers.units}
    for name in progress(units, label):
        if name == WHOLE:
            return Run(layers, state, stack.enter_context(layers.loaded(units[name])))
        with layers.loaded(units[name]) as module:
            for i in range(len(state)):
                state[i] = layers.run(units[name], module, state, i)
    return Run(layers, state)


COLUMNS = ("tokens", "nll", "base_nll", "kl", "agree")


def scores(model: Run, base: Run | None, i: int) -> Tensor:
    """-> [B, COLUMNS] float64: sums over the scored tokens of each row of batch i."""
    ids = model.state.ids[i]
    step = model.step(i)
    both = zip(*(r.pieces(i, step) for r in (model, base) if r is not None), strict=True)
    return sum((score(list(logits), part) for logits, part in zip(both, targets(ids, step), strict=True)), start())


def start() -> Tensor:
    return torch.zeros(1, len(COLUMNS), dtype=torch.float64)


def targets(ids: Tensor, step: int) -> Iterator[Tensor]:
    """The tokens that pieces of logits are about."""
    yield from ids[:, 1:].split(step, 1)


def score(logits: list[Tensor], wanted: Tensor) -> Tensor:
    """logits: [B, n, V] of the model and maybe of the base (given away: the list is emptied) -> [B, COLUMNS]."""
    tops = [held.argmax(-1) for held in logits]
    found = []
    while logits:
        found.append(logits.pop(0).log_softmax(-1))
    nll = [-held.gather(-1, wanted[..., None])[..., 0] for held in found]
    columns = [torch.ones_like(nll[0]), nll[0]]
    if len(found) == 2:
        columns += [nll[1], divergence(found[1], found[0]), (tops[0] == tops[1]).float()]
    sums = [column.double().sum(1).cpu() for column in columns]
    return torch.stack(sums + [torch.zeros_like(sums[0])] * (len(COLUMNS) - len(sums)), -1)


def divergence(base: Tensor, model: Tensor) -> Tensor:
    """KL(base || model) of log-probabilities [..., V] -> [...]; model is written over."""
    gap = torch.sub(base, model, out=model)
    return gap.mul_(base.exp()).sum(-1)


def vocabulary(config: Any) -> int:
    return int(config.get_text_config().vocab_size)


def check_vocabularies(a: Layers, b: Layers) -> None:
    sizes = [vocabulary(layers.config) for layers in (a, b)]
    if sizes[0] != sizes[1]:
        names = [str(layers.source.path) for layers in (a, b)]
        told = f"{names[0]} has {sizes[0]} tokens, {names[1]} has {sizes[1]}"
        raise RequestError(f"the models do not share a vocabulary: {told}; compare a model with its own base")


def check_ids(layers: Layers, largest: int, context: int) -> None:
    """Refuse what would fail inside the model, or run it where it was never meant to."""
    size = vocabulary(layers.config)
    if largest >= size:
        raise RequestError(f"token {largest} is not in the vocabulary of {layers.source.path}, which has {size}")
    most = getattr(layers.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and context > most:
        raise RequestError(f"context={context}: {layers.source.path} knows {most} positions; --context {most} works")
