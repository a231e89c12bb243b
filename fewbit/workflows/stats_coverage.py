"""Coverage: how much of a model the calibration text reached, and what to do about experts it did not reach."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fewbit.errors import RequestError, SpecError
from fewbit.workflows.stats import WatchedGroup, Watcher

Policy = Literal["error", "weights-only", "all-tokens"]
POLICIES: tuple[Policy, ...] = ("error", "weights-only", "all-tokens")
ONE = re.compile(r"(?P<stack>(?:.+\.)?experts)\.(?P<expert>\d+)\.")


@dataclass(frozen=True, slots=True)
class Coverage:
    """tokens and lengths: of the samples. The rest by path: tokens of each expert, experts below the least number that
    was asked for, and how many channels of an input were 0 throughout."""

    tokens: int = 0
    lengths: Mapping[int, int] = field(default_factory=dict)  # length -> samples
    experts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    starved: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    inactive: Mapping[str, int] = field(default_factory=dict)
    channels: int = 0  # of all inputs together


def check_experts(
    counts: Mapping[str, Tensor | Sequence[int]], least: int, policy: Policy = "error"
) -> dict[str, tuple[int, ...]]:
    """Stack of experts -> those that saw fewer than `least` tokens, if any.

    error: they are one. weights-only: the caller encodes them without stats. all-tokens: the caller runs the batches
    again with a Watcher of these experts inside `all_tokens`.
    """
    if policy not in POLICIES:
        raise SpecError(f"policy {policy!r} for experts is not known; known: {', '.join(POLICIES)}")
    found = {path: tuple(e for e, n in enumerate(_ints(of)) if n < least) for path, of in counts.items()}
    starved = {path: experts for path, experts in found.items() if experts}
    if starved and policy == "error":
        raise RequestError(_told(starved, counts, least))
    return starved


def expert_tokens(watcher: Watcher) -> dict[str, tuple[int, ...]]:
    """Stack of experts -> tokens that each was sent, for stacks and for lists of modules named `experts.N`."""
    found = {path: tuple(_ints(counts)) for path, counts in watcher.routed.items()}
    lists: dict[str, dict[int, int]] = {}
    for path in watcher.wanted:
        if match := ONE.match(path):
            lists.setdefault(match["stack"], {})[int(match["expert"])] = 0
    for (path, _), tokens in watcher.tokens.items():
        if match := ONE.match(path):
            held, expert = lists[match["stack"]], int(match["expert"])
            held[expert] = max(held[expert], tokens)
    return found | {path: tuple(of[e] for e in sorted(of)) for path, of in lists.items()}


def cover(watcher: Watcher, groups: Sequence[WatchedGroup], least: int = 0, prefix: str = "") -> Coverage:
    """Of one layer. groups: watcher.groups; prefix: put before its paths."""
    experts = expert_tokens(watcher)
    starved = check_experts(experts, least, "weights-only")
    inactive: Counter[str] = Counter()
    for group in groups:
        inactive[group.paths[0]] += int((group.stats.amax == 0).sum())
    return Coverage(
        experts={prefix + path: of for path, of in experts.items()},
        starved={prefix + path: of for path, of in starved.items()},
        inactive={prefix + path: n for path, n in inactive.items() if n},
        channels=sum(len(group.stats.amax) for group in groups),
    )


def combine(ids: Iterable[Tensor], layers: Iterable[Coverage]) -> Coverage:
    """Of the samples and all layers."""
    lengths = Counter(len(row) for row in ids)
    experts: dict[str, tuple[int, ...]] = {}
    starved: dict[str, tuple[int, ...]] = {}
    inactive: dict[str, int] = {}
    channels = 0
    for layer in layers:
        experts, starved = {**experts, **layer.experts}, {**starved, **layer.starved}
        inactive, channels = {**inactive, **layer.inactive}, channels + layer.channels
    tokens = sum(length * n for length, n in lengths.items())
    return Coverage(tokens, dict(sorted(lengths.items())), experts, starved, inactive, channels)


def _ints(counts: Tensor | Sequence[int]) -> list[int]:
    return [int(n) for n in (counts.tolist() if isinstance(counts, torch.Tensor) else counts)]


def _told(starved: Mapping[str, tuple[int, ...]], counts: Mapping[str, Tensor | Sequence[int]], least: int) -> str:
    path, experts = next(iter(starved.items()))
    saw = ", ".join(f"{e} ({_ints(counts[path])[e]})" for e in experts[:8]) + (" ..." if len(experts) > 8 else "")
    more = f", and experts of {len(starved) - 1} more stacks" if len(starved) > 1 else ""
    return (
        f"{path}: experts saw fewer than {least} tokens: {saw}{more}; what would work: more samples, a text nearer to"
        " what the model is for, or the policy weights-only or all-tokens"
    )
