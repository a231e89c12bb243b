"""Verbs that generate in this process: complete, chat, run-batch; and bench, which measures it or a server."""

import asyncio
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.cli.show import Json, Model, Trust, shares, table

MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", help="Only the likeliest tokens of this share.")]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed, the same answer.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda ...")]
Quantization = Annotated[str | None, typer.Option("--quantization", "-q", help="Quantize a dense model to this.")]
Fusion = Annotated[str, typer.Option("--fusion", help="Fused modules: auto, off, or strict (all, or an error).")]
Length = Annotated[int | None, typer.Option("--max-model-len", help="Longest context in tokens.")]


def engine_options(
    dtype: Dtype = "auto", device: Device = "auto", quantization: Quantization = None, max_model_len: Length = None,
    fusion: Fusion = "auto", trust_remote_code: Trust = False,
) -> dict[str, Any]:  # fmt: skip
    """What every verb that starts an engine takes, under EngineConfig's names."""
    return {"dtype": dtype, "device": device, "quantization": quantization, "max_model_len": max_model_len,
            "fusion": fusion, "trust_remote_code": trust_remote_code}  # fmt: skip


@shares(engine_options)
def complete(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="How the text begins; - reads it from standard input.")],
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    *,
    given: dict[str, Any],
) -> None:
    """Go on with a text, printed as it comes."""
    engine = started(model, **given)
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = engine.tokenizer(text)["input_ids"]
    for piece in spoken(engine, ids, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed):
        print(piece, end="", flush=True)
    print()


@shares(engine_options)
def chat(
    model: Model,
    system: Annotated[str, typer.Option("--system", help="What the model is told first.")] = "",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = None,
    *,
    given: dict[str, Any],
) -> None:
    """Talk with a model. Ctrl-C ends an answer, Ctrl-D the talk; lines may come through a pipe."""
    engine = started(model, **given)
    talk = [{"role": "system", "content": system}] if system else []
    for line in lines():
        talk.append({"role": "user", "content": line})
        said = ""
        try:
            for piece in spoken(engine, templated(engine, talk), max_tokens=max_tokens, temperature=temperature,
                                top_p=top_p, seed=seed):  # fmt: skip
                said += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" ...", end="")
        print()
        talk.append({"role": "assistant", "content": said})


def started(model: str, **options: Any) -> Any:
    """An engine with a tokenizer."""
    from fewbit.engine.config import EngineConfig
    from fewbit.engine.engine import Engine
    from fewbit.errors import RequestError
    from fewbit.models.device import present

    present(options["device"])
    engine = Engine(EngineConfig.of(model=model, **options))
    if engine.tokenizer is None:
        raise RequestError(f"{model}: came without a tokenizer, and a text needs one")
    return engine


def templated(engine: Any, talk: list[dict[str, str]]) -> list[int]:
    from fewbit.errors import RequestError

    if not engine.tokenizer.chat_template:
        raise RequestError("the model has no chat template: fewbit complete goes on with plain text")
    text = engine.tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    return list(engine.tokenizer(text, add_special_tokens=False)["input_ids"])


_numbers = itertools.count()


def spoken(engine: Any, ids: list[int], **params: Any) -> Iterator[str]:
    """The pieces of one answer; leaving off gives the request up."""
    from fewbit.engine.params import SamplingParams
    from fewbit.engine.request import Request

    request = Request(f"cli-{next(_numbers)}", ids, SamplingParams(**params))
    engine.add(request)
    try:
        while engine.has_work():
            for delta in engine.step():
                yield delta.text
    finally:
        engine.abort(request.id)


