"""Runners: tokens of many streams -> the logits that are wanted.

Paged packs them into one flat row over a paged cache. Alone runs each stream by itself with transformers' own cache,
for architectures whose state is not keys and values by position. The twin decides which; both see the same Work.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewbit.engine.scheduler import Work
from fewbit.modules.paged import Cache, Span, Step, stepping


def rounder(count: int) -> int:
    """A count of rows of which there are few: for each new one, libraries compile and keep a multiplication."""
    step = 1 if count <= 16 else 16 if count <= 128 else 32 if count <= 512 else 64
    return -(-count // step) * step


class Runner(Protocol):
    paged: bool

    def run(self, works: Sequence[Work]) -> list[Tensor]: ...

    def free(self) -> None: ...


def wanted(work: Work) -> list[int]:
    """Places among the work's own tokens whose logits are needed."""
    count = work.stop - work.start
    if work.stream.request.params.prompt_logprobs is not None and work.stop <= work.stream.prompt_length:
        return list(range(count))
    return [count - 1] if work.samples else []


class Paged:
    """One forward for all. Slots are page x size + place; caches are made as the first step meets the layers."""

    paged = True

    def __init__(self, model: nn.Module, pages: int, size: int, cache_dtype: torch.dtype | None, apart: bool = False):
        self.model, self.size, self.capacity, self.cache_dtype = model, size, pages * size, cache_dtype
        self.apart = apart  # one stream a forward: rotary tables that depend on the longest text of a batch
        self.caches: dict[int, Cache] = {}
        self.device = device_of(model)
        self.keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def run(self, works: Sequence[Work]) -> list[Tensor]:
        """-> for each work its wanted logits, [n, V]."""
        if self.apart:
            return [logits for work in works for logits in self._forward([work])]
        return self._forward(works)

    def _forward(self, works: Sequence[Work]) -> list[Tensor]:
        """Rows beyond the last text make the count a rounder one; what they write goes to a slot that nobody reads."""
        ids = [t for w in works for t in w.stream.tokens[w.start : w.stop]]
        positions = [p for w in works for p in range(w.start, w.stop)]
        extra = rounder(len(ids)) - len(ids)
        spans, slots, rows, at = [], [], [], 0
        for work in works:
            held = self._slots(work)
            count = work.stop - work.start
            spans.append(Span(at, at + count, work.stop, held))
            slots.append(held[work.start :])
            rows.append([at + i for i in wanted(work)])
            at += count
        slots.append(torch.full((extra,), self.capacity, device=self.device))
        step = Step(torch.cat(slots), lambda: spans, self.caches, self.capacity + 1, self.cache_dtype)
        asked = [r for each in rows for r in each]
        logits = self._logits(step, ids + [0] * extra, positions + [0] * extra, asked)
        return list(logits.split([len(each) for each in rows]))

    def _slots(self, work: Work) -> Tensor:
        """[stop]: where every token of the text lies."""
        pages = torch.tensor(work.stream.pages, device=self.device)
        return (pages[:, None] * self.size + torch.arange(self.size, device=self.device)).flatten()[: work.stop]

    def _logits(self, step: Step, ids: list[int], positions: list[int], rows: list[int]) -> Tensor:
        keep = torch.tensor(rows + [0] * (rounder(len(rows)) - len(rows)), dtype=torch.long, device=self.device)
        asked: dict[str, Any] = {"logits_to_keep": keep} if self.keeps else {}
        with stepping(step), torch.inference_mode():
            out = self.model(
                input_ids=torch.tensor([ids], device=self.device),
                position_ids=torch.tensor([positions], device=self.device), use_cache=False, **asked,
            ).logits[0]  # fmt: skip
        return (out if self.keeps else out[keep])[: len(rows)]

    def slot_bytes(self) -> int:
        """What one token takes in all layers, seen by running one."""
        slots = torch.zeros(1, dtype=torch.long, device=self.device)
        step = Step(slots, lambda: [Span(0, 1, 1, slots)], {}, 1, self.cache_dtype)
        self._logits(step, [0], [0], [0])
        return sum(cache.slot_bytes for cache in step.caches.values())

    def free(self) -> None:
        self.caches.clear()


class Alone:
    """Each stream by itself: its text at once, then token by token on transformers' own cache.

    cache: the name that the model's outputs and arguments have for it; "" where the twin found none that goes on
    exactly, and every step computes the whole text.
    """

    paged = False

    def __init__(self, model: nn.Module, cache: str):
        self.model, self.cache, self.device = model, cache, device_of(model)

    def run(self, works: Sequence[Work]) -> list[Tensor]:
        return [self._one(work) for work in works]

    def _one(self, work: Work) -> Tensor:
        stream, rows = work.stream, wanted(work)
        if not rows:  # a chunk of a prompt: it is computed with the last one
            return torch.empty(0, 0)
        held, cache = stream.state or (0, None)
        start = held if cache is not None and held == work.start == work.stop - 1 else 0
        ids = torch.tensor([stream.tokens[start : work.stop]], device=self.device)
        asked = {self.cache: cache if start else None, "use_cache": True} if self.cache else {"use_cache": False}
        with torch.inference_mode():
            out = self.model(input_ids=ids, **asked)
        stream.state = (work.stop, getattr(out, self.cache)) if self.cache else None
        return out.logits[0][[work.start - start + row for row in rows]]

    def free(self) -> None:
        pass


def device_of(model: nn.Module) -> torch.device:
    return next(t.device for t in [*model.parameters(), *model.buffers()] if t.device.type != "meta")
