"""Watcher: what every linear of a module reads while batches run through it, as one Stats for each distinct input.

Linears called with the same tensor share one: query, key and value, or gate and up, are one group. In a stack of
experts each expert of each projection is a group of its own. Nothing that the module computes is changed.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fewbit.algos.algo import Need, Stats
from fewbit.errors import RequestError, UnsupportedError
from fewbit.kernels.input_rounding import version
from fewbit.models.fill import is_stack
from fewbit.modules.attention import WATCH_KV
from fewbit.modules.experts import WATCH
from fewbit.modules.linear import Linear
from fewbit.workflows.stats_gather import Gather, Spread

Key = tuple[Any, ...]
Wanted = Collection[str] | Callable[[str], bool] | None
STACKED = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class WatchedGroup:
    """Parameters that read one input, as paths below the watched module; of a stack, one expert."""

    paths: tuple[str, ...]
    expert: int | None
    stats: Stats
    spread: Spread


@dataclass(slots=True)
class Extremes:
    """The largest magnitude of keys and of values, by head, as they would be cached."""

    key: Tensor  # [G]
    value: Tensor  # [G]


@dataclass(slots=True)
class Held:
    """A group while batches run: the path first seen feeds it, the others must keep reading the same."""

    gather: Gather
    calls: dict[str, int]
    expert: int | None = None

    @property
    def leader(self) -> str:
        return next(iter(self.calls))


@dataclass(slots=True)
class Seen:
    """A tensor that a group has just been fed with; it is not kept alive."""

    held: Held
    storage: StorageWeakRef


class Watcher:
    """Attached from construction until close (or the end of a `with`).

    wanted: parameter paths below `module`, or a test of them; None = every linear and expert. needs: "hessian",
    "sample" of so many rows; moments are kept anyway. histogram: keep one of each input's values. kv: keep the extremes
    of keys and values. experts: only these of a stack. device: where the sums are kept; None = where the input is.
    """

    def __init__(
        self,
        module: nn.Module,
        wanted: Wanted = None,
        *,
        needs: Collection[Need] = (),
        rows: int = 2048,
        histogram: bool = False,
        kv: bool = False,
        experts: Collection[int] | None = None,
        device: torch.device | str | None = None,
    ):
        self.needs, self.rows, self.histogram = frozenset(needs), rows, histogram
        self.device = torch.device(device) if device is not None else None
        self.experts = experts
        self.every = False  # see all_tokens
        self.routed: dict[str, Tensor] = {}  # stack of experts -> tokens that the router sent to each
        self.kv: dict[str, Extremes] = {}  # attention module -> what was seen
        self.wanted: list[str] = []
        self._held: dict[tuple[str, int | None], Held] = {}
        self._last: dict[Key, Seen] = {}
        self._undo: list[Callable[[], None]] = []
        self._attach(module, _test(wanted), kv)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the module. What was gathered stays."""
        while self._undo:
            self._undo.pop()()
        self._last.clear()

    @cached_property
    def groups(self) -> list[WatchedGroup]:
        """What was gathered, in the order of first use. Batches must not run on after this."""
        found = []
        for held in {id(h): h for h in self._held.values()}.values():
            _agree(held)
            stats = held.gather.stats()
            found.append(WatchedGroup(tuple(held.calls), held.expert, stats, held.gather.span()))
        return found

    @property
    def tokens(self) -> dict[tuple[str, int | None], int]:
        """(path, expert) -> tokens that it was fed with."""
        return {key: held.gather.tokens for key, held in self._held.items()}

    @property
    def unseen(self) -> list[str]:
        """Wanted paths that nothing was fed to: parameters read by other means, experts without a token."""
        seen = {path for path, _ in self._held}
        return [path for path in self.wanted if path not in seen]

    def _attach(self, module: nn.Module, wanted: Callable[[str], bool], kv: bool) -> None:
        for path, child in module.named_modules():
            name = f"{path}.weight".removeprefix(".")
            if isinstance(child, (Linear, nn.Linear)) and wanted(name):
                self.wanted.append(name)
                self._undo.append(child.register_forward_pre_hook(self._hook(name)).remove)
            elif is_stack(child):
                self._attach_stack(path, child, wanted)
            if kv:
                # any module may be the one that transformers hands to attention
                self._set(child, WATCH_KV, lambda key, value, path=path: self._see_kv(path, key, value))
        self._undo.append(module.register_forward_pre_hook(lambda *_: self._last.clear()).remove)

    def _attach_stack(self, path: str, child: nn.Module, wanted: Callable[[str], bool]) -> None:
        names = {p: f"{path}.{p}".removeprefix(".") for p in STACKED}
        names = {p: name for p, name in names.items() if _has(child, p) and wanted(name)}
        self.wanted += names.values()
        self._set(child, WATCH, StackWatch(self, path, names, int(getattr(child, "num_experts"))))  # noqa: B009

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        if hasattr(module, name):
            raise RequestError(f"{type(module).__name__} is watched already: close the other Watcher first")
        object.__setattr__(module, name, value)
        self._undo.append(lambda: object.__delattr__(module, name))

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: self._see(path, args[0])

    def _see(self, path: str, x: Tensor) -> None:
        if not x.numel():
            return
        key, now = _key(x), None
        if (seen := self._last.get(key)) is not None and not seen.storage.expired():
            now = seen.held
        held = self._held.get((path, None))
        if held is None:
            # a path that comes late would be given batches that it never read
            first = now is not None and now.calls[now.leader] == 1
            held = now if now is not None and first else Held(self._gather(path, x), {})
            self._held[path, None] = held
            held.calls[path] = 0
        held.calls[path] += 1
        if path == held.leader:
            held.gather.add(x)
            self._last[key] = Seen(held, StorageWeakRef(x.untyped_storage()))
        elif now is not held:
            raise _apart(held, path)

    def see_expert(self, path: str, expert: int, x: Tensor) -> None:
        """x: [n, K], what one expert of a stack reads."""
        held = self._held.get((path, expert))
        if held is None:
            held = self._held[path, expert] = Held(self._gather(f"{path}[{expert}]", x), {path: 0}, expert)
        held.calls[path] += 1
        held.gather.add(x)

    def _see_kv(self, path: str, key: Tensor, value: Tensor) -> None:
        amax = [t.detach().abs().amax((0, 2, 3)).float() for t in (key, value)]
        before = self.kv.get(path)
        if before is None:
            self.kv[path] = Extremes(*amax)
        else:
            before.key, before.value = (torch.maximum(*p) for p in zip((before.key, before.value), amax, strict=True))

    def _gather(self, what: str, x: Tensor) -> Gather:
        return Gather(what, x.shape[-1], self.device or x.device, self.needs, self.rows, self.histogram)