def lines() -> Iterator[str]:
    """What the user says, with a prompt on a terminal."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


@shares(engine_options)
def run_batch(
    model: Model,
    input_file: Annotated[Path, typer.Option("-i", "--input-file", help="JSON lines: custom_id, url, body.")],
    output_file: Annotated[Path, typer.Option("-o", "--output-file", help="Where the answers go, in that order.")],
    served_model_name: Annotated[str | None, typer.Option("--served-model-name", help="As bodies call it.")] = None,
    *,
    given: dict[str, Any],
) -> None:
    """Answer a file of requests in OpenAI's batch format."""
    from fewbit.engine.config import EngineConfig
    from fewbit.engine.engine import Engine
    from fewbit.errors import RequestError
    from fewbit.models.device import present
    from fewbit.server.batch import read, run
    from fewbit.server.config import ServerConfig

    writable(output_file)
    if not input_file.is_file():
        raise RequestError(f"{input_file}: there is no such file")
    present(given["device"])
    asked = read(input_file.read_text(encoding="utf-8"), str(input_file))
    called = {line.body.get("model") or model for line in asked}
    names = (served_model_name,) if served_model_name else tuple(called)
    config = EngineConfig.of(model=model, served_model_name=names, **given)
    every = max(1, len(asked) // 10)

    def tell(done: int) -> None:
        if done % every == 0 or done == len(asked):
            print(f"fewbit: {done} of {len(asked)}", file=sys.stderr, flush=True)

    answers = list(run(lambda: Engine(config), ServerConfig(), asked, tell))
    partial = output_file.with_name(f"{output_file.name}.partial")
    partial.write_text("".join(json.dumps(answer) + "\n" for answer in answers), encoding="utf-8")
    partial.rename(output_file)
    failed = sum(answer["error"] is not None for answer in answers)
    print(f"{len(answers) - failed} answered, {failed} failed: {output_file}")
    if failed:
        raise typer.Exit(1)


def writable(path: Path) -> None:
    """Refuse a place for answers before any is made."""
    from fewbit.errors import RequestError

    if path.exists():
        raise RequestError(f"{path}: is there already; give another name")
    if not path.parent.is_dir():
        raise RequestError(f"{path}: there is no folder {path.parent} to put it in")


bench = typer.Typer(name="bench", help="Measure speed: an engine in this process, or any OpenAI server.",
                    no_args_is_help=True, rich_markup_mode=None)  # fmt: skip
InputLen = Annotated[int, typer.Option("--input-len", min=1, help="Tokens of each prompt, random.")]
OutputLen = Annotated[int, typer.Option("--output-len", min=2, help="Tokens of each answer.")]


@bench.command()
@shares(engine_options)
def latency(
    model: Model,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Requests at once.")] = 1,
    input_len: InputLen = 128,
    output_len: OutputLen = 32,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Repetitions; the median counts.")] = 3,
    as_json: Json = False,
    *,
    given: dict[str, Any],
) -> None:
    """Time of one batch: to the first tokens, and for each later step."""
    show(batch(model, batch_size, input_len, output_len, repeat, given), as_json)


@bench.command()
@shares(engine_options)
def throughput(
    model: Model,
    num_prompts: Annotated[int, typer.Option("--num-prompts", min=1, help="Requests in all.")] = 64,
    input_len: InputLen = 128,
    output_len: OutputLen = 32,
    as_json: Json = False,
    *,
    given: dict[str, Any],
) -> None:
    """Tokens a second over many requests at once."""
    show(batch(model, num_prompts, input_len, output_len, 1, given), as_json)


def batch(model: str, count: int, input_len: int, output_len: int, repeat: int, options: dict[str, Any]) -> Any:
    from fewbit.engine.bench import measure
    from fewbit.engine.config import EngineConfig
    from fewbit.engine.engine import Engine
    from fewbit.models.device import present

    present(options["device"])
    return measure(Engine(EngineConfig.of(model=model, **options)), count, input_len, output_len, repeat)


def show(found: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
        return
    table("Speed", ["what", "figure"], [
        ("requests x prompt + answer", f"{found.requests} x {found.input_tokens} + {found.output_tokens} tokens"),
        ("seconds", f"{found.seconds:.3f}"), ("first tokens after", f"{found.first * 1000:.1f} ms"),
        ("a step", f"{found.step * 1000:.2f} ms"), ("prompt tokens/s", f"{found.prefill_rate:.0f}"),
        ("tokens/s, decoding", f"{found.decode_rate:.1f}"), ("tokens/s over all", f"{found.total_rate:.1f}"),
    ])  # fmt: skip


@bench.command()
def serve(
    url: Annotated[str, typer.Option("--url", help="The server: http://127.0.0.1:8000.")] = "http://127.0.0.1:8000",
    peer_url: Annotated[str, typer.Option("--peer-url", help="Another server, asked the same afterwards.")] = "",
    model: Annotated[str, typer.Option("--model", help="The model's name there; the first it lists.")] = "",
    num_prompts: Annotated[int, typer.Option("--num-prompts", min=1, help="Requests in all.")] = 64,
    request_rate: Annotated[float, typer.Option("--request-rate", help="Requests a second, Poisson.")] = float("inf"),
    input_len: InputLen = 128,
    output_len: OutputLen = 32,
    vocab: Annotated[int, typer.Option("--vocab", min=11, help="Token ids are drawn below this.")] = 1000,
    seed: Annotated[int, typer.Option("--seed", help="Of the prompts and the times.")] = 0,
    api_key: Annotated[str, typer.Option("--api-key", help="A key, where the server wants one.")] = "",
    as_json: Json = False,
) -> None:
    """Requests at random times against an OpenAI server, ours or another's: times to tokens, tokens a second."""
    from fewbit.errors import RequestError
    from fewbit.server.load import Load, run
    from fewbit.server.load import models as known

    if request_rate <= 0:
        raise RequestError(f"--request-rate {request_rate}: want a rate above 0, or inf")
    found = []
    for each in [url, peer_url] if peer_url else [url]:
        name = model or known(each, api_key or None)
        load = Load(each, name, num_prompts, input_len, output_len, request_rate, seed, vocab, api_key or None)
        found.append(asyncio.run(run(load)))
    told(found, as_json)
    if any(f.failed for f in found):
        raise typer.Exit(1)


def told(found: list[Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps([f.to_json() for f in found], indent=2))
        return
    columns = ["server", "done", "failed", "req/s", "out tok/s", "all tok/s", "ttft p50/p99 ms", "tpot p50 ms"]
    table("Serving", columns, [
        (f.url, f.completed, f.failed, f"{f.request_rate:.2f}", f"{f.output_rate:.1f}", f"{f.total_rate:.1f}",
         f"{f.ttft.get('p50', 0):.0f}/{f.ttft.get('p99', 0):.0f}", f"{f.tpot.get('p50', 0):.1f}") for f in found
    ])  # fmt: skip
    for f in found:
        for error in f.errors:
            print(f"{f.url}: {error}", file=sys.stderr)


VERBS = (complete, chat, run_batch)
GROUPS = (bench,)
