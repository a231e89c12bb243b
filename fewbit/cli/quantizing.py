"""Verbs that make quantized models: quantize, and plan, which says beforehand what it would give and cost."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.cli.show import Json, Model, Trust, shares, table, trusting

Format = Annotated[str, typer.Option("--format", "-f", help=(
    "A format (`fewbit formats` of Python lists them), a scheme (W4A16, FP8_DYNAMIC, FP8_BLOCK, W8A8, NVFP4, MXFP4, "
    "Q4_K_M ...), or a recipe file (.yaml) with a format for each kind of module."))]  # fmt: skip
Algo = Annotated[str | None, typer.Option("--algo", "-a", help=(
    "rtn, gptq, awq, smooth, autoround, hqq or imatrix, or a chain: smooth+gptq, rotate+gptq. "
    "Left out: gptq below 5 bits, rtn else."))]  # fmt: skip
Option = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="An option of the algorithm.")]
To = Annotated[str, typer.Option("--to", help="The dialect: compressed-tensors, gptq, awq, fp8, modelopt, gguf ...")]
Group = Annotated[int | None, typer.Option("--group-size", help="Group length of an integer format; -1: a row.")]
Kv = Annotated[str | None, typer.Option("--kv", help="Scales for the KV cache: fp8, fp8-head or none.")]
Ignore = Annotated[list[str] | None, typer.Option("--ignore", help="Modules left dense: a glob, or re:REGEX.")]
Calib = Annotated[str | None, typer.Option("--calib", help=(
    "Calibration text: .txt, .jsonl, .json, .parquet, a folder, or the name of a data set. "
    "Left out: the text that ships."))]  # fmt: skip
Samples = Annotated[int, typer.Option("--calib-samples", help="How many samples.")]
Length = Annotated[int, typer.Option("--calib-len", help="Tokens in each sample.")]
Seed = Annotated[int, typer.Option("--seed", help="Which samples are drawn.")]
Chat = Annotated[bool, typer.Option("--chat", help="Apply the chat template to messages.")]
Order = Annotated[str, typer.Option("--calib-order", help="shuffled, or first: the beginning of the text as it is.")]
Observer = Annotated[str, typer.Option("--observer", help="Static activation scales by max, percentile or mse.")]
Experts = Annotated[str, typer.Option("--experts", help=(
    "Experts that saw too few tokens: error, weights-only (encoded without statistics), all-tokens."))]  # fmt: skip
Device = Annotated[str, typer.Option("--device", help="Where layers run: cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Layers compute in float32, bfloat16 or float16.")]
Memory = Annotated[str | None, typer.Option("--max-memory", help=(
    "Activations kept in memory (4GB, 512MiB ...); what is beyond goes to a file."))]  # fmt: skip
Bits = Annotated[float | None, typer.Option("--target-bits", help="Choose formats per module for this many bits.")]
Size = Annotated[str | None, typer.Option("--target-size", help="Choose formats per module for this size (5GB).")]
From = Annotated[str | None, typer.Option("--from", metavar="FORMATS", help="Formats to choose from, with commas.")]


def common(
    algo: Algo = None,
    option: Option = None,
    to: To = "compressed-tensors",
    group_size: Group = None,
    kv: Kv = None,
    ignore: Ignore = None,
    calib: Calib = None,
    calib_samples: Samples = 128,
    calib_len: Length = 512,
    seed: Seed = 0,
    chat: Chat = False,
    order: Order = "shuffled",
    observer: Observer = "max",
    experts: Experts = "weights-only",
    device: Device = "cpu",
    dtype: Dtype = None,
    max_memory: Memory = None,
    trust_remote_code: Trust = False,
) -> dict[str, Any]:
    """The arguments of both verbs, as the workflow takes them."""
    return {
        "algo": algo, "options": options_of(option or []), "to": to, "group_size": group_size, "kv": kv,
        "ignore": ignore or [], "calib": calib, "samples": calib_samples, "length": calib_len, "seed": seed,
        "chat": chat, "order": order, "observer": observer, "experts": experts, "device": device, "dtype": dtype,
        "max_memory": nbytes(max_memory), "trust_remote_code": trust_remote_code,
    }  # fmt: skip


@shares(common)
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--output", help="The folder (or .gguf file) to write.")],
    format: Format = "",
    target_bits: Bits = None,
    target_size: Size = None,
    choose_from: From = None,
    max_shard: Annotated[int, typer.Option(help="Largest shard, in bytes.")] = 5_000_000_000,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that is already in OUTPUT.")] = False,
    restart: Annotated[bool, typer.Option(help="Begin anew instead of going on with an interrupted run.")] = False,
    report: Annotated[bool, typer.Option(help="Forecast first; leave a page, a model card, the recipe.")] = True,
    as_json: Json = False,
    *,
    given: dict[str, Any],
) -> None:
    """Quantize a model layer by layer, from disk to disk. Interrupted, the same command goes on where it stopped."""
    from fewbit.workflows.quantize import quantize as run

    chosen = _chosen(model, format, target_bits, target_size, choose_from, out, given)
    done = run(model, out, chosen, **given, max_shard=max_shard, overwrite=overwrite, restart=restart,
               show=not as_json, report=report, command=_command())  # fmt: skip
    if as_json:
        print(json.dumps(done.to_json(), indent=2, default=str))
        return
    print(f"{done.out}: {done.dialect}, {len(done.modules)} modules, {done.seconds:.0f} s"
          + (f", {done.resumed} layers were finished before" if done.resumed else ""))  # fmt: skip
    rows = [(m["name"], m["format"], m["algo"], f"{m['error']:.5f}") for m in done.worst(5)]
    table("Most lost", ["module", "format", "algorithm", "relative error"], rows)
    if report:
        print(f"report: {done.report}")
    print(f"next:   fewbit eval {done.out} --against {model} --text FILE{trusting(given['trust_remote_code'])}")


@shares(common)
def plan(
    model: Model,
    format: Format,
    measure: Annotated[bool, typer.Option(help="Run one layer, for time and memory.")] = True,
    all: Annotated[bool, typer.Option("--all", help="One line for every module.")] = False,
    as_json: Json = False,
    *,
    given: dict[str, Any],
) -> None:
    """Say what quantize would give and cost, with the same arguments; nothing is written."""
    from fewbit.workflows.plan import forecast_of, told

    found = forecast_of(model, format, measure=measure, **given)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
        return
    table(f"{found.source} -> {found.dialect}", ["what", "figure"], told(found))
    if all:
        rows = [(m.name, m.format, m.algo, f"{m.bits:.3f}", m.rule) for m in found.modules]
        table("Modules", ["module", "format", "algorithm", "bits", "rule"], rows)


def _chosen(
    model: str, format: str, bits: float | None, size: str | None, choices: str | None, out: Path, given: dict[str, Any]
) -> Any:
    """The recipe: the format asked for, or the one found for a target."""
    from fewbit.errors import RequestError

    if bits is None and size is None:
        if not format:
            raise RequestError("--format says what every linear becomes; --target-bits chooses per module instead")
        return format
    from fewbit.workflows.mixed import choose

    names = [name.strip() for name in (choices or "").split(",") if name.strip()]
    return choose(model, bits=bits, size=nbytes(size), formats=names, base=format or None, show=True, **given)


def options_of(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE, the value as JSON where it is JSON."""
    from fewbit.errors import RequestError

    out = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise RequestError(f"--set {pair!r}: want NAME=VALUE")
        try:
            out[name] = json.loads(text.lower() if text in ("True", "False") else text)
        except ValueError:
            out[name] = text
    return out


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TB": 10**12}


def nbytes(text: str | None) -> int | None:
    """`5GB`, `512 MiB`, `1000` -> bytes."""
    from fewbit.errors import RequestError

    if text is None:
        return None
    digits = text.strip().rstrip("BbGgMmKkIiTt ")
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        value = float(digits) * UNITS[unit]
    except (ValueError, KeyError):
        raise RequestError(f"{text!r} is not a size; 5GB, 512MiB and 1000000 are") from None
    if not 0 < value < 1 << 63:
        raise RequestError(f"{text!r}: a size is above 0")
    return int(value)


def _command() -> str:
    from shlex import join

    return join(["fewbit", *sys.argv[1:]])


VERBS = (quantize, plan)
