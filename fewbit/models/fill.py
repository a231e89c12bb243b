"""Filling: tensors arrive one at a time and go straight into their place; nothing waits but what must be joined.

A plain tensor becomes the parameter itself, or is copied into its slot of one. A quantized one is bound to its Linear,
Embedding or stack of experts. `online` may name an Arrival for a parameter: then it is encoded as it arrives, by the
device that it goes to where that gives the same bits.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewbit.errors import CheckpointError, FewbitError, UnsupportedError
from fewbit.models.arrival import Arrival, Online, online
from fewbit.models.placement import Group, Placement, Rules, cut, natural
from fewbit.modules.embedding import Embedding
from fewbit.modules.experts import ATTRIBUTE, Experts, empty_stack, put
from fewbit.modules.linear import Linear, Options, on_device
from fewbit.quant.qtensor import Quantized, slice
from fewbit.quant.reference import decode

MIXED = "part of what it belongs to is quantized on disk, and part is not"


class Tensors(Protocol):
    """Where weights come from: a codec's Source, or a dict of tensors."""

    @property
    def modules(self) -> Mapping[str, Any]:
        """Quantized modules: entries with a shape."""

    @property
    def dense(self) -> Mapping[str, Any]:
        """Plain tensors: entries with a shape."""

    def read(self, name: str) -> Any: ...


@dataclass(slots=True)
class Filler:
    """The state of one model being filled."""

    model: nn.Module
    rules: Rules
    options: Options
    device: torch.device
    online: Online = lambda path, module: None
    watch: Callable[[str, Quantized], None] = lambda name, q: None  # sees every quantized module as it arrives
    tell: Callable[[int, int], None] = lambda done, total: None
    filled: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # parameter -> values written
    parts: dict[str, dict[int, Quantized]] = field(default_factory=lambda: defaultdict(dict))
    offsets: dict[tuple[str, int], int] = field(default_factory=dict)  # (parameter, part) -> where it starts
    waiting: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))

    def fill(self, source: Tensors) -> dict[str, Placement | None]:
        """Read everything that has a place. -> all placements, by disk name."""
        asked = {name: ask(name, entry.shape) for name, entry in source.modules.items()}
        asked |= {name: name for name in source.dense}
        found = self.rules.place(asked.values())
        places = {name: found[query] for name, query in asked.items()}
        self._offsets(places, source)
        for done, (name, place) in enumerate(places.items()):
            if place is not None:
                self._arrive(name, place, source.read(name))
            self.tell(done + 1, len(places))
        return places

    def _offsets(self, places: Mapping[str, Placement | None], source: Tensors) -> None:
        sizes: dict[str, dict[int, int]] = defaultdict(dict)
        for name, place in places.items():
            if place is not None and place.parts > 1 and place.group is None:
                entry = source.modules.get(name) or source.dense[name]
                sizes[place.target][place.part] = entry.shape[place.axis]
        for target, held in sizes.items():
            start = 0
            for part in sorted(held):
                self.offsets[target, part] = start
                start += held[part]

    def _arrive(self, name: str, place: Placement, value: Any) -> None:
        try:
            if place.group is not None:
                self._gather(name, place.group, dense(value, self.options.dtype))
            elif isinstance(value, Quantized):
                self.watch(name, value)
                self._quantized(name, place, value)
            else:
                self._dense(name, place, value)
        except FewbitError as error:
            raise type(error)(f"{name}: {error}") from error

    def _gather(self, name: str, group: Group, tensor: Tensor) -> None:
        """Wait for all sources of a transformers operation, then run it."""
        held = self.waiting[group.target]
        held[name] = tensor
        if held.keys() != group.sources.keys():
            return
        sources: dict[str, list[Tensor]] = defaultdict(list)
        for source in sorted(held, key=natural):
            sources[group.sources[source]].append(held[source])
        del self.waiting[group.target]
        for target, made in self.rules.convert(group.converter, group.target, sources).items():
            self._dense(name, Placement((target,)), made)

    def _dense(self, name: str, place: Placement, tensor: Tensor) -> None:
        if place.swap:
            tensor = tensor.transpose(*place.swap)
        if len(place.targets) == 1:
            self._one(place, tensor)
        else:
            shapes = [self.rules.parameters[t] for t in place.targets]
            for target, piece in zip(place.targets, cut(tensor, shapes, place.axis), strict=True):
                self._one(Placement((target,)), piece)

    def _one(self, place: Placement, tensor: Tensor) -> None:
        module, leaf = owner(self.model, place.target)
        arrival = self.online(place.target, module) if tensor.is_floating_point() else None
        if arrival is None:
            if place.target in self.parts:
                raise UnsupportedError(MIXED)
            self.filled[place.target] += tensor.numel()
            self._write(module, leaf, place, tensor)
        elif is_stack(module) and place.expert is None:
            for e, matrix in enumerate(tensor):
                oriented = matrix.mT if module.is_transposed else matrix
                self._stack(place.target, 0, e, self._encoded(oriented, arrival.expert(e)))
        else:
            own = self.part(place, arrival, len(tensor))
            self._quantized(place.target, place, self._encoded(tensor, own))

    def _encoded(self, tensor: Tensor, arrival: Arrival) -> Quantized:
        """One matrix, by the GPU where it is to live, if that makes the same of it as a CPU."""
        there = self.device.type == "cuda" and arrival.anywhere
        return online(tensor.to(self.device) if there else tensor, arrival, self.options.dtype)

    def part(self, place: Placement, arrival: Arrival, rows: int) -> Arrival:
        """Of the tensor that fills a place."""
        start = self.offsets.get((place.target, place.part), 0)
        own = arrival if place.expert is None else arrival.expert(place.expert)
        return own.rows(start, start + rows) if place.parts > 1 else own

    def _write(self, module: nn.Module, leaf: str, place: Placement, tensor: Tensor) -> None:
        held = module._parameters.get(leaf)
        held = module._buffers[leaf] if held is None else held
        if place.expert is None and place.parts == 1:
            same_shape(tensor, held.shape)
            owned = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
            assign(module, leaf, owned.to(self.device, held.dtype).contiguous())
        else:
            self._write_slot(module, leaf, place, tensor)

    def _write_slot(self, module: nn.Module, leaf: str, place: Placement, tensor: Tensor) -> None:
        """One expert, or one part, of a parameter that several tensors fill."""
        held = module._parameters[leaf]
        if held.is_meta:
            assign(module, leaf, torch.empty(held.shape, dtype=held.dtype, device=self.device))
            held = module._parameters[leaf]
        slot = held.data if place.expert is None else held.data[place.expert]
        if place.parts > 1:
            start = self.offsets[place.target, place.part]
            slot = slot.narrow(place.axis, start, min(tensor.shape[place.axis], slot.shape[place.axis] - start))
        same_shape(tensor, slot.shape)
        slot.copy_(tensor)

    def _quantized(self, name: str, place: Placement, q: Quantized) -> None:
        module, _ = owner(self.model, place.target)
        if len(place.targets) > 1:
            self._cut(name, place, q)
        elif place.expert is not None and is_stack(module):
            self._stack(place.target, place.part, place.expert, q)
        elif is_stack(module) or isinstance(module, Linear | nn.Embedding):
            self.parts[place.target][place.part] = on_device(q, self.device)
            self._bind(place.target, q)
        else:
            self._loose(module, place, q)

    def _loose(self, module: nn.Module, place: Placement, q: Quantized) -> None:
        """A quantized tensor whose module only knows plain ones: decoded, where that says the same."""
        kind = type(module).__name__
        if len(q.weight.shape) > 2 or place.expert is not None:
            raise UnsupportedError(f"{kind} holds its experts in a way of its own; quantized it is not supported")
        plain = dense(q, self.options.dtype)
        shape = self.rules.parameters[place.target]
        self._dense(place.target, place, plain.mT if plain.shape != shape and plain.mT.shape == shape else plain)

    def _cut(self, name: str, place: Placement, q: Quantized) -> None:
        """One quantized matrix that the model holds as several, along N."""
        if place.axis != len(q.weight.shape) - 2 or any(t.kind == "low_rank" for t in q.transforms):
            raise UnsupportedError("a quantized tensor can only be cut along its outputs, without a low-rank branch")
        start = 0
        for target in place.targets:
            stop = start + self.rules.parameters[target][place.axis]
            piece = Quantized(q.format, slice(q.weight, -2, start, stop), q.act, q.transforms)
            self._quantized(name, Placement((target,)), piece)
            start = stop

    def _stack(self, target: str, part: int, e: int, q: Quantized) -> None:
        count = self.rules.parameters[target][0]
        held = self.parts[target]
        if part not in held:
            held[part] = empty_stack(count, q, self.device)
        if e >= count:
            raise CheckpointError(f"expert {e} of {count}")
        put(held[part], e, q, target)
        self._bind(target, q)

    def _bind(self, target: str, q: Quantized) -> None:
        """Count q in; when the parameter is whole, hand its parts to the module that runs them."""
        module, leaf = owner(self.model, target)
        if not module._parameters[leaf].is_meta:
            raise UnsupportedError(MIXED)
        self.filled[target] += prod(q.weight.shape)
        if self.filled[target] != prod(self.rules.parameters[target]):
            return
        held = self.parts.pop(target)
        parts = tuple(held[i] for i in sorted(held))
        if is_stack(module):
            bind_experts(module, leaf, parts, self.options)
        elif isinstance(module, nn.Embedding):
            table = Embedding(module, parts[0].weight, self.options.dtype)
            replace(self.model, target.rpartition(".")[0], table)
        else:
            module.bind(parts, self.options)


