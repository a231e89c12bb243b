"""Sharding: a model of which this rank holds a part. Weights are cut as they arrive; sums and joins are hooks.

The linear that reads what was made in parts adds up over the ranks, as a stack of experts does; the output head's
logits are put side by side. Everything else is the model's own code, on fewer heads and channels.
"""

import copy
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import FewbitError, UnsupportedError
from fewbit.models import shard_take
from fewbit.models.fill import Filler, assign, is_stack, owner
from fewbit.models.placement import Placement
from fewbit.models.shard_plan import Heads, Lookup, Share, head_cuts, plan
from fewbit.models.shard_round import by_kernel, taken_out
from fewbit.models.shard_values import Block, Cut, Looked, Stack
from fewbit.modules.attention import KV
from fewbit.modules.attention_sides import SIDES, mapped
from fewbit.modules.attention_sides import of as sides_of
from fewbit.modules.experts import ATTRIBUTE, Experts
from fewbit.modules.linear import Linear, Options, as_run
from fewbit.modules.parted import Parted, Ranks
from fewbit.quant.qtensor import Quantized

WIDTHS = ("embed_dim", "hidden_size", "all_head_size", "inner_dim", "d_model")  # attributes that views may use
PATCHES = ("", "heads", "widths", "config")  # what is told to modules that reshape by numbers of their own


