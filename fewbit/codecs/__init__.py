"""Checkpoint dialects: one file each. `open` finds the one that claims a checkpoint; nothing guesses."""

import json
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fewbit.codecs.codec import Codec, Located, quantization_config
from fewbit.codecs.source import Entry, Source, group
from fewbit.codecs.source import plan_of as source_plan
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.files.checkpoint import Checkpoint, open_checkpoint
from fewbit.quant.plan import READERS, Plan

NAMES = (
    "dense", "gptq", "awq", "auto_round", "fp8", "compressed_tensors", "modelopt", "mxfp4", "bitsandbytes", "quanto",
    "torchao", "foreign",
)  # fmt: skip

CODECS: dict[str, Codec] = {}


def _register() -> None:
    for name in NAMES:
        for codec in import_module(f"fewbit.codecs.{name}").CODECS:
            CODECS[codec.name] = codec
    for entry in entry_points(group="fewbit.codecs"):
        codec = entry.load()
        if codec.name in CODECS:
            raise CheckpointError(f"two codecs are called {codec.name!r}: ours and {entry.value}")
        CODECS[codec.name] = codec


def plan_of(config: dict[str, Any]) -> Plan:
    """The plan of a quantization_config, whichever dialect it is."""
    located = Located(config, "quantization_config")
    codec, _ = claimant(located)
    return source_plan(codec, located)


_register()
READERS.append(plan_of)


def open(path: str | Path, trust_remote_code: bool = False) -> Source:
    """Open a folder or a file, find the one dialect that claims it, and sort its tensors.

    trust_remote_code: whoever builds the model of this source may import code of its folder.
    """
    checkpoint = open_checkpoint(path)
    try:
        source = _open(checkpoint)
    except BaseException:
        checkpoint.close()
        raise
    source.trusted = trust_remote_code
    return source


def _open(checkpoint: Checkpoint) -> Source:
    if checkpoint.gguf is not None:
        from fewbit.codecs.gguf import open_source

        return open_source(checkpoint)
    located = quantization_config(checkpoint) or Located({}, "config.json: no quantization_config")
    codec, evidence = claimant(located)
    source = group(checkpoint, codec, located)
    source.evidence = evidence
    return source


def claimant(located: Located) -> tuple[Codec, str]:
    """The one codec that claims a quantization config, and its evidence."""
    claims = {name: evidence for name, codec in CODECS.items() if (evidence := codec.claims(located))}
    if len(claims) == 1:
        name, evidence = claims.popitem()
        return CODECS[name], evidence
    if claims:
        seen = "; ".join(f"{name}: {evidence}" for name, evidence in claims.items())
        raise CheckpointError(f"{located.where}: {len(claims)} dialects claim this checkpoint: {seen}")
    keys = json.dumps(located.config, default=str)[:400]
    known = ", ".join(sorted(CODECS))
    raise UnsupportedError(f"{located.where}: no dialect claims this checkpoint", [f"seen: {keys}", f"known: {known}"])


__all__ = ["CODECS", "Codec", "Entry", "Plan", "Source", "claimant", "open"]
