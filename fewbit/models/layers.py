"""Layers: a checkpoint run one decoder layer at a time, so that a model larger than memory can be run at all.

How a model hands its layers what they need is not known but observed: the model's own forward is run with its layers
replaced by recorders, once per shape of batch. The twin proves that layer by layer gives what the whole model gives;
where it does not, the whole model is the one layer.
"""

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from fewbit.errors import CheckpointError
from fewbit.kernels.registry import DECODED
from fewbit.models import hf, kv, twin
from fewbit.models.account import matches
from fewbit.models.build import resolve_dtype
from fewbit.models.device import present
from fewbit.models.fill import Filler, ask, assign, owner, prepare
from fewbit.models.hidden import Hidden
from fewbit.models.placement import Placement, natural
from fewbit.models.shrink import shrink
from fewbit.models.verify import model_config
from fewbit.modules.linear import Options
from fewbit.quant.qtensor import Quantized

WHOLE = "model"  # the name of the one unit of a model that does not run by layers
LIMIT = 1e-6


@dataclass(frozen=True, slots=True)
class Unit:
    """What is in memory together: one decoder layer, or everything."""

    name: str  # its path in the model
    index: int
    names: tuple[str, ...]  # of its tensors and modules on disk


@dataclass(slots=True)
class State:
    """The batches of one run: their ids, and the hidden states between two layers."""

    ids: list[Tensor]
    hidden: Hidden
    calls: dict[tuple[int, ...], list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def __setitem__(self, i: int, value: Tensor) -> None:
        self.hidden[i] = value


@dataclass(slots=True)
class Subset:
    """Some of the tensors of a source, or others in their place."""

    modules: dict[str, Any]
    dense: dict[str, Any]
    read: Callable[[str], Any]


class Layers:
    """One model over a source of tensors. A context: it closes nothing of the source."""

    def __init__(
        self,
        source: Any,
        *,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device = "cpu",
        activations: str = "declared",
        config: Any = None,
        attention: str | None = None,
        path: str | None = None,
        plain: bool = False,
        cached: kv.Asked | None = None,
    ):
        """plain: linears stay transformers' own."""
        self.source, self.device = source, present(device)
        self.config = model_config(source) if config is None else config
        self.options = Options(DECODED, activations, resolve_dtype(dtype, self.config))
        self.model = hf.build(self.config, self.options.dtype, attention or twin.require(self.config))
        if not plain:
            prepare(self.model)
        self.rules = hf.rules(self.model)
        self.path = layer_list(self.config) if path is None else path
        if getattr(source, "plan", None) is not None:
            kv.apply(self.model, source, self._filler(), cached)
        self.places = self._place()
        self.units, self.outer = self._units()
        self._held: set[str] = set()
        _move_buffers(self.model, self.device)

    def _filler(self) -> Filler:
        return Filler(self.model, self.rules, self.options, self.device)

    def _place(self) -> dict[str, Placement]:
        asked = {name: ask(name, entry.shape) for name, entry in self.source.modules.items()}
        asked |= {name: name for name in self.source.dense}
        found = self.rules.place(asked.values())
        return {name: place for name, query in asked.items() if (place := found[query]) is not None}

    def _units(self) -> tuple[list[Unit], tuple[str, ...]]:
        if not self.path:
            return [Unit(WHOLE, 0, tuple(self.places))], ()
        held: dict[int, list[str]] = defaultdict(list)
        outer = []
        for name, place in self.places.items():
            index = layer_of(place.target, self.path)
            (outer if index is None else held[index]).append(name)
        count = len(self.model.get_submodule(self.path))
        units = [Unit(f"{self.path}.{i}", i, tuple(sorted(held[i], key=natural))) for i in range(count)]
        return units, tuple(outer)

    def start(self, batches: Sequence[Tensor], budget: int | None = None, folder: Path | None = None) -> State:
        """batches: [B, T] ids each, every row full. -> their hidden states before the first unit.

        budget: bytes of hidden states kept in memory; what is beyond goes to a file in `folder`.
        """
        state = State([b.to(self.device) for b in batches], Hidden(len(batches), budget, folder))
        if not self.path:
            return state
        self._load_outer(head=False)
        for i, ids in enumerate(state.ids):
            calls = state.calls.setdefault(tuple(ids.shape), [])
            with self._recorded(calls, None) as caught, torch.no_grad(), contextlib.suppress(_Stop):
                self.model(input_ids=ids, use_cache=False)
            state[i] = caught[0]
        return state

    def release(self) -> None:
        """Let go of what is outside the layers; `logits` and `start` read it anew."""
        targets = {target for name in self._held for target in self.places[name].targets}
        ties = hf.ties(self.model)
        targets |= {path for pair in ties.items() for path in pair if set(pair) & targets}
        for path in targets:
            module, leaf = owner(self.model, path)
            if module._parameters.get(leaf) is not None:
                assign(module, leaf, torch.empty_like(module._parameters[leaf], device="meta"))
        self._held.clear()

    @contextlib.contextmanager
    def loaded(self, unit: Unit, instead: Mapping[str, Quantized | Tensor] | None = None) -> Iterator[nn.Module]:
        """The unit with its tensors in place; instead: what stands for some of them, by disk name."""
        instead = instead or {}
        pristine = self.model if unit.name == WHOLE else self.model.get_submodule(unit.name)
        module = copy.deepcopy(pristine)
        self._swap(unit, module)
        try:
            self._fill(unit.names, instead)
            self._complete(unit.name, module)
            yield module
        finally:
            self._swap(unit, pristine)

    def _swap(self, unit: Unit, module: nn.Module) -> None:
        if unit.name == WHOLE:
            self.model = module
        else:
            self.model.get_submodule(self.path)[unit.index] = module

    def _fill(self, names: Iterable[str], instead: Mapping[str, Quantized | Tensor]) -> None:
        modules: dict[str, Any] = {}
        dense: dict[str, Any] = {}
        for name in names:
            key = name.removesuffix(".weight") if name not in instead else name
            value = instead.get(name, instead.get(key))
            if value is None:
                (modules if name in self.source.modules else dense)[name] = self._entry(name)
            elif isinstance(value, Quantized):
                modules[key] = value.weight
            else:
                dense[name if name in self.source.dense else f"{name}.weight"] = value

        def read(name: str) -> Any:
            for key in (name, name.removesuffix(".weight"), f"{name}.weight"):
                if key in instead:
                    return instead[key]
            return self.source.read(name)

        filler = self._filler()
        filler.fill(Subset(modules, dense, read))
        self._tie(filler)

    def _entry(self, name: str) -> Any:
        return self.source.modules[name] if name in self.source.modules else self.source.dense[name]

    def _tie(self, filler: Filler) -> None:
        """A head that shares the embedding's memory, when one of them came."""
        from fewbit.models.account import share

        for target, origin in hf.ties(self.model).items():
            if filler.filled.get(origin) and not filler.filled.get(target):
                share(filler, origin, target)
            elif filler.filled.get(target) and not filler.filled.get(origin):
                share(filler, target, origin)

    def _complete(self, prefix: str, module: nn.Module) -> None:
        """Every parameter has come, or may be missing and is zero."""
        missing, _ = hf.optional(self.model)
        for path, parameter in module.named_parameters():
            if parameter.is_meta:
                full = path if prefix == WHOLE else f"{prefix}.{path}"
                if not matches(missing, full):
                    raise CheckpointError(f"{full}: missing, the model holds {list(parameter.shape)}")
                assign(*owner(module, path), torch.zeros_like(parameter, device=self.device))

    def _load_outer(self, head: bool) -> None:
        """What is outside the layers; the output head, if it has tensors of its own, only when asked for."""
        own = hf.output_head(self.model)
        paths = {p for p, m in self.model.named_modules() if own is not None and m is own}
        names = [n for n in self.outer if n not in self._held]
        if not head:
            names = [n for n in names if self.places[n].target.rpartition(".")[0] not in paths]
        self._fill(names, {})
        self._held |= set(names)

    def run(self, unit: Unit, module: nn.Module, state: State, i: int) -> Tensor:
        """Batch i through the loaded unit -> its output: hidden states [B, T, H], or logits of a whole model."""
        if unit.name == WHOLE:
            return module(input_ids=state.ids[i], use_cache=False).logits
        args, kwargs = state.calls[tuple(state.ids[i].shape)][unit.index]
        return first(module(state.hidden[i].to(self.device), *args, **kwargs))

    def logits(self, state: State, i: int) -> Tensor:
        """[B, T, V] float32 of batch i, whose hidden states have passed the last unit."""
        if not self.path:
            return state.hidden[i].float()
        self._load_outer(head=True)
        with self._recorded([], state.hidden[i].to(self.device)), torch.no_grad():
            return self.model(input_ids=state.ids[i], use_cache=False).logits.float()

    @contextlib.contextmanager
    def _recorded(self, calls: list[Any], last: Tensor | None) -> Iterator[list[Tensor]]:
        """Run the model without its layers: what enters the first is caught, and `last` comes out of the last one."""
        layers = list(self.model.get_submodule(self.path))
        wrap = tuple_outputs(self.config)
        caught: list[Tensor] = []
        fresh = not calls

        def recorder(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
                if not caught:
                    caught.append(hidden)
                if fresh:
                    calls.append((tuple(rest), kwargs))
                if index + 1 == len(layers):
                    if last is None:
                        raise _Stop
                    hidden = last
                return (hidden, *[None] * (wrap - 1)) if wrap else hidden

            return forward

        for index, layer in enumerate(layers):
            layer.forward = recorder(index)
        try:
            yield caught
        finally:
            for layer in layers:
                del layer.forward

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._held.clear()


class _Stop(Exception):
    """Everything before the layers has run."""


def first(output: Any) -> Tensor:
    """The hidden states among what a layer returns."""
    return output[0] if isinstance(output, tuple) else output


def layer_of(target: str, path: str) -> int | None:
    """The number of the layer that a parameter belongs to."""
    if not target.startswith(f"{path}."):
        return None
    return int(target[len(path) + 1 :].partition(".")[0])


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


@dataclass(frozen=True, slots=True)
class Shape:
    """How a type of model runs its layers."""

    path: str  # of the ModuleList; "" = not layer by layer
    tuples: int  # length of the tuple that a layer returns; 0 = the tensor itself
    why: str = ""


_SHAPES: dict[str, Shape] = {}


def layer_list(config: Any) -> str:
    """The path of the decoder layers, or "" where running them one by one is not exact."""
    return shape_of(config).path


def tuple_outputs(config: Any) -> int:
    return shape_of(config).tuples


def shape_of(config: Any) -> Shape:
    """Found on the twin, and proven there."""
    key = type(config).__name__ + shrink(config).to_json_string(use_diff=False)
    if key not in _SHAPES:
        try:
            _SHAPES[key] = _prove(config, key)
        except Exception as error:  # whatever a model definition raises here only says that it runs whole
            _SHAPES[key] = Shape("", 0, twin.told(error))
    return _SHAPES[key]


def _prove(config: Any, key: str) -> Shape:
    """Run the twin whole, see which list of modules carries the hidden states, run it by layers, compare."""
    attention = twin.require(config)
    small = shrink(config)
    state, model = twin.filled(small, attention)
    ids = [torch.randint(10, 100, (2, n), generator=torch.Generator().manual_seed(n)) for n in (twin.LENGTH, 7)]
    found = _carriers(model, ids[0])
    if not found:
        return Shape("", 0, "no list of layers carries the hidden states from one to the next")
    path, tuples = found
    _SHAPES[key] = Shape(path, tuples)
    memory = twin.Memory(state)
    layers = Layers(memory, config=small, dtype=torch.float32, attention=attention, path=path)
    run = layers.start([ids[0], ids[0].flip(-1), ids[1]])
    with torch.no_grad():
        for unit in layers.units:
            with layers.loaded(unit) as module:
                for i in range(len(run)):
                    run[i] = layers.run(unit, module, run, i)
        for i in range(len(run)):
            wanted = model(input_ids=run.ids[i], use_cache=False).logits
            error = twin.relative(layers.logits(run, i), wanted)
            if error > LIMIT:
                return Shape("", 0, f"layer by layer, logits of a tiny twin differ by {error:.2g}")
    return Shape(path, tuples)


def _carriers(model: nn.Module, ids: Tensor) -> tuple[str, int] | None:
    """The list whose modules are called once each, in order, each with what the one before gave."""
    lists = {p: m for p, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    seen: dict[str, list[tuple[int, Any, Any]]] = defaultdict(list)
    hooks = []
    for path, held in lists.items():
        for i, layer in enumerate(held):

            def hook(module: Any, args: Any, kwargs: Any, output: Any, path: str = path, i: int = i) -> None:
                seen[path].append((i, args[0] if args else kwargs.get("hidden_states"), output))

            hooks.append(layer.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in hooks:
        handle.remove()
    for path in sorted(seen, key=lambda p: -sum(t.numel() for t in lists[p].parameters())):
        calls = seen[path]
        if [c[0] for c in calls] == list(range(len(lists[path]))) and _chained(calls):
            last = calls[-1][2]
            return path, len(last) if isinstance(last, tuple) else 0
    return None


def _chained(calls: Sequence[tuple[int, Any, Any]]) -> bool:
    tensors = all(isinstance(given, Tensor) and isinstance(first(out), Tensor) for _, given, out in calls)
    return tensors and all(torch.equal(first(a[2]), b[1]) for a, b in pairwise(calls))