def prepare(model: nn.Module) -> None:
    """Put our Linear in the place of every plain one."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            replace(model, path, Linear.of(module))


def settle(model: nn.Module) -> None:
    """Choose kernels for every quantized linear, one after the other."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.settle()


def ask(name: str, shape: Sequence[int]) -> str:
    """A quantized module's name as the tensor to look for: `<module>.weight`, or stacked experts' own name."""
    return name if len(shape) > 2 else f"{name}.weight"


def dense(value: Quantized | Tensor, dtype: torch.dtype) -> Tensor:
    """A plain tensor; a quantized one decoded, if nothing but its weight says what the layer does."""
    if isinstance(value, Tensor):
        return value
    beside = [t.kind for t in value.transforms] + (["rounded activations"] if value.format.act else [])
    if beside:
        raise UnsupportedError(f"its module takes plain tensors only, and this one has {', '.join(beside)}")
    return decode(value.weight).to(dtype)


def is_stack(module: nn.Module) -> bool:
    """True for a module under transformers' experts decorator."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")


def owner(model: nn.Module, path: str) -> tuple[Any, str]:
    module, _, leaf = path.rpartition(".")
    return model.get_submodule(module), leaf


def assign(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def bind_experts(host: nn.Module, projection: str, parts: tuple[Quantized, ...], options: Options) -> None:
    if not hasattr(host, ATTRIBUTE):
        setattr(host, ATTRIBUTE, Experts(options))
    getattr(host, ATTRIBUTE).bind(projection, parts)
    host._parameters.pop(projection, None)


def same_shape(tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise CheckpointError(f"shape {list(tensor.shape)} on disk, the model holds {list(shape)}")
