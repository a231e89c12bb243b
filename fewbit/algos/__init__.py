"""Algorithms: one file each, pure functions that choose codes. ALGOS holds them by name.

Other packages add theirs through the entry-point group `fewbit.algos`: each entry loads to an Algo.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fewbit.algos.algo import Algo
from fewbit.errors import SpecError

NAMES = ("rtn", "gptq", "awq", "smooth", "autoround", "hqq", "imatrix")


class Algos(Mapping[str, Algo]):
    """Ours and those of other packages, each imported when it is first asked for."""

    def __getitem__(self, name: str) -> Algo:
        if name in NAMES:
            algo: Algo = import_module(f"fewbit.algos.{name}").ALGO
            return algo
        return _load(_points()[name])

    def __iter__(self) -> Iterator[str]:
        return iter((*NAMES, *_points()))

    def __len__(self) -> int:
        return len(NAMES) + len(_points())

    def __contains__(self, name: Any) -> bool:
        return name in NAMES or name in _points()


ALGOS: Mapping[str, Algo] = Algos()


def get(name: str) -> Algo:
    """The algorithm called `name`, or an error with the nearest names."""
    if name in ALGOS:
        return ALGOS[name]
    from difflib import get_close_matches

    near = [known for known in ALGOS if known.startswith(name)] or get_close_matches(name, ALGOS, 3, 0.4)
    raise SpecError(f"algorithm {name!r} is not known; near: {', '.join(near) or 'none'}; all: {', '.join(ALGOS)}")


def origins() -> dict[str, str]:
    """Name -> the object that another package gives for it."""
    return {name: point.value for name, point in _points().items()}


@cache
def _points() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group="fewbit.algos"):
        first = "fewbit" if point.name in NAMES else found[point.name].value if point.name in found else None
        if first:
            raise SpecError(f"two algorithms are called {point.name!r}: of {first} and {point.value}")
        found[point.name] = point
    return found


def _load(point: EntryPoint) -> Algo:
    algo = point.load()
    if not isinstance(algo, Algo):
        raise SpecError(f"entry point {point.name!r} of fewbit.algos gives {type(algo).__name__}, not an Algo")
    return algo
