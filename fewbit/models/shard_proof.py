"""Proof that a model may be cut: the twin's shards, run as ranks of one process, give the whole twin's logits."""

import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import UnsupportedError
from fewbit.models import hf, twin
from fewbit.models.account import finish
from fewbit.models.fill import prepare
from fewbit.models.shard import PATCHES, Chosen, Shards, all_names, name_of, nothing_stored
from fewbit.models.shard_look import look
from fewbit.models.shard_values import Block, Looked, Stack
from fewbit.models.shrink import shrink
from fewbit.modules.linear import Options

LIMIT = twin.LIMIT  # of the logits, relative: sums in another order come to 1e-5 in some types, wrong cuts to 1e-1
PATIENCE = 60.0  # seconds a simulated rank waits for the others


class Meeting:
    """Where the threads of simulated ranks put what they have."""

    def __init__(self, size: int):
        self.held: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=PATIENCE)


class Simulated:
    """A rank that is a thread of this process."""

    def __init__(self, rank: int, size: int, meeting: Meeting):
        self.rank, self.size, self.meeting, self.near = rank, size, meeting, None

    def _all(self, x: Tensor) -> list[Tensor]:
        self.meeting.held[self.rank] = x
        self.meeting.barrier.wait()
        found = list(self.meeting.held)
        self.meeting.barrier.wait()
        return found

    def reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._all(x)).sum(0)

    def largest(self, x: Tensor) -> Tensor:
        return torch.stack(self._all(x)).amax(0)

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        return torch.cat(self._all(x), -1)


def together(models: Sequence[Any], meeting: Meeting, call: Any) -> list[Any]:
    """call(model) on each rank's model at once -> their results."""
    results: list[Any] = [None] * len(models)
    errors: list[BaseException] = []

    def one(i: int) -> None:
        try:
            results[i] = call(models[i])
        except BaseException as error:  # the others must not wait for it
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@dataclass(frozen=True, slots=True)
class Proven:
    """chosen: what may be cut. reasons: why the rest stays whole."""

    chosen: Chosen
    reasons: tuple[str, ...] = ()


_PROVEN: dict[tuple[str, int], Proven] = {}  # by class and shrunk config, and ranks


def proven(config: Any, size: int) -> Proven:
    """What the twin of a config shows can be cut for so many ranks; an error where that is nothing."""
    small = shrink(config)
    key = type(config).__name__ + small.to_json_string(use_diff=False), size
    if key not in _PROVEN:
        _PROVEN[key] = _prove(small, twin.require(config), sorted({2, min(size, 4)}))
    found = _PROVEN[key]
    if not found.chosen.names:
        asked = f"tensor_parallel_size={size}: nothing of model_type {config.model_type!r} could be cut"
        raise UnsupportedError(asked, found.reasons)
    return found


def _prove(small: Any, attention: str, sizes: Iterable[int]) -> Proven:
    try:
        looked = look(small, attention)
    except Exception as error:  # whatever a model definition raises on numbers of no meaning is the finding
        return Proven(Chosen(frozenset(), False), (twin.told(error),))
    bench = Bench(small, attention, looked)
    stacks = {name_of(item) for items in looked.layers for item in items if isinstance(item, Stack)}
    reasons: dict[str, str] = {}
    head, names, patch = bool(looked.head), all_names(looked) - stacks, ""
    for size in sizes:
        if head and not bench.holds(Chosen(frozenset(), True), size, reasons, looked.head):
            head = False
        names, patch = bench.best(names, head, size, patch, reasons)
        stacks = {name for name in stacks if bench.holds(Chosen(frozenset({name}), head), size, reasons, name)}
    if not names | stacks and not reasons:
        reasons[""] = "no linear reads what others make in independent parts"
    told = tuple(f"{name}: {why}" if name else why for name, why in reasons.items())
    return Proven(Chosen(frozenset(names | stacks), head, patch), told)


class Bench:
    """A twin, and its logits when whole."""

    def __init__(self, small: Any, attention: str, looked: Looked):
        self.small, self.attention, self.looked = small, attention, looked
        self.state, model = twin.filled(small, attention)
        self.wanted = twin.logits(model, small)

    def best(self, names: frozenset[str], head: bool, size: int, patch: str,
             reasons: dict[str, str]) -> tuple[frozenset[str], str]:  # fmt: skip
        """All of the names under some way of telling modules, or those that hold alone."""
        for way in PATCHES[PATCHES.index(patch) :]:
            if self.holds(Chosen(names, head, way), size, {}, ""):
                return names, way
        kept: frozenset[str] = frozenset()
        for name in sorted(names, key=lambda name: (-len(self.paths(name)), name)):
            if any(self.paths(name) & self.paths(other) for other in kept):
                continue  # what has more makers is surer to be what it seems
            for way in PATCHES[PATCHES.index(patch) :]:
                if self.holds(Chosen(kept | {name}, head, way), size, reasons, name):
                    kept, patch = kept | {name}, way
                    reasons.pop(name, None)
                    break
        return kept, patch

    def paths(self, name: str) -> set[str]:
        """Of the linears that a reader's block has."""
        items = [item for layer in self.looked.layers for item in layer if name_of(item) == name]
        return {path for item in items if isinstance(item, Block) for path in (name, *item.makers)}

    def holds(self, chosen: Chosen, size: int, reasons: dict[str, str], name: str) -> bool:
        try:
            error = self.error(chosen, size)
        except Exception as raised:  # shapes that do not fit are what is looked for
            reasons[name] = f"{type(raised).__name__}: {twin.first_line(raised)}"
            return False
        if error > LIMIT:
            reasons[name] = f"the twin's logits differ by {error:.2g} on {size} ranks, allowed {LIMIT:.0e}"
        return error <= LIMIT

    def error(self, chosen: Chosen, size: int) -> float:
        meeting = Meeting(size)
        models = [self.shard(chosen, Simulated(rank, size, meeting)) for rank in range(size)]
        found = together(models, meeting, lambda model: twin.logits(model, self.small))
        return max((twin.relative(g, w) for got in found for g, w in zip(got, self.wanted, strict=True)),
                   default=math.inf)  # fmt: skip

    def shard(self, chosen: Chosen, ranks: Simulated) -> Any:
        model = hf.build(self.small, torch.float32, self.attention)
        prepare(model)
        shards = Shards(model, self.looked, nothing_stored, ranks, chosen)
        shards.prepare(Options())
        filler = shards.filler(model, hf.rules(model), Options(), torch.device("cpu"))
        source = twin.Memory(self.state)
        finish(filler, filler.fill(source), source)
        shards.finish()
        return model
