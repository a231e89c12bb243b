"""Opens a checkpoint: a folder (config and safetensors shards, or GGUF), or one bare file of either kind.

Nothing outside the folder is followed, nothing is imported, and a pickle is never a fallback.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from fewbit.errors import CheckpointError
from fewbit.files.disk import reason, short, unknown_tensor
from fewbit.files.gguf import SPLIT_NAME, GGUFFile, open_gguf
from fewbit.files.safetensors import SafetensorsFile, TensorInfo, open_safetensors
from fewbit.files.text import load_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EXTRA = (
    "quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json", "quanto_qmap.json",
)  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_SHARD_NAME = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")


class Checkpoint:
    """An open checkpoint and the files it holds open; `tensors` lists every tensor of every shard.

    `index` is the weight map of a sharded folder, `unindexed` what its shards hold beside it, `remote_code`
    the classes an `auto_map` asks to import ("config.json: AutoModel = modeling_x.X").
    """

    def __init__(self, path: Path):
        self.path = path
        self.config: dict[str, Any] = {}
        self.extra: dict[str, dict[str, Any]] = {}
        self.remote_code: list[str] = []
        self.index: dict[str, str] | None = None
        self.gguf: GGUFFile | None = None
        self.files: list[Path] = []
        self.tensors: dict[str, TensorInfo] = {}
        self.unindexed: dict[str, TensorInfo] = {}
        self._shards: dict[Path, SafetensorsFile] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        if self.path.is_dir():
            self._open_folder(_names(self.path))
        elif self.path.suffix == ".gguf" and self.path.exists():
            self._open_gguf(self.path)
        elif self.path.suffix == ".safetensors" and self.path.exists():
            self._open_shards([self.path])
        else:
            raise _no_file(self.path)

    def _open_folder(self, names: list[str]) -> None:
        files = _weight_files(self.path, names)
        if files[0].endswith(".gguf"):
            self._open_gguf(_inside(self.path, files[0]))
            return
        self._read_configs(names)
        if files == [INDEX]:
            self.index = _read_index(self.path)
            files = sorted(set(self.index.values()))
        self._open_shards([_inside(self.path, name) for name in files])
        if self.index is not None:
            self._check_index(self.index)

    def _open_gguf(self, path: Path) -> None:
        self.gguf = open_gguf(path)
        self.files = self.gguf.files
        self.tensors = {
            name: TensorInfo(name, t.type_name, t.shape, t.file, t.start, t.nbytes)
            for name, t in self.gguf.tensors.items()
        }

    def _open_shards(self, paths: list[Path]) -> None:
        self.files = paths
        for path in paths:
            self._shards[path] = shard = open_safetensors(path)
            for name, info in shard.tensors.items():
                if name in self.tensors:
                    other = self.tensors[name].file.name
                    raise CheckpointError(f"{path}: tensor {short(name)} is also in {other}; a tensor has one place")
                self.tensors[name] = info

    def _check_index(self, index: dict[str, str]) -> None:
        for name, file in index.items():
            found = self.tensors.get(name)
            if found is None or found.file.name != file:
                where = f"it is in {found.file.name}" if found else "no shard has it"
                raise CheckpointError(f"{self.path / INDEX}: tensor {short(name)} is listed in {file}, and {where}")
        self.unindexed = {name: info for name, info in self.tensors.items() if name not in index}
        for name in self.unindexed:
            del self.tensors[name]

    def _read_configs(self, names: Iterable[str]) -> None:
        for name in sorted(n for n in names if n in EXTRA or (n.endswith(".json") and "config" in n)):
            value = _read_object(self.path, name)
            self.remote_code += _auto_map(name, value)
            if name == "config.json":
                self.config = value
            elif name in EXTRA:
                self.extra[name] = value

    def read(self, name: str) -> torch.Tensor:
        """The tensor in memory of its own; a GGUF tensor as its raw bytes, uint8 [*leading, row_bytes]."""
        source = self.gguf if self.gguf is not None else self._shard(name)
        return source.read(name)

    def read_into(self, name: str, out: torch.Tensor) -> None:
        source = self.gguf if self.gguf is not None else self._shard(name)
        source.read_into(name, out)

    def _shard(self, name: str) -> SafetensorsFile:
        info = self.tensors.get(name) or self.unindexed.get(name)
        if info is None:
            raise unknown_tensor(self.path, name, self.tensors)
        return self._shards[info.file]

    def close(self) -> None:
        if self.gguf is not None:
            self.gguf.close()
        for shard in self._shards.values():
            shard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_checkpoint(path: Path | str) -> Checkpoint:
    try:
        return Checkpoint(Path(path))
    except OSError as e:  # a path that cannot even be looked at: too long, or in a folder that may not be entered
        raise CheckpointError(f"{short(str(path))}: cannot open: {reason(e)}") from e


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as e:
        raise CheckpointError(f"{folder}: cannot list: {e.strerror}") from e


def _weight_files(folder: Path, names: list[str]) -> list[str]:
    """What to open: [the index], [one safetensors file], or [the first part of one GGUF set]."""
    if INDEX in names:
        if SINGLE in names and SINGLE not in _read_index(folder).values():
            raise CheckpointError(f"{folder}: holds two models, {INDEX} and {SINGLE}; remove one")
        return [INDEX]
    if SINGLE in names:
        return [SINGLE]
    shards = [name for name in names if _SHARD_NAME.fullmatch(name)]
    if shards:
        raise CheckpointError(
            f"{folder}: has shards ({shards[0]} ...) and no {INDEX}: an unfinished download or write; "
            "complete it and open it again"
        )
    ggufs = [name for name in names if name.endswith(".gguf") and not _later_part(name)]
    others = [name for name in names if name.endswith(".safetensors")]
    if ggufs and not (others and "config.json" in names):
        others = []
    if len(found := ggufs + others) == 1:
        return found
    raise _no_model(folder, names, found)


def _later_part(name: str) -> bool:
    match = SPLIT_NAME.fullmatch(name)
    return match is not None and int(match[2]) != 1


def _no_model(folder: Path, names: list[str], weights: list[str]) -> CheckpointError:
    if weights:
        return CheckpointError(f"{folder}: holds several models: {', '.join(weights)}; give the path of one file")
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return _only_pickles(folder, pickles)
    found = f"found {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return CheckpointError(
        f"{folder}: no checkpoint here: {found if names else 'the folder is empty'}; "
        f"a folder with config.json and {SINGLE} (or {INDEX} and its shards), or with one .gguf, would work"
    )


def _only_pickles(path: Path, pickles: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{path}: only pickles ({', '.join(pickles[:3])}), which can run code when they are loaded, so they are not; "
        "ask the owner for safetensors, or convert once: tensors = torch.load(file, weights_only=True), "
        f"then safetensors.torch.save_file(tensors, {SINGLE!r})"
    )


def _no_file(path: Path) -> CheckpointError:
    if path.suffix in PICKLES and path.exists():
        return _only_pickles(path, [path.name])
    if path.exists():
        return CheckpointError(f"{path}: is no folder, .safetensors or .gguf file, and nothing else is read")
    parent = next(p for p in [*path.parents, Path("/")] if p.exists())
    return CheckpointError(
        f"{path}: no such file or folder ({parent.absolute()} exists); give the path of a local folder, "
        ".safetensors or .gguf file; a hub id must be downloaded first"
    )


def _inside(folder: Path, name: str) -> Path:
    """Path of a file directly in the folder, which must not lead out of it through a link."""
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder}: {short(name)} is not the plain name of a file in this folder")
    path = folder / name
    try:
        real = path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as e:  # RuntimeError: links in a circle
        raise CheckpointError(f"{folder}: {short(name)} is missing") from e
    if not real.is_relative_to(_root(folder)):
        raise CheckpointError(f"{path}: is a symlink that leaves the folder (to {real})")
    return path


def _root(folder: Path) -> Path:
    real = folder.resolve()
    # a hub cache links models--*/snapshots/REVISION/FILE to models--*/blobs/DIGEST
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        return real.parent.parent
    return real


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    value = load_json(_inside(folder, name), str(folder / name), infinite=True)  # configs of state space models hold it
    if not isinstance(value, dict):
        raise CheckpointError(f"{folder / name}: is a JSON {type(value).__name__}, an object is expected")
    return value


def _read_index(folder: Path) -> dict[str, str]:
    weight_map = _read_object(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX}: weight_map is missing, empty or not an object")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX}: tensor {short(name)}: {short(file)} is not the name of a safetensors file"
            )
    return weight_map


def _auto_map(file: str, config: dict[str, Any]) -> list[str]:
    found = config.get("auto_map")
    if not found:
        return []
    return (
        [f"{file}: {key} = {value}" for key, value in found.items()]
        if isinstance(found, dict)
        else [f"{file}: {found}"]
    )
