"""A model to be loaded in part: what the twin proves, what the real sizes show, and how the checkpoint stores it."""

import logging
from collections import defaultdict
from typing import Any

from torch import nn

from fewbit.models import hf, twin
from fewbit.models.arrival import Online
from fewbit.models.fill import Tensors, ask, is_stack, owner
from fewbit.models.placement import Placement
from fewbit.models.shard import Shards
from fewbit.models.shard_look import look
from fewbit.models.shard_plan import Lookup, Piece, Stored
from fewbit.models.shard_proof import proven
from fewbit.modules.linear import Linear, Options
from fewbit.modules.parted import Ranks

LOG = logging.getLogger("fewbit.models")
SHARDS = "fewbit_shards"  # where a model holds its Shards
Formats = dict[str, dict[int, tuple[int, int, Any]]]  # parameter -> part -> rows, columns, format


def sharded(model: Any, config: Any, source: Tensors, online: Online, options: Options, ranks: Ranks) -> Shards:
    """The shards of an empty model whose linears are ours already; hooks are in place."""
    found = proven(config, ranks.size)
    seen = look(config, twin.require(config))
    shards = Shards(model, seen, stored(model, source, online), ranks, found.chosen)
    if ranks.rank == 0:
        LOG.info("%s%s", shards.told(), "".join(f"; {reason}" for reason in found.reasons))
    shards.prepare(options)
    setattr(model, SHARDS, shards)
    return shards


def stored(model: Any, source: Tensors, online: Online) -> Lookup:
    """Parameter -> its pieces along N, each with its format; none where it is dense."""
    found: Formats = defaultdict(dict)
    rules = hf.rules(model)
    asked = {name: ask(name, entry.shape) for name, entry in source.modules.items()} | {n: n for n in source.dense}
    places = rules.place(asked.values())
    for name, query in asked.items():
        place = places[query]
        if place is not None and name in source.modules and place.group is None:
            declared(found, place, source.modules[name], rules.parameters)
        elif place is not None and name in source.dense:
            encoded(found, place, model, online)
    held = {path: pieces(parts) for path, parts in found.items()}
    held |= {to: held[of] for to, of in hf.ties(model).items() if of in held and to not in held}
    return lambda path: held.get(path, ())


def declared(found: Formats, place: Placement, entry: Any, shapes: Any) -> None:
    n, k = entry.shape[-2:]
    for target in place.targets:
        rows = n if len(place.targets) == 1 else shapes[target][-2]
        found[target].setdefault(place.part, (rows, k, entry.format))


def encoded(found: Formats, place: Placement, model: nn.Module, online: Online) -> None:
    """Parameters that are quantized as they arrive."""
    for target in place.targets:
        module, leaf = owner(model, target)
        if target in found or not (is_stack(module) or isinstance(module, Linear)):
            continue
        arrival = online(target, module)
        if arrival is not None:
            format, (n, k) = arrival.format, module._parameters[leaf].shape[-2:]
            found[target][0] = (k, n, format) if getattr(module, "is_transposed", False) else (n, k, format)


def pieces(parts: dict[int, tuple[int, int, Any]]) -> Stored:
    out, start = [], 0
    for part in sorted(parts):
        rows, columns, format = parts[part]
        out.append(Piece(start, start + rows, columns, format))
        start += rows
    return tuple(out)
