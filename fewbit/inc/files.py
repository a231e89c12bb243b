"""Measurement and scale files of INC: JSON for people, and .npz of the same, which INC itself reads.

A file holds nodes, each with the states of its inputs, outputs and parameters: of measurements [1, 1] or [channels, 1],
of scales a number or a list. Each rank has files of its own; a single rank's have no suffix.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fewbit.errors import CheckpointError, RequestError
from fewbit.files.npz import read_npz
from fewbit.files.staging import raise_write_error
from fewbit.files.text import load_json
from fewbit.inc.config import Config

Mode = Literal["DynamicRange", "Scale", "Shape"]
PARTS = ("inputs", "outputs", "params")
OLD = {"input": "inputs", "output": "outputs"}


@dataclass(frozen=True, slots=True)
class Node:
    """States of one node, float32. params: by name, of weights by channel two: "0" rows, "1" columns."""

    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)

    def weight(self) -> Tensor | None:
        """Its parameter called weight; of two states that of the rows."""
        held = self.params.get("weight")
        return held.get("0") if isinstance(held, dict) else held


@dataclass(frozen=True, slots=True)
class Stats:
    """One file. rank: None where it is of no rank. samples: how many texts it is of, where it says so."""

    nodes: Mapping[str, Node]
    mode: Mode = "DynamicRange"
    rank: int | None = None
    samples: int | None = None
    modules: tuple[str, ...] = ()  # the names that were watched, from the file beside it


def stem(config: Config, rank: int, size: int, method: str = "") -> Path:
    """The path of a rank's file, without its ending. method: of a file of scales."""
    worker = f"_{rank}_{size}" if size > 1 and config.flags["seperate_measure_files"] else ""
    middle = f"_{method}" if method else ""
    return Path(f"{config.stats}_hooks_{config.observer}{middle}{worker}")


def ending(path: Path, end: str) -> Path:
    """Names have dots of their own, so that with_suffix would cut them."""
    return path.with_name(path.name + end)


def there(path: Path) -> bool:
    return ending(path, ".json").is_file() or ending(path, ".npz").is_file()


def read(path: Path) -> Stats:
    """path: without its ending. Of two files both are read, and have to say the same."""
    readers: dict[str, Callable[[Path], Any]] = {".json": lambda file: load_json(file, str(file)), ".npz": read_npz}
    held = [of(reader(file), str(file)) for end, reader in readers.items() if (file := ending(path, end)).is_file()]
    if not held:
        raise RequestError(f"{path}: there are no measurements, .json or .npz; mode MEASURE makes them")
    if len(held) == 2 and not same(*held):
        raise CheckpointError(f"{path}: its .json and its .npz say different things; remove the one that is not meant")
    listed = ending(path, "_mod_list.json")
    names = load_json(listed, str(listed)) if listed.is_file() else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{listed}: want a list of names")
    first = held[0]
    return Stats(first.nodes, first.mode, first.rank, first.samples, tuple(names))


def of(value: Any, where: str) -> Stats:
    if not isinstance(value, dict) or not isinstance(value.get("Nodes"), dict):
        raise CheckpointError(f"{where}: want an object with Nodes, as INC writes it")
    mode = value.get("Mode", "DynamicRange")
    if mode not in ("DynamicRange", "Scale", "Shape"):
        raise CheckpointError(f"{where}: Mode is {mode!r}; known: DynamicRange, Scale, Shape")
    nodes = {str(name): node_of(node, f"{where}: {name}") for name, node in value["Nodes"].items()}
    numbers = [value.get(key) for key in ("LocalRank", "NumSamples")]
    rank, samples = (int(n) if isinstance(n, int | np.integer) and n >= 0 else None for n in numbers)
    return Stats(nodes, mode, rank, samples)


def node_of(value: Any, where: str) -> Node:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: want an object with {', '.join(PARTS)}")
    value = {OLD.get(key, key): held for key, held in value.items()}
    if unknown := sorted(map(str, value.keys() - set(PARTS))):
        raise CheckpointError(f"{where}: holds {', '.join(unknown)}; known: {', '.join(PARTS)}")
    params = value.get("params") or {}
    if not isinstance(params, dict):
        raise CheckpointError(f"{where}: params is no object")
    inputs, outputs = (tuple(state(x, f"{where}.{part}[{i}]") for i, x in enumerate(several(value.get(part), where)))
                       for part in ("inputs", "outputs"))  # fmt: skip
    held = {str(name): {str(k): state(v, f"{where}.{name}") for k, v in x.items()} if isinstance(x, dict)
            else state(x, f"{where}.{name}") for name, x in params.items()}  # fmt: skip
    return Node(inputs, outputs, held)


def several(value: Any, where: str) -> Any:
    """The states of inputs or outputs; older files hold the only output itself."""
    if value is None:
        return ()
    if isinstance(value, np.ndarray):
        return list(value) if value.ndim == 3 else [value]
    if not isinstance(value, list | tuple):
        raise CheckpointError(f"{where}: inputs and outputs are lists of states")
    return value


def state(value: Any, where: str) -> Tensor:
    try:
        with np.errstate(over="ignore"):
            found = torch.from_numpy(np.array(value, np.float32))
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{where}: want numbers, found {str(value)[:60]}") from error
    if not bool(found.isfinite().all()) or bool((found < 0).any()):
        raise CheckpointError(f"{where}: want finite numbers, none below 0; found {found.flatten()[:4].tolist()}")
    return found


def same(a: Stats, b: Stats) -> bool:
    return a.mode == b.mode and plain(a) == plain(b)


def plain(stats: Stats, arrays: bool = False) -> dict[str, Any]:
    """Nodes as INC writes them: lists, or arrays."""

    def one(x: Any) -> Any:
        if isinstance(x, dict):
            return {int(key) if key.isdigit() and arrays else key: one(held) for key, held in x.items()}
        return x.numpy() if arrays else x.tolist()

    nodes: dict[str, Any] = {}
    for name, node in stats.nodes.items():
        held: dict[str, Any] = {"inputs": [one(x) for x in node.inputs]}
        if node.outputs:
            held["outputs"] = [one(x) for x in node.outputs]
        if node.params or stats.mode == "Scale":
            held["params"] = {key: one(x) for key, x in node.params.items()}
        nodes[name] = held
    return nodes


def write(path: Path, stats: Stats) -> list[Path]:
    """Both files, and the list of names where there is one. -> what was written"""
    head: dict[str, Any] = {"GlobalRank": None, "LocalRank": stats.rank, "Mode": stats.mode}
    tail = {"NumSamples": stats.samples} if stats.samples is not None else {}
    written = [ending(path, ".json"), ending(path, ".npz")]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        put(written[0], (json.dumps(head | {"Nodes": plain(stats)} | tail, indent=4) + "\n").encode())
        part = ending(path, ".partial.npz")
        np.savez(part, head | {"Nodes": plain(stats, arrays=True)} | tail)  # type: ignore[arg-type]
        part.replace(written[1])
        if stats.modules:
            written.append(ending(path, "_mod_list.json"))
            put(written[2], (json.dumps(list(stats.modules), indent=4) + "\n").encode())
    except OSError as error:
        raise_write_error(path, error)
    return written


def put(path: Path, data: bytes) -> None:
    """Nothing has its name before it is whole."""
    part = ending(path, ".partial")
    part.write_bytes(data)
    part.replace(path)
