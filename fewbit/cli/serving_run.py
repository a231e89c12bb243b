"""What serve does with its flags: the engine's, the server's, the facts of the checkpoint, and a line when it is up."""

import asyncio
import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from fewbit.cli.quantizing import nbytes
from fewbit.cli.serving import text_of
from fewbit.errors import FewbitError, RequestError

ENGINE = (  # flags that EngineConfig takes under the same name; unset ones are left to it
    "model", "tokenizer", "served_model_name", "quantization", "quant_config", "weights_load_device", "dtype", "device",
    "kv_cache_dtype", "kv_scales", "kv_scale", "kv_rotate", "kv_attn_math", "max_model_len", "gpu_memory_utilization",
    "kv_cache_memory_bytes", "tensor_parallel_size", "max_num_seqs", "max_num_batched_tokens", "max_queue",
    "block_size", "enable_prefix_caching", "enforce_eager", "trust_remote_code", "seed", "kernels", "activations",
    "strict_activations", "emulate_activations", "fusion", "enable_lora",
)  # fmt: skip
EMULATED = ("fakequant", "kv_fakequant", "amax_file", "calib_dataset", "calib_size", "calib_batch_size")
SAMPLING = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float}
TIMES = {"k": 1000, "K": 1024, "m": 10**6, "M": 2**20}


def run(given: dict[str, Any], up: Callable[[str], None] = lambda url: None) -> int:
    """given: the flags by name. up: told the URL. -> the exit status."""
    from fewbit.engine.config import EngineConfig
    from fewbit.server.config import ServerConfig
    from fewbit.server.run import free

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("fewbit").setLevel(logging.INFO)
    asked = {name: value for name in ENGINE if (value := converted(name, given[name])) is not None}
    options = served(asked, EngineConfig)
    config = EngineConfig.of(**options)
    server = ServerConfig(**server_of(given, config))
    free(server.host, server.port)
    known = facts(config)
    start = time.monotonic()
    print(f"fewbit: loading {config.model}", file=sys.stderr, flush=True)
    emulated = {name: given[name] for name in EMULATED if given.get(name) is not None}

    def make() -> Any:
        from fewbit.engine.engine import Engine

        return Engine(config)

    def ready(url: str) -> None:
        print(f"fewbit: {', '.join(config.served_names)} at {url} after {time.monotonic() - start:.1f} s",
              file=sys.stderr, flush=True)  # fmt: skip
        up(url)

    from fewbit.server.run import serve

    with contextlib.ExitStack() as stack:
        if emulated:
            from fewbit.compat.fakequant import prepared

            # here and not in the engine's thread: an interrupt ends it between two layers, or two sums
            config = stack.enter_context(prepared({**options, **emulated}))
        return serve(make, server, known, ready)


def converted(name: str, value: Any) -> Any:
    if value is None or value == []:
        return None
    if name == "max_model_len":
        return tokens_of(str(value))
    if name == "kv_cache_memory_bytes":
        return nbytes(str(value))
    if name == "served_model_name":
        return listed(value)
    return value


def served(asked: dict[str, Any], kind: type) -> dict[str, Any]:
    """The engine's options; those that no engine of this version has are refused, and a device that is not here."""
    known = {field.name for field in fields(kind)}
    for name, value in asked.items():
        if name not in known and value is not False:
            raise RequestError(f"--{name.replace('_', '-')}: this version cannot do that yet; leave it out")
    from fewbit.models.device import present

    present(str(asked.get("device", "auto")))  # nothing is started on it here: ranks may be processes of their own
    return {name: value for name, value in asked.items() if name in known}


def tokens_of(text: str) -> int | None:
    """`8192`, `8k` (8000), `8K` (8192); auto or -1: whatever fits."""
    if text in ("auto", "-1"):
        return None
    digits, unit = (text[:-1], text[-1]) if text[-1:] in TIMES else (text, "")
    try:
        return int(float(digits) * TIMES.get(unit, 1))
    except (ValueError, OverflowError):
        raise RequestError(f"max_model_len={text!r}: 8192, 8k and 8K are lengths") from None


