"""export: a model in memory, part of it quantized, as a checkpoint of some dialect; all of it appears, or nothing."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.codecs.codec import Codec, Tensors
from fewbit.errors import RequestError, UnsupportedError
from fewbit.files.writer import SafetensorsWriter, check_free
from fewbit.quant.qtensor import Quantized
from fewbit.quant.spec import Format, QuantSpec
from fewbit.workflows.convert import ON_DISK


@dataclass(slots=True)
class Held:
    """What goes into the files, by names on disk. ignored: linears that stay dense; kv: attention -> scales of k, v."""

    codec: Codec
    dense: dict[str, Tensor]
    tensors: Tensors = field(default_factory=dict)
    formats: dict[str, Format] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    kv: dict[str, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)
    kv_spec: QuantSpec | None = None

    def add(self, module: str, q: Quantized, form: Format) -> None:
        """form: what the config names it; q.format may say more, such as an input scale that nobody calibrated."""
        assert self.codec.write is not None
        self.formats[module] = form
        self.tensors |= {module + ending: tensor for ending, tensor in self.codec.write(q).items()}


def export(
    model: Any,
    out: str | Path,
    held: Held,
    *,
    dtype: torch.dtype | None = None,
    beside: Mapping[str, bytes] | None = None,
    max_shard: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Write tensors, config.json, generation_config.json, the dialect's own files and those of `beside`."""
    check_free(Path(out), overwrite)
    if not held.formats and held.kv_spec is None:
        raise RequestError("nothing of the model is quantized; save_pretrained writes it as it is")
    assert held.codec.config is not None
    more = held.codec.config(held.formats, held.ignored, held.kv_spec)
    tensors = {name: plain(t, dtype) for name, t in held.dense.items()} | held.tensors | kv_tensors(held)
    layout = {name: (ON_DISK[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    with SafetensorsWriter(out, layout, max_shard=max_shard, overwrite=overwrite) as writer:
        for name, data in (small_files(model, more, dtype) | dict(beside or {})).items():
            writer.add_file(name, data)
        for name, tensor in tensors.items():
            writer.put(name, tensor.detach().cpu().contiguous())


def plain(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def kv_tensors(held: Held) -> Tensors:
    """Scales of keys and values under the dialect's names; a cache scaled at each call has none."""
    out = {}
    for module, pair in held.kv.items():
        for of, scale in zip("kv", pair, strict=True):
            ending = (held.codec.kv_endings or {}).get(of)
            if ending is None:
                raise UnsupportedError(f"{held.codec.name} has no name for the {of} scale of {module}")
            if scale is not None:
                out[module + ending] = scale.float().reshape(held.codec.kv_shape).cpu()
    return out


def small_files(model: Any, more: dict[str, dict[str, Any]], dtype: torch.dtype | None) -> dict[str, bytes]:
    """config.json with the dialect's part in it, the generation config, and the dialect's other files."""
    config = json.loads(model.config.to_json_string())
    config["architectures"] = [type(model).__name__]
    kept = dtype or next(t.dtype for t in model.parameters() if t.is_floating_point())
    config["dtype"] = str(kept).removeprefix("torch.")
    files = {}
    for name, value in more.items():
        if name == "quantization_config":
            config[name] = value
        else:
            files[name] = encoded(value)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        files["generation_config.json"] = encoded(json.loads(generation.to_json_string()))
    return {"config.json": encoded(config), **files}


def encoded(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
