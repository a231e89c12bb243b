"""assemble: quantized modules, dense tensors and small files -> a checkpoint in a dialect. Names are those on disk."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fewbit import codecs
from fewbit.codecs import gguf
from fewbit.errors import UnsupportedError
from fewbit.files.writer import SafetensorsWriter
from fewbit.quant.qtensor import Quantized
from fewbit.quant.spec import QuantSpec
from fewbit.workflows.convert import ON_DISK, Progress

GGUF = "gguf"


@dataclass(slots=True)
class Contents:
    """What a checkpoint is made of. `modules` and `dense` read when asked; meta=True gives shapes alone."""

    config: dict[str, Any]
    modules: list[str]
    module: Callable[[str, bool], Quantized]
    dense: Mapping[str, tuple[str, tuple[int, ...]]]  # tensor -> (dtype on disk, shape)
    tensor: Callable[[str], Tensor]
    files: Mapping[str, bytes] = field(default_factory=dict)  # tokenizer, generation config, model card
    ignored: list[str] = field(default_factory=list)  # linears that stay dense
    kv: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
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


def assemble(out: Path, codec: Any, has: Contents, max_shard: int, overwrite: bool, progress: Progress) -> None:
    """Plan the layout, then write module by module."""
    if codec is gguf:
        return _gguf(out, has, overwrite, progress)
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    formats = {}
    for name in has.modules:
        q = has.module(name, True)
        formats[name] = q.format
        for ending, tensor in codec.write(q).items():
            layout[name + ending] = ON_DISK[tensor.dtype], tuple(tensor.shape)
    kv = _kv(codec, has)
    layout |= dict(has.dense) | {name: (ON_DISK[t.dtype], tuple(t.shape)) for name, t in kv.items()}
    config = dict(has.config)
    files = dict(has.files)
    for name, value in codec.config(formats, has.ignored, has.kv_spec).items():
        if name == "quantization_config":
            config[name] = value
        else:
            files[name] = json.dumps(value, indent=2).encode()
    files["config.json"] = json.dumps(config, indent=2).encode()
    with SafetensorsWriter(out, layout, max_shard=max_shard, overwrite=overwrite) as writer:
        for name, data in files.items():
            writer.add_file(name, data)
        for name in progress(has.modules, "writing"):
            for ending, tensor in codec.write(has.module(name, False)).items():
                writer.put(name + ending, tensor)
        for name in has.dense:
            writer.put(name, has.tensor(name))
        for name, tensor in kv.items():
            writer.put(name, tensor)
    return None


def _kv(codec: Any, has: Contents) -> dict[str, Tensor]:
    if has.kv and not codec.kv_endings:
        raise UnsupportedError(f"{codec.name} has no place for KV scales", ["leave out --kv, or choose another --to"])
    out = {}
    for module, scales in has.kv.items():
        for of, tensor in scales.items():
            held = tensor.reshape(codec.kv_shape) if tensor.numel() == 1 else tensor
            out[module + codec.kv_endings[of]] = held.float()
    return out


def _gguf(out: Path, has: Contents, overwrite: bool, progress: Progress) -> None:
    if has.kv:
        raise UnsupportedError("a GGUF file has no place for KV scales", ["leave out --kv"])
    layout: dict[str, Any] = {}
    for name in has.modules:
        q = has.module(name, True)
        layout[name] = q.format, q.weight.shape
    layout |= has.dense
    with gguf.create(out, has.config, layout, has.files, overwrite=overwrite) as sink:
        for name in progress(has.modules, "writing"):
            sink.put(name, has.module(name, False))
        for name in has.dense:
            sink.put(name, has.tensor(name))
