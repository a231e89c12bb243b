"""What the verbs have in common: options that several take, and tables and progress for a terminal and for a pipe."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder, or one .gguf or .safetensors file.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code in the checkpoint.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


def shares(options: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A verb that takes the options of another function too, and what that makes of them as its `given`."""
    theirs = inspect.signature(options).parameters

    def around(verb: Callable[..., None]) -> Callable[..., None]:
        mine = [p for name, p in inspect.signature(verb).parameters.items() if name != "given"]

        @functools.wraps(verb)
        def run(**asked: Any) -> None:
            given = options(**{name: asked.pop(name) for name in theirs})
            verb(**asked, given=given)

        told = [p.replace(kind=p.KEYWORD_ONLY) for p in (*mine, *theirs.values())]
        run.__signature__ = inspect.Signature(told)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in told}
        return run

    return around


def trusting(asked: bool) -> str:
    """The flag again, in a command that comes next."""
    return " --trust-remote-code" if asked else ""


def table(title: str, columns: list[str], rows: Iterable[tuple[Any, ...]]) -> None:
    """A table on a terminal, tab-separated lines otherwise."""
    rows = list(rows)
    if not rows:
        return
    if not sys.stdout.isatty():
        print(f"\n{title}")
        print("\n".join("\t".join(map(str, row)) for row in [tuple(columns), *rows]))
        return
    from rich.console import Console
    from rich.table import Table

    drawn = Table(*columns, title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for row in rows:
        drawn.add_row(*map(str, row))
    Console().print(drawn)


def progress(names: Iterable[str], label: str) -> Iterator[str]:
    """A live bar on a terminal, a line now and then otherwise."""
    names = list(names)
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(names, label, console=Console(stderr=True))
        return
    for i, name in enumerate(names):
        if i % max(1, len(names) // 4) == 0:
            print(f"{label}: {i}/{len(names)} {name}", file=sys.stderr)
        yield name
