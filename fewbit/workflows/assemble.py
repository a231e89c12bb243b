"""assemble: the files of finished units -> a checkpoint in a dialect. Names are those on disk.

What fits in one file is written as one; of what does not, every unit's files become the shards as they are.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fewbit import codecs
from fewbit.codecs import gguf
from fewbit.errors import UnsupportedError
from fewbit.files.manifest import Entry
from fewbit.files.writer import SafetensorsWriter
from fewbit.quant.qtensor import Quantized
from fewbit.quant.spec import Format, QuantSpec
from fewbit.workflows.unit_file import Stored

GGUF = "gguf"


@dataclass(slots=True)
class Contents:
    """What a checkpoint says of itself, and how to read it before it is put together."""

    config: dict[str, Any]
    formats: Mapping[str, Format]  # module -> its format, with its transforms
    module: Callable[[str], Quantized]
    dense: Mapping[str, tuple[str, tuple[int, ...]]]  # tensor -> (dtype on disk, shape)
    tensor: Callable[[str], Tensor]
    files: Mapping[str, bytes] = field(default_factory=dict)  # tokenizer, generation config, model card
    ignored: list[str] = field(default_factory=list)  # linears that stay dense
    kv_spec: QuantSpec | None = None


def dialect(name: str) -> Any:
    """What can write a dialect: a codec, or the gguf module."""
    plain = name.replace("_", "-").lower()
    if plain == GGUF:
        return gguf
    codec = codecs.CODECS.get(plain)
    writers = sorted([n for n, c in codecs.CODECS.items() if c.write is not None and c.fit is not None] + [GGUF])
    if codec is None or codec.fit is None or codec.write is None or codec.config is None:
        raise UnsupportedError(f"dialect {name!r} cannot be written", [f"these can: {', '.join(writers)}"])
    return codec


def assemble(
    out: Path, codec: Any, has: Contents, stored: Stored, units: Mapping[Path, Entry], max_shard: int, overwrite: bool
) -> None:
    """units: the files that `stored` reads, in order, with their digests."""
    if codec is gguf:
        return _gguf(out, has, overwrite)
    layout = {name: file.tensors[name] for name, file in stored.of.items()}
    whole = sum(info.nbytes for info in layout.values()) <= max_shard
    tensors = {name: (info.dtype, info.shape) for name, info in layout.items()} if whole else {}
    with SafetensorsWriter(out, tensors, max_shard, overwrite=overwrite, shards=None if whole else units) as writer:
        for name, data in _small_files(codec, has).items():
            writer.add_file(name, data)
        for name in tensors:
            writer.put(name, stored.read(name))
    return None


def _small_files(codec: Any, has: Contents) -> dict[str, bytes]:
    found = dict(codec.config(dict(has.formats), has.ignored, has.kv_spec))
    config = has.config | {key: found.pop(key) for key in ["quantization_config"] if key in found}
    written = {name: json.dumps(value, indent=2).encode() for name, value in {**found, "config.json": config}.items()}
    return {**has.files, **written}


def _gguf(out: Path, has: Contents, overwrite: bool) -> None:
    modules: dict[str, Any] = {name: (form, has.module(name).weight.shape) for name, form in has.formats.items()}
    with gguf.create(out, has.config, modules | dict(has.dense), has.files, overwrite=overwrite) as sink:
        for name in modules:
            sink.put(name, has.module(name))
        for name in has.dense:
            sink.put(name, has.tensor(name))
