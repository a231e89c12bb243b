"""The side file of measured KV scales: safetensors, usable with every checkpoint of the model they were measured on.

One float32 tensor for keys and one for values of each attention module, MODULE.k_scale and MODULE.v_scale by the name
on disk, [1] or [heads]. The metadata says what they are: the format, the shapes of the model, how they were measured.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fewbit.errors import CheckpointError
from fewbit.files.safetensors import SafetensorsFile, open_safetensors
from fewbit.files.shard import Part, write_shard
from fewbit.files.text import load_json
from fewbit.quant.kv import HEAD, KV_FORMATS, MEASURED

KIND = "fewbit kv scales 1"
ENDINGS = {"k": ".k_scale", "v": ".v_scale"}
SHAPES = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")


@dataclass(frozen=True, slots=True)
class KvScales:
    """scales: attention module -> {"k", "v"} -> float32 [1] or [heads]. format: a name of quant.kv.MEASURED."""

    format: str
    per_head: bool
    shapes: Mapping[str, Any]
    scales: Mapping[str, Mapping[str, Tensor]]
    measured: Mapping[str, Any] = field(default_factory=dict)  # text, samples, tokens ...


def shapes_of(config: Any) -> dict[str, Any]:
    """What checkpoints of one model have in common."""
    text = config.get_text_config()
    found = {name: getattr(text, name, None) for name in SHAPES}
    found["num_key_value_heads"] = found["num_key_value_heads"] or found["num_attention_heads"]
    if not found["head_dim"] and found["num_attention_heads"]:
        found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    return found


def write(path: Path, found: KvScales) -> None:
    """On disk for good, or not there, when it returns."""
    parts = {name + ENDINGS[of]: _part(t) for name, held in found.scales.items() for of, t in held.items()}
    metadata = {"kind": KIND, "format": found.format + (HEAD if found.per_head else ""),
                "shapes": json.dumps(found.shapes), "measured": json.dumps(found.measured)}  # fmt: skip
    write_shard(path, parts, metadata)


def _part(scale: Tensor) -> Part:
    return Part("F32", tuple(scale.shape), lambda: scale.cpu())


def read(path: str | Path, config: Any) -> KvScales:
    """The scales, checked against the model's shapes: whole, finite, above 0. All that is wrong is said at once."""
    with open_safetensors(Path(path)) as file:
        name, shapes, measured = _header(file)
        here = shapes_of(config)
        wrong = [f"{key}: measured on {shapes.get(key)}, here {here[key]}" for key in SHAPES
                 if shapes.get(key) != here[key]]  # fmt: skip
        if wrong:
            raise CheckpointError(f"{path}: these scales are of another model: {'; '.join(wrong)}")
        scales: dict[str, dict[str, Tensor]] = {}
        problems: list[str] = []
        heads = {here["num_key_value_heads"], here["num_attention_heads"]} if name.endswith(HEAD) else {1}
        for tensor, info in file.tensors.items():
            of = next((of for of, ending in ENDINGS.items() if tensor.endswith(ending)), None)
            if of is None:
                problems.append(f"{tensor}: names end in {' or '.join(ENDINGS.values())}")
            elif info.dtype != "F32" or len(info.shape) != 1 or info.shape[0] not in heads:
                want = " or ".join(f"[{n}]" for n in sorted(heads))
                problems.append(f"{tensor}: want F32 {want}, found {info.dtype} {list(info.shape)}")
            else:
                scale = file.read(tensor)
                if not sound(scale):
                    problems.append(f"{tensor}: must be finite and above 0, found {scale[:4].tolist()}")
                scales.setdefault(tensor.removesuffix(ENDINGS[of]), {})[of] = scale
    problems += [f"{module}: no {ENDINGS[of]}" for module, held in scales.items() for of in ENDINGS if of not in held]
    if problems or not scales:
        raise CheckpointError(f"{path}: {'; '.join(problems) or 'holds no scales'}")
    return KvScales(name.removesuffix(HEAD), name.endswith(HEAD), shapes, scales, measured)


def sound(scale: Tensor) -> bool:
    return bool((scale.isfinite() & (scale > 0)).all())


def _header(file: SafetensorsFile) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """-> format, shapes, how it was measured"""
    held = file.metadata
    if held.get("kind") != KIND:
        raise CheckpointError(
            f"{file.path}: is no file of KV scales (fewbit calibrate MODEL --kv fp8 -o FILE makes one)"
        )
    name = held.get("format", "")
    if name.removesuffix(HEAD) not in MEASURED or name.removesuffix(HEAD) not in KV_FORMATS:
        raise CheckpointError(f"{file.path}: scales for {name!r}; known: {', '.join(MEASURED)}, each also with {HEAD}")
    shapes, measured = (
        load_json(held.get(key, "null").encode(), f"{file.path}: {key}") for key in ("shapes", "measured")
    )
    if not isinstance(shapes, dict) or not isinstance(measured, dict):
        raise CheckpointError(f"{file.path}: shapes and measured must be objects")
    return name, shapes, measured