def listed(values: list[str] | str | None) -> tuple[str, ...]:
    """Of repeated flags, of words with commas, of one JSON list."""
    found: list[str] = []
    for value in [values] if isinstance(values, str) else values or []:
        if value.startswith("["):
            try:
                found += [str(one) for one in json.loads(value)]
            except ValueError:
                raise RequestError(f"{value!r}: not a JSON list") from None
        else:
            found += [part for part in value.split(",") if part]
    return tuple(found)


def server_of(given: dict[str, Any], config: Any) -> dict[str, Any]:
    same = ("host", "port", "root_path", "ssl_keyfile", "ssl_certfile", "tool_call_parser", "response_role",
            "allow_credentials")  # fmt: skip
    return {name: given[name] for name in same} | {
        "api_key": tuple(given["api_key"] or ()),
        "allowed_origins": listed(given["allowed_origins"]),
        "chat_template": compiled(template(given["chat_template"])),
        "sampling_defaults": defaults(config.model, given["generation_config"], given["override_generation_config"]),
        "access_log": not given["disable_access_log"],
        "max_body": nbytes(given["max_body_size"]),
        "drain_seconds": given["shutdown_timeout"],
    }


def template(given: str | None) -> str | None:
    """A file where there is one of that name, else the template itself."""
    if given is None or "{" in given:
        return given
    path = Path(given)
    if not path.is_file():
        raise RequestError(f"--chat-template {given!r}: there is no such file, and it is not a template either")
    return text_of(path)


def compiled(text: str | None) -> str | None:
    """A template of the user's, known to be one before a model is loaded for it."""
    from fewbit.server.text import Text

    if text is not None:
        rendering = Text(None, text, 1)
        try:
            asyncio.run(rendering.warm())
        except RequestError as error:
            raise RequestError(f"--chat-template: {error}") from error
        finally:
            rendering.close()
    return text


def defaults(model: str, where: str, over: str | None) -> dict[str, Any]:
    """Sampling defaults: of generation_config.json, as vLLM takes them, and what the user puts over them."""
    found: dict[str, Any] = {}
    file = Path(model if where == "auto" else where) / "generation_config.json"
    if where not in ("auto", "vllm") and not file.is_file():
        raise RequestError(f"--generation-config {where!r}: want auto, vllm, or a folder with generation_config.json")
    if where != "vllm" and file.is_file():
        found = _object(text_of(file), str(file))
    if over:
        found |= _object(over, "--override-generation-config")
    kept = {name: kind(found[name]) for name, kind in SAMPLING.items() if found.get(name) is not None}
    if (most := found.get("max_new_tokens")) is not None:
        kept["max_tokens"] = most
    _checked(kept)
    return kept


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RequestError(f"{where}: not a JSON object")
    return found


def _checked(kept: dict[str, Any]) -> None:
    from fewbit.engine.params import SamplingParams

    SamplingParams(**kept)


def facts(config: Any) -> dict[str, Any]:
    """What inspect says of the checkpoint, in short. It reads headers alone."""
    from fewbit.workflows.inspect import inspect, summary

    device = "cuda" if config.device.startswith("cuda") else "cpu"
    with contextlib.suppress(FewbitError):  # loading says what is wrong with it, in full
        info = inspect(config.model, device)
        rows = [dict(zip(("format", "activations", "modules", "bytes"), row, strict=False)) for row in summary(info)]
        counts: dict[tuple[str, str], int] = {}
        for module in info.modules:
            counts[module.kernel, module.format] = counts.get((module.kernel, module.format), 0) + 1
        return {
            "name": Path(info.path).name, "dialect": info.dialect, "architecture": info.architecture,
            "model_type": info.model_type, "parameters": info.parameters, "bytes": info.bytes,
            "bits_per_weight": info.bits_per_weight, "formats": rows, "kv": info.kv,
            "kv_scales": info.kv_scales,
            "kernels": [{"kernel": k, "format": f, "modules": n} for (k, f), n in counts.items()],
        }  # fmt: skip
    return {}
