"""Writer of a checkpoint folder: safetensors shards, their index, other files and a digest manifest.

The layout is planned from the declared names first, so tensors may be put in any order and the bytes come
out the same. Nothing has its final name before `close`, which names the file that makes the rest
loadable (the index, or the only shard) last. Digests are read back as each file is complete.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fewbit.errors import CheckpointError
from fewbit.files.checkpoint import INDEX, SINGLE
from fewbit.files.disk import bytes_of
from fewbit.files.gguf_writer import GGUFWriter
from fewbit.files.manifest import MANIFEST, Entry, manifest_bytes, read_manifest, verify_manifest
from fewbit.files.safetensors import open_safetensors, storage
from fewbit.files.shard import declared_bytes, filled, lay_out
from fewbit.files.staging import ASK, Place, Staging, Writer, expect, raise_write_error

__all__ = ["GGUFWriter", "SafetensorsWriter", "read_manifest", "verify_manifest"]

_MODEL_FILE = re.compile(r".*\.(safetensors|gguf)|.*\.safetensors\.index\.json|pytorch_model.*\.bin")
_OWN_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


class SafetensorsWriter(Writer):
    """Writes a folder: shards, index, other files and their manifest.

    `tensors`: name -> (dtype on disk, shape in elements). A name may be `put` once, from any order.
    `shards`: finished files that become the shards as they are, in this order, in place of tensors.
    """

    def __init__(
        self,
        out: Path | str,
        tensors: Mapping[str, tuple[str, Sequence[int]]],
        max_shard: int = 5_000_000_000,
        metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
        shards: Mapping[Path, Entry] | None = None,
    ):
        self.out = Path(out)
        self._overwrite = overwrite
        sizes = {name: declared_bytes(name, dtype, shape) for name, (dtype, shape) in tensors.items()}
        self._shards = {} if shards else _plan_shards(sizes, max_shard)
        self._places: dict[str, Place] = {}
        headers = {}
        for file, names in self._shards.items():
            headers[file], places = lay_out(self.out / file, {name: tensors[name] for name in names}, metadata)
            for name, (start, size) in places.items():
                dtype, shape = tensors[name]
                self._places[name] = Place(file, start, size, *storage(dtype, tuple(shape), name))
        self._old = _old_model(self.out, overwrite)
        self._done: set[str] = set()
        self._manifest: dict[str, Entry] = {}
        self._staging = Staging(self.out)
        for file, header in headers.items():
            self._staging.put(file, header)
            self._seal_if_full(file)
        for i, (path, entry) in enumerate((shards or {}).items(), 1):
            self._adopt(_shard(i, len(shards or {})), path, entry)

    def _adopt(self, name: str, path: Path, entry: Entry) -> None:
        self._staging.adopt(name, path)
        self._shards[name] = []
        self._manifest[name] = entry
        with open_safetensors(path) as file:
            for key, info in file.tensors.items():
                self._places[key] = Place(name, info.start, info.nbytes, *storage(info.dtype, info.shape, key))
                self._done.add(key)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor: the declared dtype and shape, packed uint8 for elements under a byte."""
        place = expect(self.out, name, self._places, self._done)
        if tensor.dtype is not place.dtype or tuple(tensor.shape) != place.shape:
            raise CheckpointError(
                f"{self.out}: tensor {name!r} was declared as {place.dtype} {list(place.shape)}, "
                f"put is {tensor.dtype} {list(tensor.shape)}"
            )
        self._staging.write(place.file, place.start, bytes_of(tensor))
        self._done.add(name)
        self._seal_if_full(place.file)

    def _seal_if_full(self, file: str) -> None:
        if self._done.issuperset(self._shards[file]):
            self._manifest[file] = self._staging.seal(file)
            open_safetensors(self._staging.partial(file)).close()

    def add_file(self, name: str, data: bytes) -> None:
        """Add a config or tokenizer file beside the shards."""
        taken = name in self._manifest or name in self._shards or name in (INDEX, MANIFEST)
        if taken or _MODEL_FILE.fullmatch(name) or not name or "/" in name or name.startswith("."):
            raise CheckpointError(f"{self.out}: {name!r} is not a free plain name for a file beside the model")
        if not self._overwrite and (self.out / name).exists():
            raise CheckpointError(f"{self.out}: {name!r} exists already; choose another folder or {ASK}")
        self._staging.put(name, data)
        self._manifest[name] = self._staging.seal(name)

    def _publish(self) -> None:
        self._staging.check_complete(self._places, self._done)
        others = [name for name in self._manifest if name not in self._shards]
        last = list(self._shards)
        if last != [SINGLE]:
            self._staging.put(INDEX, self._index())
            self._manifest[INDEX] = self._staging.seal(INDEX)
            last.append(INDEX)
        self._staging.put(MANIFEST, manifest_bytes(self._manifest))
        self._staging.seal(MANIFEST)
        self._staging.remove(self._old)
        self._staging.publish([*others, MANIFEST, *last])

    def _index(self) -> bytes:
        weight_map = {name: place.file for name, place in sorted(self._places.items())}
        total = sum(place.nbytes for place in self._places.values())
        return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()


def _plan_shards(sizes: Mapping[str, int], max_shard: int) -> dict[str, list[str]]:
    """Fill shards in the declared order; a tensor over `max_shard` has one of its own."""
    groups = filled(sizes, max_shard)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {_shard(i, len(groups)): group for i, group in enumerate(groups, 1)}


def _shard(i: int, count: int) -> str:
    return f"model-{i:05d}-of-{count:05d}.safetensors"


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse what a writer would refuse in the end, before the work that leads to it; a folder, or one .gguf file."""
    try:
        if out.suffix != ".gguf":
            _old_model(out, overwrite)
        elif out.exists() and not overwrite:
            raise CheckpointError(f"{out}: exists already; choose another name or {ASK}")
    except OSError as e:
        raise_write_error(out, e)


def _old_model(out: Path, overwrite: bool) -> list[str]:
    """Files of an earlier model to remove, what makes it loadable first."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: is not a folder; a model is written into one")
    names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    model = [name for name in names if _MODEL_FILE.fullmatch(name)]
    if model and not overwrite:
        raise CheckpointError(f"{out}: already holds a model ({model[0]}); choose another folder or {ASK}")
    listed = set(read_manifest(out)) if MANIFEST in names else set()
    ours = [name for name in names if name in listed or _OWN_SHARD.fullmatch(name) or name == MANIFEST]
    return [name for name in (INDEX, SINGLE) if name in names] + [name for name in ours if name not in (INDEX, SINGLE)]
