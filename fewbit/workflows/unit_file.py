"""A finished unit as files hold it: the tensors of its modules as the dialect writes them, and back.

In a dialect of safetensors they are the final bytes, so that a unit's file can be a shard of the checkpoint. A GGUF
file is put together by itself in the end; until then a module is its planes, `module|weight|codes` and so on.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.codecs import gguf
from fewbit.errors import UnsupportedError
from fewbit.files.safetensors import open_safetensors
from fewbit.files.shard import Part
from fewbit.quant.qtensor import Planes, QTensor, Quantized, Transform
from fewbit.quant.spec import Format
from fewbit.workflows.convert import ON_DISK

SEPARATOR = "|"  # no tensor name of a checkpoint has one


def part(tensor: Tensor) -> Part:
    """A tensor that is there already."""
    return Part(ON_DISK[tensor.dtype], tuple(tensor.shape), lambda: _host(tensor))


def _host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    # by way of pinned memory, which is kept and used again: several times as fast as into fresh pages
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def module_tensors(codec: Any, name: str, q: Quantized) -> dict[str, Tensor]:
    """By their names in the file."""
    if codec is not gguf:
        return {name + ending: tensor for ending, tensor in codec.write(q).items()}
    out = {f"{name}|weight|{plane}": t for plane, t in q.weight.planes.items()}
    out |= {f"{name}|act|{plane}": t for plane, t in q.act.items()}
    for transform in q.transforms:
        out |= {f"{name}|{transform.kind}|{key}": t for key, t in transform.tensors.items()}
    return out


def kv_tensors(codec: Any, kv: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """kv: attention module -> {"k", "v"} -> scale."""
    if kv and not getattr(codec, "kv_endings", None):
        raise UnsupportedError(f"{codec.name} has no place for KV scales", ["leave out --kv, or choose another --to"])
    return {
        module + codec.kv_endings[of]: (t.reshape(codec.kv_shape) if t.numel() == 1 else t).float()
        for module, scales in kv.items()
        for of, t in scales.items()
    }


class Stored:
    """The finished units of a run, read when asked for. A context."""

    def __init__(self, codec: Any, files: Iterable[Path]):
        self.codec = codec
        self.files = [open_safetensors(path) for path in files]
        self.of = {name: file for file in self.files for name in file.tensors}
        self._planes: dict[str, list[str]] = defaultdict(list)
        for key in self.of:
            self._planes[key.partition(SEPARATOR)[0]].append(key)

    def read(self, name: str) -> Tensor:
        return self.of[name].read(name)

    def module(self, name: str, form: Format, shape: tuple[int, ...]) -> Quantized:
        """form: the module's format, with the kinds of its transforms."""
        if self.codec is not gguf:
            held = {e: self.read(name + e) for e in self.codec.endings if name + e in self.of}
            found: Quantized = self.codec.read(form, held)
            return found
        parts: dict[str, Planes] = {"act": {}} | {kind: {} for kind in form.transforms}
        for key in self._planes[name]:
            _, kind, plane = key.split(SEPARATOR)
            parts.setdefault(kind, {})[plane] = self.read(key)
        transforms = tuple(Transform(kind, parts[kind]) for kind in form.transforms)
        return Quantized(form, QTensor(form.weight, shape, parts["weight"]), parts["act"], transforms)

    def __enter__(self) -> "Stored":
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self.files:
            file.close()