class Shards:
    """This rank's part of one model: which, and what has been cut so far. chosen: names of what may be cut."""

    def __init__(self, model: nn.Module, looked: Looked, stored: Lookup, ranks: Ranks, chosen: "Chosen"):
        self.model, self.ranks, self.stored, self.patch = model, ranks, stored, chosen.patch
        self.cuts: dict[str, Cut] = {}
        self.heads: dict[str, Heads] = {}
        self.whole: set[str] = set()  # readers that no cut fits, by their path in a layer
        self.axes: dict[str, tuple[int, Cut] | None] = {}  # parameter -> what to take; None: another rank has it
        known: dict[Any, list[Share]] = {}
        for i, items in enumerate(looked.layers):
            self._layer(f"{looked.path}.{i}", chosen.of(items), known)
        if looked.head and chosen.head:
            head: Any = model.get_submodule(looked.head)
            cuts = head_cuts(head.out_features, stored(f"{looked.head}.weight"), ranks.size)
            self.cuts |= {looked.head: cuts[ranks.rank]} if cuts else {}

    def _layer(self, prefix: str, items: tuple[Block | Stack, ...], known: dict[Any, list[Share]]) -> None:
        def stored(path: str) -> Any:
            full = f"{prefix}.{path}"
            return self.stored(full) or self.stored(f"{full}.weight")

        paths = [p for item in items if isinstance(item, Block) for p in (item.reader, *item.makers)]
        if len(paths) != len(set(paths)):
            raise UnsupportedError(f"{prefix}: a linear cannot be cut in two ways")
        key = id(items[0]) if items else 0, len(items), tuple(stored(path) for path in paths)
        if key not in known:
            known[key] = plan(items, stored, self.ranks.size)
        share = known[key][self.ranks.rank]
        self.whole |= {i.reader for i in items if isinstance(i, Block) and not share.cuts.keys() & {i.reader, i.host}}
        self.cuts |= {f"{prefix}.{path}": cut for path, cut in share.cuts.items()}
        self.heads |= {f"{prefix}.{path}": heads for path, heads in share.heads.items()}

    def prepare(self, options: Options) -> None:
        """Make the empty model ready: sizes, hooks, and how weights are to be cut when they come."""
        for path, cut in self.cuts.items():
            parent, _, leaf = path.rpartition(".")
            module = self.model.get_submodule(parent)
            if leaf in module._parameters and not is_stack(module):
                self.axes[path] = (0, cut)
            elif is_stack(module):
                self._projection(module, parent, leaf, cut)
            elif cut.kind == "experts":
                self._experts(getattr(module, leaf), path, cut, options)
            else:
                self._linear(getattr(module, leaf), path, cut)
        for host in {p.rpartition(".")[0] for p in self.cuts}:
            if is_stack(module := self.model.get_submodule(host)):
                leaves = {
                    leaf: self.cuts[f"{host}.{leaf}"] for leaf in module._parameters if f"{host}.{leaf}" in self.cuts
                }
                self._stack(module, host, leaves, options)
        for reader, heads in self.heads.items():
            self._tell(self.model.get_submodule(reader.rpartition(".")[0]), heads)

    def _linear(self, module: Linear, path: str, cut: Cut) -> None:
        if cut.kind == "columns":
            self._reader(module, path, cut)
            return
        module.bind = lambda parts, options: Linear.bind(module, self._taken(path, parts, cut), options)  # type: ignore[method-assign]
        module.out_features = cut.count
        self.axes |= {f"{path}.weight": (0, cut), f"{path}.bias": (0, cut)}
        if cut.sizes:
            module.register_forward_hook(lambda _m, _a, y: self.ranks.gather(y, cut.sizes))

    def _reader(self, module: Linear, path: str, cut: Cut) -> None:
        """A linear that gives part of a sum; its bias is added on one rank."""
        parted = module.parted = Parted(self.ranks, cut.sizes if cut.whole else ())

        def bind(parts: tuple[Quantized, ...], options: Options) -> None:
            mine = tuple(as_run(q, options) for q in self._taken(path, parts, cut))
            parted.how = by_kernel(mine, options)
            if parted.how is None:
                parted.rounded, mine = taken_out(mine)
            Linear.bind(module, mine, options)

        module.bind = bind  # type: ignore[method-assign]
        module.in_features = cut.count
        self.axes |= {f"{path}.weight": (1, cut)} | ({f"{path}.bias": None} if self.ranks.rank else {})

    def _taken(self, path: str, parts: tuple[Quantized, ...], cut: Cut) -> tuple[Quantized, ...]:
        try:
            return shard_take.take(parts, cut)
        except FewbitError as error:
            raise UnsupportedError(f"{path} on {self.ranks.size} ranks: {error}") from error

    def _projection(self, host: Any, path: str, leaf: str, cut: Cut) -> None:
        along = -2 if (cut.kind == "rows") != host.is_transposed else -1
        self.axes[f"{path}.{leaf}"] = (along, cut)
        if cut.kind == "rows":
            self.axes[f"{path}.{leaf}_bias"] = (-1, cut)
        elif self.ranks.rank:
            self.axes[f"{path}.{leaf}_bias"] = None

    def _experts(self, host: Any, path: str, cut: Cut, options: Options) -> None:
        ((start, stop),) = cut.runs
        self.axes |= {f"{path}.{leaf}": (0, cut) for leaf in host._parameters}
        host.num_experts = stop - start
        host.register_forward_pre_hook(local_choices(start, stop), with_kwargs=True)
        self._stack(host, path, dict.fromkeys(host._parameters, cut), options)

    def _stack(self, host: Any, path: str, cuts: Mapping[str, Cut], options: Options) -> None:
        """A stack that gives part of a sum. cuts: of its projections."""
        ours = Experts(options)

        def bind(projection: str, parts: Sequence[Quantized]) -> None:
            Experts.bind(ours, projection, self._taken(f"{path}.{projection}", tuple(parts), cuts[projection]))

        ours.bind = bind  # type: ignore[method-assign]
        setattr(host, ATTRIBUTE, ours)
        host.register_forward_hook(lambda _m, _a, y: self.ranks.reduce(y))

    def _tell(self, host: nn.Module, heads: Heads) -> None:
        """Put a rank's own numbers where a module's code reshapes by them."""
        if self.patch == "":
            return
        counts = {heads.total: len(heads.groups)} | {heads.units[0]: heads.units[1]}
        renumber(host, counts)
        if self.patch != "heads":
            renumber(host, {heads.width[0]: heads.width[1]}, WIDTHS)
        if self.patch == "config" and hasattr(host, "config"):
            host.config = copy.copy(host.config)
            renumber(host.config, counts)

    def settle(self, path: str) -> None:
        """Cut a parameter that is whole."""
        if path not in self.axes:
            return
        module, leaf = owner(self.model, path)
        held = module._parameters.get(leaf)
        if held is None or held.is_meta:
            return
        wanted = self.axes.pop(path)
        if wanted is not None:
            assign(module, leaf, shard_take.dense(held.data, wanted[0], wanted[1].runs))
        elif is_stack(module):
            assign(module, leaf, torch.zeros_like(held))
        else:
            module._parameters[leaf] = None

    def finish(self) -> None:
        """What came by ways of its own: tied weights, zeros for what may be missing, scales of the cache."""
        for path in list(self.axes):
            self.settle(path)
        for reader, heads in self.heads.items():
            module = self.model.get_submodule(reader.rpartition(".")[0])
            if (kv := getattr(module, KV, None)) is not None:
                spec, *planes = kv
                setattr(module, KV, (spec, *({n: cache_scale(p, heads, reader) for n, p in of.items()}
                                             for of in planes)))  # fmt: skip
            if hasattr(module, SIDES):
                setattr(module, SIDES, mapped(sides_of(module), partial(cache_scale, heads=heads, reader=reader)))

    def filler(self, *args: Any) -> "ShardFiller":
        made = ShardFiller(*args)
        made.shards = self
        return made

    def told(self) -> str:
        """What is cut and what is not, in one line."""
        count = Counter(cut.kind for cut in self.cuts.values())
        said = ", ".join(f"{n} cut by {kind}" for kind, n in count.items())
        left = f"; whole on every rank, because no cut fits how they are stored: {', '.join(sorted(self.whole))}"
        return f"{self.ranks.size} ranks: {said or 'nothing is cut'}{left if self.whole else ''}"


