"""Rotary embeddings: what GGUF says in keys and small tensors, as the parameters of a config.json."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from fewbit.codecs.gguf_keys import Metadata, floats
from fewbit.errors import CheckpointError

Config = dict[str, Any]


def rope_scaling(config: Config, meta: Metadata) -> Config:
    kind = meta.file.kv.get(meta.key("rope.scaling.type"), "none")
    factors = floats(meta, "rope_freqs.weight")
    if factors is not None and any(f != 1.0 for f in factors):
        return {"rope_scaling": llama3_scaling(factors, float(config.get("rope_theta", 10000.0)), meta)}
    if kind == "linear" or "rope.scale_linear" in meta:
        factor = meta.get("rope.scaling.factor", meta.get("rope.scale_linear"))
        return {"rope_scaling": {"rope_type": "linear", "factor": float(factor)}} if factor not in (None, 0, 1) else {}
    if kind == "yarn":
        original = meta.get("rope.scaling.original_context_length", config["max_position_embeddings"])
        yarn = {"rope_type": "yarn", "factor": float(meta.number("rope.scaling.factor"))}
        return {"rope_scaling": {**yarn, "original_max_position_embeddings": int(original)}}
    if kind not in ("none", "longrope"):
        raise meta.refuse("rope.scaling.type", f"{kind!r} is not known; known: none, linear, yarn, longrope")
    return {}


def llama3_factors(count: int, theta: float, scaling: Mapping[str, Any]) -> torch.Tensor:
    """What Llama 3 divides each rotary frequency by: 1 for short waves, `factor` for long ones, smooth between."""
    frequency = torch.exp(torch.arange(count, dtype=torch.float64) * (-math.log(theta) / count))
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high, factor = (float(scaling[k]) for k in ("low_freq_factor", "high_freq_factor", "factor"))
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return torch.reciprocal((1 - smooth) / factor + smooth)


def llama3_scaling(factors: list[float], theta: float, meta: Metadata) -> Config:
    """The scaling parameters behind a table of factors. Only ratios to the original context can be told."""
    table = torch.tensor(factors, dtype=torch.float64)
    for original in (8192, 4096, 2048, 16384, 32768, 131072):
        scaling = {"rope_type": "llama3", "factor": float(round(table.max().item(), 4)), "low_freq_factor": 1.0}
        scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": original}
        if torch.allclose(llama3_factors(len(factors), theta, scaling), table, rtol=1e-4):
            return scaling
    why = f"{table.tolist()[:4]} ... are no factors that Llama 3's rule makes"
    raise CheckpointError(f"{meta.file.path}: tensor 'rope_freqs.weight': {why}")
