"""The verb serve: a model behind the OpenAI API, with vLLM's flags. Flags win over the environment, that over --config.

Every flag has an environment variable, FEWBIT_ and its name. The file is YAML with the flags' names.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.cli.show import Model

BOOL = "tag:yaml.org,2002:bool"
LARGEST = 1 << 20  # bytes of a --config or --chat-template file


def flag(*names: str, help: str, **more: Any) -> Any:
    """An option with its environment variable."""
    long = next(name for name in names if name.startswith("--")).split("/")[0]
    return typer.Option(*names, help=help, envvar="FEWBIT_" + long[2:].replace("-", "_").upper(), **more)


def configured(context: typer.Context, path: Path | None) -> Path | None:
    """Reads --config as soon as it is seen, as what holds where nothing else is said."""
    if path is not None:
        params = {str(param.name): param for param in context.command.params if param.name != "config"}
        several = {name for name, param in params.items() if getattr(param, "multiple", False)}
        context.default_map = {**(context.default_map or {}), **settings_in(path, set(params), several)}
    return path


Words = list[str] | None
Name = str | None
Count = int | None
Config = Annotated[Path | None, typer.Option("--config", help="A YAML file of flags.", is_eager=True,
                                                callback=configured)]  # fmt: skip
Quantization = Annotated[Name, flag("--quantization", "-q", help=(
    "The dialect to insist on, a format to quantize a dense model to on arrival, or inc (QUANT_CONFIG)."))]  # fmt: skip
KvDtype = Annotated[Name, flag("--kv-cache-dtype", help=(
    "auto (as the checkpoint declares), bfloat16, fp8, fp8_e5m2, fp8_inc, int8, int4, nvfp4, mxfp4 ..."))]  # fmt: skip
KvScales = Annotated[Name, flag("--kv-scales", help="A file of scales from fewbit calibrate --kv.")]
KvScale = Annotated[float | None, flag("--kv-scale", help=(
    "One scale for every layer instead of measured ones: 1.0."))]  # fmt: skip
KvRotate = Annotated[bool | None, flag("--kv-rotate", help=(
    "Turn keys and values by a Hadamard matrix before they are rounded."))]  # fmt: skip
Most = Annotated[Count, flag("--max-num-seqs", help=(
    "Most continuations in a batch: 64 on a CPU, 256 on a GPU, 1024 on one of 70 GiB."))]  # fmt: skip
Prefixes = Annotated[bool | None, flag("--enable-prefix-caching/--no-enable-prefix-caching", help=(
    "Keep the KV cache of prompts that begin alike."))]  # fmt: skip
Strict = Annotated[bool | None, flag("--strict-activations", help=(
    "An error where the device cannot quantize activations as declared."))]  # fmt: skip
Generation = Annotated[str, flag("--generation-config", help=(
    "Sampling defaults: auto (the model's), vllm (none), or a folder."))]  # fmt: skip
Origins = Annotated[Words, flag("--allowed-origins", help=(
    "Other sites whose pages may call: a URL, or a JSON list; none unless given."))]  # fmt: skip
Quiet = Annotated[bool, flag("--disable-access-log", "--disable-uvicorn-access-log", help=(
    "No line for each request."))]  # fmt: skip


Emulated = Annotated[Name, flag("--fakequant", help=(
    "Serve a float model rounded as if quantized: a preset of ModelOpt (NVFP4_DEFAULT_CFG ...), its config as .json or "
    ".yaml, a format, a scheme, or a recipe."))]  # fmt: skip
Cached = Annotated[Name, flag("--kv-fakequant", help="The same for keys and values: NVFP4_KV_CFG, nvfp4, fp8 ...")]
Amax = Annotated[Name, flag("--amax-file", help=(
    "Magnitudes that calibrate or ModelOpt wrote (.safetensors, .pth), instead of calibrating."))]  # fmt: skip
Dataset = Annotated[Name, flag("--calib-dataset", help="To calibrate on: a data set, a file, a folder; or what ships.")]
Math = Annotated[Name, flag("--kv-attn-math", help="fp8: attention multiplies FP8, with --kv-cache-dtype fp8.")]


def serve(
    model: Model,
    config: Config = None,
    host: Annotated[str, flag("--host", help="The address to listen on; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Annotated[int, flag("--port", help="0 takes a free one.")] = 8000,
    api_key: Annotated[Words, flag("--api-key", help="A key that every request must carry; may be repeated.")] = None,
    served_model_name: Annotated[Words, flag("--served-model-name", help="What clients call it.")] = None,
    tokenizer: Annotated[Name, flag("--tokenizer", help="A folder with a tokenizer, instead of the model's.")] = None,
    quantization: Quantization = None,
    quant_config: Annotated[
        Name, flag("--quant-config", help="INC's JSON, instead of what QUANT_CONFIG names.")
    ] = None,
    weights_load_device: Annotated[
        Name, flag("--weights-load-device", help="cpu: where weights are quantized.")
    ] = None,
    dtype: Annotated[Name, flag("--dtype", help="auto, float32, bfloat16 or float16.")] = None,
    device: Annotated[Name, flag("--device", help="auto, cpu, cuda ...")] = None,
    fakequant: Emulated = None,
    kv_fakequant: Cached = None,
    amax_file: Amax = None,
    calib_dataset: Dataset = None,
    calib_size: Annotated[Count, flag("--calib-size", help="Samples to calibrate on; 512.")] = None,
    calib_batch_size: Annotated[Count, flag("--calib-batch-size", help="Run at once; 1.")] = None,
    kv_attn_math: Math = None,
    kv_cache_dtype: KvDtype = None,
    kv_scales: KvScales = None,
    kv_scale: KvScale = None,
    kv_rotate: KvRotate = None,
    max_model_len: Annotated[Name, flag("--max-model-len", help="Longest context in tokens; 8k, 32K.")] = None,
    gpu_memory_utilization: Annotated[float | None, flag("--gpu-memory-utilization", help="A share.")] = None,
    kv_cache_memory_bytes: Annotated[Name, flag("--kv-cache-memory-bytes", help="Size of the KV cache: 2GB.")] = None,
    tensor_parallel_size: Annotated[Count, flag("--tensor-parallel-size", "-tp", help="Ranks.")] = None,
    max_num_seqs: Most = None,
    max_num_batched_tokens: Annotated[Count, flag("--max-num-batched-tokens", help="Tokens of a step.")] = None,
    max_queue: Annotated[Count, flag("--max-queue", help="Most that wait; more get 429.")] = None,
    block_size: Annotated[Count, flag("--block-size", help="Tokens of a page of KV cache.")] = None,
    enable_prefix_caching: Prefixes = None,
    enforce_eager: Annotated[bool | None, flag("--enforce-eager", help="Record no steps.")] = None,
    trust_remote_code: Annotated[bool | None, flag("--trust-remote-code", help="Run code in the checkpoint.")] = None,
    seed: Annotated[Count, flag("--seed", help="For requests that name none.")] = None,
    kernels: Annotated[Name, flag("--kernels", help="auto, or a kernel's name: reference, triton ...")] = None,
    activations: Annotated[Name, flag("--activations", help="hardware, declared, fast or off.")] = None,
    strict_activations: Strict = None,
    emulate_activations: Annotated[bool | None, flag("--emulate-activations", help="In software there.")] = None,
    fusion: Annotated[Name, flag("--fusion", help="Fused modules: auto, off, or strict (all, or an error).")] = None,
    enable_lora: Annotated[bool | None, flag("--enable-lora", help="Serve adapters.")] = None,
    chat_template: Annotated[Name, flag("--chat-template", help="A jinja file, or the template itself.")] = None,
    enable_auto_tool_choice: Annotated[bool, flag("--enable-auto-tool-choice", help="It always is.")] = True,
    tool_call_parser: Annotated[Name, flag("--tool-call-parser", help="hermes or llama3_json.")] = None,
    generation_config: Generation = "auto",
    override_generation_config: Annotated[Name, flag("--override-generation-config", help="JSON over those.")] = None,
    response_role: Annotated[str, flag("--response-role", help="Of the answer of a chat.")] = "assistant",
    allowed_origins: Origins = None,
    allow_credentials: Annotated[bool, flag("--allow-credentials", help="For those sites.")] = False,
    root_path: Annotated[str, flag("--root-path", help="Behind a proxy that keeps a prefix.")] = "",
    ssl_keyfile: Annotated[Name, flag("--ssl-keyfile", help="TLS key.")] = None,
    ssl_certfile: Annotated[Name, flag("--ssl-certfile", help="TLS certificate.")] = None,
    max_body_size: Annotated[str, flag("--max-body-size", help="Of a request.")] = "16MiB",
    shutdown_timeout: Annotated[float, flag("--shutdown-timeout", help="Seconds to finish after SIGTERM.")] = 30.0,
    disable_access_log: Quiet = False,
) -> None:
    """Serve a model behind the OpenAI API, with a page at /. Ctrl-C or SIGTERM finishes what runs and ends."""
    given = locals()
    from fewbit.cli.serving_run import run

    raise typer.Exit(run(given))


def settings_in(path: Path, known: set[str], several: set[str]) -> dict[str, Any]:
    """A YAML file of flags: their names with dashes or underscores, as vLLM writes them. several: take lists."""
    from difflib import get_close_matches

    import yaml

    from fewbit.errors import RequestError

    try:
        found = yaml.load(text_of(path), words(yaml.SafeLoader)) or {}
    except yaml.YAMLError as error:
        raise RequestError(f"{path}: not YAML: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise RequestError(f"{path}: want names and values")
    named = {str(name).lstrip("-").replace("-", "_"): value for name, value in found.items()}
    for name in named:
        if name not in known:
            near = get_close_matches(name, known, 3)
            raise RequestError(f"{path}: no flag is called {name!r}" + (f"; near: {', '.join(near)}" if near else ""))
    return {name: _plain(value, name in several) for name, value in named.items() if value is not None}


def words(loader: Any) -> Any:
    """A YAML loader to which on, off, yes and no are words, as in YAML 1.2: of some flags they are values."""
    known = {first: [(tag, pattern) for tag, pattern in rules if tag != BOOL]
             for first, rules in loader.yaml_implicit_resolvers.items()}  # fmt: skip
    made: Any = type("Words", (loader,), {"yaml_implicit_resolvers": known})
    made.add_implicit_resolver(BOOL, re.compile("(true|false)$", re.IGNORECASE), list("tTfF"))
    return made


def _plain(value: Any, several: bool) -> Any:
    if several:
        return value if isinstance(value, list) else [value]
    return json.dumps(value) if isinstance(value, dict) else value


def text_of(path: Path) -> str:
    from fewbit.errors import RequestError

    if not path.is_file():
        raise RequestError(f"{path}: there is no such file")
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise RequestError(f"{path}: over {LARGEST} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8") from error


VERBS = (serve,)
SPELT = {"tensor-paralel-size": "tensor-parallel-size"}  # as vLLM's page on INC has it


def spelling(name: str) -> str:
    """Of a flag: vLLM takes dashes and underscores."""
    name = name.replace("_", "-")
    return SPELT.get(name, name)


SETTINGS = {serve: {"token_normalize_func": spelling}}