def renumber(holder: Any, new: Mapping[int, int], names: Collection[str] = ()) -> None:
    """Change the numbers of an object that count heads, or those of the names given."""
    for name, value in list(vars(holder).items()):
        counts = name in names or (not names and "head" in name and "dim" not in name and "size" not in name)
        if counts and type(value) is int and value in new:
            setattr(holder, name, new[value])


def cache_scale(plane: Tensor, heads: Heads, reader: str) -> Tensor:
    """Scales of the cache's heads; one for all stays."""
    if plane.dim() < 3:
        return plane
    if len(plane) != heads.total:
        raise UnsupportedError(f"{reader}: {len(plane)} KV scales, and its heads are cut in {heads.total} groups")
    return plane[torch.tensor(heads.groups, device=plane.device)]


def local_choices(start: int, stop: int) -> Callable[..., Any]:
    """Experts by their number on this rank; those of others get a number that names none."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        local = torch.where((index >= start) & (index < stop), index - start, stop - start)
        if "top_k_index" in kwargs:
            return args, {**kwargs, "top_k_index": local}
        return (args[0], local, *args[2:]), kwargs

    return hook


class ShardFiller(Filler):
    """Cuts a dense parameter as soon as it is whole."""

    shards: Shards

    def _write(self, module: nn.Module, leaf: str, place: Placement, tensor: Tensor) -> None:
        super()._write(module, leaf, place, tensor)
        if self.filled[place.target] == prod(self.rules.parameters[place.target]):
            self.shards.settle(place.target)


class Chosen:
    """What the twin has proven: names of readers and stacks in a layer, the head, and how modules are told."""

    def __init__(self, names: frozenset[str], head: bool, patch: str = ""):
        self.names, self.head, self.patch = names, head, patch
        self._of: dict[int, tuple[Any, tuple[Block | Stack, ...]]] = {}

    def of(self, items: tuple[Block | Stack, ...]) -> tuple[Block | Stack, ...]:
        """Those of a layer's items; the same value for the same items."""
        if id(items) not in self._of:
            self._of[id(items)] = items, tuple(item for item in items if name_of(item) in self.names)
        return self._of[id(items)][1]


def name_of(item: Block | Stack) -> str:
    return item.reader if isinstance(item, Block) else item.host


def all_names(looked: Looked) -> frozenset[str]:
    return frozenset(name_of(item) for items in looked.layers for item in items)


def nothing_stored(path: str) -> tuple[()]:
    """Of a model that is dense."""
    return ()


__all__ = ["PATCHES", "Chosen", "Shards", "all_names", "nothing_stored"]
