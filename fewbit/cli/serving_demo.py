"""The verb demo: a small real model, served with its page, asked one question through the API."""

import json
import os
import signal
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer


def demo(
    model: Annotated[str | None, typer.Argument(help="A checkpoint of your own instead of the demo model.")] = None,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "What is a quantized language model? One sentence.",
    tokens: Annotated[int, typer.Option(help="How many tokens to generate.")] = 48,
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    once: Annotated[bool, typer.Option("--once", envvar="DEMO_ONCE", help="End after the answer.")] = False,
) -> None:
    """Fetch a small real model, serve it with a page, ask it one question; stay up until Ctrl-C."""
    from fewbit.cli.serving import serve
    from fewbit.cli.serving_run import run
    from fewbit.workflows.demo import fetch

    path = Path(model) if model else fetch()
    given = defaults_of(serve) | {"model": str(path), "port": port, "served_model_name": ["demo"],
                                  "disable_access_log": True}  # fmt: skip
    asked = Asked(prompt, tokens, once)
    status = run(given, asked.start)
    raise typer.Exit(status or asked.status)


def defaults_of(verb: Any) -> dict[str, Any]:
    import inspect

    return {name: param.default for name, param in inspect.signature(verb).parameters.items()}


class Asked:
    """The question, asked on a thread of its own once the server is up."""

    def __init__(self, prompt: str, tokens: int, once: bool):
        self.prompt, self.tokens, self.once, self.status = prompt, tokens, once, 1 if once else 0

    def start(self, url: str) -> None:
        threading.Thread(target=self.ask, args=(url,), daemon=True).start()

    def ask(self, url: str) -> None:
        body = {"messages": [{"role": "user", "content": self.prompt}], "max_tokens": self.tokens, "temperature": 0}
        try:
            print(f"> {self.prompt}\n{_answer(url, body)}\n", flush=True)
            self.status = 0
        except OSError as error:
            print(f"the question was not answered: {error}", file=sys.stderr)
        finally:
            data = json.dumps(body).replace("'", "'\\''")
            print(f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{data}'", flush=True)
            if self.once:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                print(f"the page: {url}/   (Ctrl-C ends)", flush=True)


def _answer(url: str, body: dict[str, Any]) -> str:
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(),
                                     {"content-type": "application/json"})  # fmt: skip
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
    with opener.open(request, timeout=300) as response:
        text: str = json.load(response)["choices"][0]["message"]["content"]
        return text


VERBS = (demo,)
