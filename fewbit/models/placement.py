"""Placement: where a tensor on disk goes in the model, as data read off transformers' conversion rules.

Renamings change the name. A converter is read as structure where it can be (experts stacked, parts along an axis, one
tensor cut in several, axes swapped): then each tensor is written into its slot as it arrives, quantized or not. What it
cannot say is a `Group`: its sources are gathered and given to transformers' own operation, dense.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Rename = Callable[[str], tuple[str, str | None]]  # name -> (new name, the pattern that matched)


@dataclass(slots=True)
class Group:
    """Tensors that only a transformers operation can put together."""

    target: str
    converter: Any
    sources: dict[str, str] = field(default_factory=dict)  # disk name -> the source pattern it matched


@dataclass(frozen=True, slots=True)
class Placement:
    """One disk tensor's place. targets: parameter paths; several mean that the tensor is cut along `axis`.

    expert: its index on the target's leading axis. part of parts: where it lies along `axis` of that slot.
    """

    targets: tuple[str, ...]
    expert: int | None = None
    part: int = 0
    parts: int = 1
    axis: int = 0
    swap: tuple[int, int] | None = None  # axes exchanged on the way in
    group: Group | None = field(default=None, compare=False)

    @property
    def target(self) -> str:
        return self.targets[0]


@dataclass(frozen=True, slots=True)
class Rules:
    """What transformers knows about the names of one model's tensors."""

    renamings: Sequence[Any]
    converters: Sequence[Any]
    parameters: Mapping[str, Sequence[int]]  # path -> shape
    prefix: str  # base_model_prefix
    convert: Callable[[Any, str, dict[str, list[Tensor]]], dict[str, Tensor]]

    def place(self, names: Iterable[str]) -> dict[str, Placement | None]:
        """names of tensors on disk -> where each goes; None: nowhere in this model."""
        groups: dict[str, Group] = {}
        return {name: self._place(name, groups) for name in sorted(names, key=natural)}

    def _place(self, name: str, groups: dict[str, Group]) -> Placement | None:
        for spelling in spellings(name):
            found = self._resolve(name, spelling, groups)
            if found is not None:
                return found
        return None

    def _resolve(self, name: str, spelling: str, groups: dict[str, Group]) -> Placement | None:
        renamed = spelling
        for renaming in self.renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        for converter in self.converters:
            target, pattern = converter.rename_source_key(renamed)
            if pattern is not None:
                return self._converted(name, renamed, self.prefixed(target), converter, pattern, groups)
        for candidate in (renamed, spelling):
            if (path := self.prefixed(candidate)) in self.parameters:
                return Placement((path,))
        return None

    def prefixed(self, name: str) -> str:
        """The name with the base model's prefix taken off or put on, whichever the model has."""
        bare = name.removeprefix(f"{self.prefix}.")
        if bare != name and bare in self.parameters:
            return bare
        return f"{self.prefix}.{name}" if f"{self.prefix}.{name}" in self.parameters else name

    def _converted(
        self, name: str, renamed: str, target: str, converter: Any, pattern: str, groups: dict[str, Group]
    ) -> Placement | None:
        targets = tuple(target.replace(converter.target_patterns[0], t) for t in converter.target_patterns)
        if any(t not in self.parameters for t in targets):
            # already in the model's own form, or not of this model
            path = self.prefixed(name)
            return Placement((path,)) if path in self.parameters else None
        part, parts = converter.source_patterns.index(pattern), len(converter.source_patterns)
        found = structure(converter.operations, targets, part, parts, expert_number(renamed, pattern))
        if found is not None:
            return found
        group = groups.setdefault(target, Group(target, converter))
        group.sources[name] = pattern
        return Placement(targets, part=part, parts=parts, group=group)


def structure(
    ops: Sequence[Any], targets: tuple[str, ...], part: int, parts: int, expert: int | None
) -> Placement | None:
    """A chain of operations as a Placement, or None when it is not plain structure."""
    kinds = tuple(type(op).__name__ for op in ops)
    dims = [getattr(op, "dim", None) for op in ops]
    counted = any(getattr(op, "num_shards_attribute", None) for op in ops)
    if kinds == ("MergeModulelist",) and dims == [0] and parts == len(targets) == 1:
        return Placement(targets, expert)
    if kinds == ("MergeModulelist", "Concatenate") and dims == [0, 1] and not counted:
        return Placement(targets, expert, part, parts)
    if kinds == ("Concatenate",) and not counted:
        return Placement(targets, None, part, parts, dims[0] or 0)
    if kinds in (("Chunk",), ("Split",)) and parts == 1 and not counted:
        return Placement(targets, axis=dims[0] or 0)
    if kinds == ("Transpose",) and parts == len(targets) == 1 and not getattr(ops[0], "check_dims", False):
        return Placement(targets, swap=(ops[0].dim0, ops[0].dim1))
    return None


def expert_number(name: str, pattern: str) -> int | None:
    """The number that `*` of a source pattern stands for in a name."""
    if "*" not in pattern:
        return None
    found = re.search(pattern.replace("*.", r"(\d+)\."), name)
    return int(found[1]) if found else None


# Tools write the experts of one model under each other's names.
EXPERT_NAMES = (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))


def spellings(name: str) -> Iterator[str]:
    """The name itself, then the same expert's projection as others call it."""
    yield name
    for a, b in EXPERT_NAMES:
        for old, new in ((a, b), (b, a)):
            other = re.sub(rf"(\.experts\.\d+)\.{old}\.", rf"\1.{new}.", name)
            if other != name:
                yield other


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key: numbers between dots by value, before words."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def cut(tensor: Tensor, shapes: Sequence[Sequence[int]], axis: int) -> tuple[Tensor, ...]:
    """A tensor in the pieces that these parameters want along an axis."""
    return torch.split(tensor, [shape[axis] for shape in shapes], axis)