@dataclass(slots=True)
class StackWatch:
    """What a stack of experts tells its Watcher."""

    watcher: Watcher
    path: str
    names: Mapping[str, str]  # projection -> path, those wanted
    count: int
    chosen: list[int] = field(init=False)

    def __post_init__(self) -> None:
        only = self.watcher.experts
        self.chosen = [e for e in range(self.count) if only is None or e in only]

    @property
    def every(self) -> Sequence[int]:
        return self.chosen if self.watcher.every and self.names else ()

    def routed(self, rows: Sequence[int]) -> None:
        counts = self.watcher.routed.setdefault(self.path, torch.zeros(self.count, dtype=torch.int64))
        counts += torch.tensor(rows)

    def __call__(self, projection: str, x: Tensor, rows: Sequence[int]) -> None:
        if projection not in self.names or self.watcher.every:
            return
        runs = x.split(list(rows))
        for e in self.chosen:
            if len(runs[e]):
                self.watcher.see_expert(self.names[projection], e, runs[e])

    def shown(self, projection: str, x: Tensor, expert: int) -> None:
        if projection in self.names:
            self.watcher.see_expert(self.names[projection], expert, x)


@contextmanager
def all_tokens(watcher: Watcher) -> Iterator[None]:
    """Within: the watched experts of every stack are shown all tokens; `routed` still counts the router's choices."""
    before, watcher.every = watcher.every, True
    try:
        yield
    finally:
        watcher.every = before


def _test(wanted: Wanted) -> Callable[[str], bool]:
    if wanted is None:
        return lambda _: True
    return wanted if callable(wanted) else frozenset(wanted).__contains__


def _has(stack: nn.Module, projection: str) -> bool:
    quantized = getattr(stack, "fewbit_experts", None)
    return hasattr(stack, projection) or (quantized is not None and projection in quantized.parts)


def _key(x: Tensor) -> Key:
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, version(x)


def _agree(held: Held) -> None:
    for path, calls in held.calls.items():
        if calls != held.calls[held.leader]:
            raise _apart(held, path)


def _apart(held: Held, path: str) -> UnsupportedError:
    reason = f"wanted={path!r} alone gathers it by itself"
    return UnsupportedError(f"{path} reads the same input as {held.leader} in one batch and not in another", [reason])
