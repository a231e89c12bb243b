"""Verbs that say what a quantization cost: eval against the text and the base, diff module by module."""

import json
from typing import Annotated

import typer

from fewbit.cli.show import Json, Model, Trust, progress, table

Text = Annotated[str | None, typer.Option("--text", help=(
    "What to score: a text, .jsonl, .json or .parquet file; not the one calibrated on."))]  # fmt: skip
Device = Annotated[str, typer.Option("--device", help="Where layers run: cpu, cuda ...")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; left out: the base's own.")]
Format = Annotated[str | None, typer.Option("--format", help="Round the weights to this format as they are read.")]


def eval_(
    model: Model,
    against: Annotated[str | None, typer.Option("--against", help="The base to compare with.")] = None,
    text: Text = None,
    format: Format = None,
    context: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    windows: Annotated[int | None, typer.Option(help="At most so many windows.")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Perplexity, and against a base KL divergence and top-1 agreement, each with its 95 % interval."""
    from fewbit.workflows.evaluate import evaluate, rows

    found = evaluate(model, text=text, against=against, format=format, context=context, windows=windows,
                     device=device, dtype=dtype, trust_remote_code=trust_remote_code, progress=progress)  # fmt: skip
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
        return
    table(f"{model} over {found.tokens} tokens", ["figure", "value", "95 % interval"], rows(found))


def diff(
    a: Model,
    b: Annotated[str | None, typer.Argument(metavar="[B]", help="What is compared with it.")] = None,
    text: Text = None,
    format: Format = None,
    tokens: Annotated[int, typer.Option(help="How many tokens to run.")] = 2048,
    context: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    kernels: Annotated[str, typer.Option(help="Kernels of A and of B: decoded,auto ...")] = "decoded,decoded",
    activations: Annotated[str, typer.Option(help="Of A and of B: declared,fast ...")] = "declared,declared",
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    all: Annotated[bool, typer.Option("--all", help="One line for every module.")] = False,
    as_json: Json = False,
) -> None:
    """Run two models on the same tokens and say, module by module, where they part and who is guilty first."""
    from fewbit.workflows.diff import diff as run
    from fewbit.workflows.diff import figures, layer_rows, module_rows, verdict

    found = run(a, b, text=text, format=format, tokens=tokens, context=context, kernels=_pair(kernels, "--kernels"),
                activations=_pair(activations, "--activations"), device=device, dtype=dtype,
                trust_remote_code=trust_remote_code, progress=progress)  # fmt: skip
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
        return
    table("Modules", ["module", "formats", "weights", "same input", "own input", "explained"], module_rows(found, all))
    table("Layers", ["layer", "same input", "own input"], layer_rows(found))
    table("Logits", ["figure", "value", "95 % interval"], figures(found))
    print(verdict(found))


def _pair(text: str, flag: str) -> tuple[str, str]:
    from fewbit.errors import RequestError

    parts = text.split(",")
    if len(parts) != 2:
        raise RequestError(f"{flag} {text!r}: want two words with a comma, of A and of B")
    return parts[0], parts[1]


def certify(
    formats: Annotated[
        list[str] | None, typer.Argument(metavar="[FORMAT]...", help="Formats or schemes (fp8, NVFP4 ...); none: all.")
    ] = None,
    device: Device = "cpu",
    kernel: Annotated[list[str] | None, typer.Option("--kernel", help="This kernel alone; may be repeated.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Serve this float model emulated and really quantized, and compare.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="With --model: how many greedy tokens.")] = 2000,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table as docs/certificate.md has it.")] = False,
    as_json: Json = False,
) -> None:
    """Prove that kernels compute what is emulated: values, rounded inputs, sums; exit code 1 where one does not."""
    from fewbit.workflows.certify import COLUMNS, cells, render, rows, writable
    from fewbit.workflows.certify import certify as run

    formats = rows(formats or [])
    if model is not None:
        _served(formats or ["fp8-tensor"], model, tokens, device, (kernel or ["auto"])[0], as_json)
    names = formats or writable()
    found = [one for name in progress(names, "certify") for one in run([name], device, kernel or ())]
    if as_json:
        print(json.dumps([one.to_json() for one in found], indent=2))
    elif markdown:
        print(render(found))
    else:
        table(f"Certificates on {device}", [*COLUMNS, "error", "verdict"],
              [(*cells(c), f"{c.error:.1e}", "holds" if c.ok else "DOES NOT HOLD") for c in found])  # fmt: skip
    if not found:
        raise typer.Exit(1)
    raise typer.Exit(0 if all(one.ok for one in found) else 1)


def _served(formats: list[str], model: str, tokens: int, device: str, kernel: str, as_json: bool) -> None:
    from fewbit.served import certify

    found = []
    for name in progress(formats, "serve"):
        found.append(certify(model, name, tokens, device, kernel))
        if not as_json:
            print(found[-1])
    if as_json:
        print(json.dumps([one.to_json() for one in found], indent=2))
    raise typer.Exit(0 if all(one.ok for one in found) else 1)


VERBS = (eval_, diff, certify)
