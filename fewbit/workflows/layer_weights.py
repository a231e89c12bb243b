"""LayerWeights: a layer's float32 weights by parameter, put together from tensors on disk, and taken apart again."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from fewbit.models.layers import WHOLE, Layers, Unit
from fewbit.models.placement import Placement

Read = Callable[[str], Tensor]


class LayerWeights(Mapping[str, Tensor]):
    """Parameter path below the unit -> its value, read when first asked for. names: those of the tensors on disk."""

    def __init__(self, layers: Layers, unit: Unit, read: Read):
        self.read = read
        prefix = "" if unit.name == WHOLE else f"{unit.name}."
        self.places: dict[str, Placement] = {}
        self.names: dict[str, list[str]] = defaultdict(list)
        for name in unit.names:
            place = layers.places[name]
            if place.group is None:
                self.places[name] = place
                for target in place.targets:
                    self.names[target.removeprefix(prefix)].append(name)
        self.prefix, self.parameters = prefix, layers.rules.parameters
        self._held: dict[str, Tensor] = {}

    def __getitem__(self, path: str) -> Tensor:
        if path not in self.names:
            raise KeyError(path)
        if path not in self._held:
            self._held |= joined({n: self.read(n) for n in self.names[path]}, self.places, self.parameters, self.prefix)
        return self._held[path]

    def __iter__(self) -> Iterable[str]:  # type: ignore[override]
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def apart(self, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters that changed -> the tensors on disk that do."""
        self._held.update(changed)
        names = dict.fromkeys(name for path in changed for name in self.names[path])
        return {name: self._piece(name) for name in names}

    def _piece(self, name: str) -> Tensor:
        place = self.places[name]
        values = [self[target.removeprefix(self.prefix)] for target in place.targets]
        if len(values) > 1:
            value = torch.cat(values, place.axis)
        else:
            value = values[0] if place.expert is None else values[0][place.expert]
            if place.parts > 1:
                path = place.target.removeprefix(self.prefix)
                mates = {self.places[n].part: n for n in self.names[path] if self.places[n].expert == place.expert}
                sizes = [self.read(mates[p]).shape[place.axis] for p in sorted(mates)]
                value = value.split(sizes, place.axis)[sorted(mates).index(place.part)]
        return value.transpose(*place.swap) if place.swap else value


def joined(
    tensors: Mapping[str, Tensor],
    places: Mapping[str, Placement],
    parameters: Mapping[str, object],
    prefix: str,
) -> dict[str, Tensor]:
    """Tensors by disk name -> parameters, below `prefix`."""
    out: dict[str, Tensor] = {}
    parts: dict[str, dict[int | None, dict[int, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    axes: dict[str, int] = {}
    for name, value in tensors.items():
        place = places[name]
        value = value.transpose(*place.swap) if place.swap else value
        if len(place.targets) > 1:
            sizes = [parameters[t][place.axis] for t in place.targets]  # type: ignore[index]
            pieces = value.split(sizes, place.axis)
            out |= {t.removeprefix(prefix): p for t, p in zip(place.targets, pieces, strict=True)}
        else:
            path = place.target.removeprefix(prefix)
            parts[path][place.expert][place.part] = value
            axes[path] = place.axis
    for path, experts in parts.items():
        made = {e: _cat([held[p] for p in sorted(held)], axes[path]) for e, held in experts.items()}
        out[path] = made[None] if None in made else torch.stack([made[e] for e in sorted(made, key=int)])  # type: ignore[arg-type]
    return out


def _cat(pieces: list[Tensor], axis: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)
