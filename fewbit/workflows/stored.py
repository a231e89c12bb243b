"""Stored: Quantized values and dense tensors as the flat names of one safetensors file, and back."""

from typing import Any

import torch
from torch import Tensor

from fewbit.files.safetensors import storage
from fewbit.quant.qtensor import Planes, QTensor, Quantized, Transform
from fewbit.quant.spec import Format

SEPARATOR = "|"  # no tensor name of a checkpoint has one
KV = "kv"


def flat(name: str, value: Quantized | Tensor) -> dict[str, Tensor]:
    """`module|weight|codes`, `module|act|scale0`, `module|input_scale|scale`; a dense tensor keeps its name."""
    if isinstance(value, Tensor):
        return {name: value}
    out = {f"{name}|weight|{plane}": t for plane, t in value.weight.planes.items()}
    out |= {f"{name}|act|{plane}": t for plane, t in value.act.items()}
    for transform in value.transforms:
        out |= {f"{name}|{transform.kind}|{key}": t for key, t in transform.tensors.items()}
    return out | {f"{name}|shape": torch.tensor(value.weight.shape)}


class Stored:
    """One file of them. modules: names of Quantized; dense: names of tensors; kv: attention module -> {"k", "v"}."""

    def __init__(self, file: Any):
        self.file = file
        self.modules: dict[str, dict[str, dict[str, str]]] = {}
        self.dense: list[str] = []
        self.kv: dict[str, dict[str, str]] = {}
        for key in file.tensors:
            name, *rest = key.split(SEPARATOR)
            if not rest:
                self.dense.append(name)
            elif name == KV:
                self.kv.setdefault(rest[0], {})[rest[1]] = key
            elif len(rest) == 2:
                self.modules.setdefault(name, {}).setdefault(rest[0], {})[rest[1]] = key

    def read(self, name: str, form: Format, meta: bool = False) -> Quantized:
        """form: the module's format without transforms, whose kinds the names tell."""
        parts: dict[str, Planes] = {
            part: {plane: self._tensor(key, meta) for plane, key in keys.items()}
            for part, keys in self.modules[name].items()
        }
        shape = tuple(self.file.read(f"{name}|shape").tolist())
        transforms = tuple(Transform(kind, planes) for kind, planes in parts.items() if kind not in ("weight", "act"))
        form = Format(form.weight, form.act, tuple(t.kind for t in transforms))
        return Quantized(form, QTensor(form.weight, shape, parts["weight"]), parts.get("act", {}), transforms)

    def _tensor(self, key: str, meta: bool) -> Tensor:
        if not meta:
            return self.file.read(key)  # type: ignore[no-any-return]
        info = self.file.tensors[key]
        dtype, shape = storage(info.dtype, info.shape, info.name)
        return torch.empty(shape, dtype=dtype, device="meta")
