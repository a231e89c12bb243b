"""What lies beside the tensors of a checkpoint and goes with them: config, tokenizer, the model's own code."""

import json
from collections.abc import Mapping
from typing import Any

from fewbit.codecs.source import Source

COPIED = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "generation_config", "chat_template")
SMALL = (".json", ".jinja", ".model", ".txt")


def small_files(
    source: Source, extra: Mapping[str, dict[str, Any]], more: dict[str, Any] | None = None
) -> dict[str, bytes]:
    """All of them. extra: other configs, by file; more: of config.json."""
    config = {k: v for k, v in source.config.items() if k not in ("quantization_config", "compression_config")}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {k: v for k, v in config["text_config"].items() if k != "quantization_config"}
    if "torch_dtype" in config and more:
        config.pop("torch_dtype")
    config |= more or {}
    files = carried(source)
    for name, value in extra.items():
        if name == "quantization_config":
            config[name] = value
        else:
            files[name] = json.dumps(value, indent=2).encode()
    return {"config.json": json.dumps(config, indent=2).encode(), **files}


def carried(source: Source) -> dict[str, bytes]:
    """What is taken as it is."""
    return tokenizer_files(source) | code_of(source)


def tokenizer_files(source: Source) -> dict[str, bytes]:
    """Tokenizer and generation files, carried over or rebuilt from GGUF metadata."""
    if source.tokenizer is not None:
        return dict(source.tokenizer)
    if not source.path.is_dir():
        return {}
    names = (p for p in sorted(source.path.iterdir()) if p.is_file() and p.name.startswith(COPIED))
    return {p.name: p.read_bytes() for p in names if p.stat().st_size < 1 << 28 and p.suffix in SMALL}


def code_of(source: Source) -> dict[str, bytes]:
    """The code that the folder has of its own, where it is trusted: without it the copy could not be loaded."""
    if not source.trusted or not source.path.is_dir():
        return {}
    return {p.name: p.read_bytes() for p in sorted(source.path.glob("*.py")) if p.is_file()}
