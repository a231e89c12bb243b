"""What one sees of a run while it goes: bars on a terminal, plain lines now and then elsewhere."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO

from fewbit.workflows.report_data import finite
from fewbit.workflows.report_numbers import duration, number, size

EVERY = 15.0  # seconds between plain lines


class View(Protocol):
    """Who shows events while they happen."""

    def show(self, event: dict[str, Any], left: float | None) -> None: ...

    def close(self) -> None: ...


class Lines:
    """Plain lines: the first event, warnings, a layer now and then, the end."""

    def __init__(self, layers: int, stream: TextIO, clock: Callable[[], float] = time.monotonic):
        self.layers, self.stream, self.clock = layers, stream, clock
        self._done, self._last = 0, float("-inf")

    def show(self, event: dict[str, Any], left: float | None) -> None:
        kind = event["event"]
        self._done = event.get("layers_done", self._done) + (kind == "layer")
        if kind == "layer" and (self.clock() - self._last >= EVERY or self._done == self.layers):
            self._last = self.clock()
            self._say(f"layer {self._done}/{self.layers or '?'} {layer_words(event)}{_left(left)}")
        elif kind not in ("layer", "module"):
            self._say(words(event))

    def close(self) -> None:
        return

    def _say(self, line: str) -> None:
        print(f"fewbit: {line}", file=self.stream, flush=True)


class Bars:
    """A bar over all layers, one over the modules of the layer at hand, and a line for each layer done."""

    def __init__(self, layers: int, done: int, stream: TextIO):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = Console(file=stream, highlight=False, force_terminal=True)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        facts = TextColumn("{task.fields[facts]}", markup=False)
        self.progress = Progress(*columns, TimeElapsedColumn(), facts, console=self.console, transient=True)
        self.all = self.progress.add_task("layers", total=layers or None, completed=done, facts="")
        self.one = self.progress.add_task("", total=None, visible=False, facts="")
        self._width, self._count = 0, 0  # modules in the last layer, and so far in this one
        self.progress.start()

    def show(self, event: dict[str, Any], left: float | None) -> None:
        kind = event["event"]
        if kind == "module":
            self._module(event)
        elif kind == "layer":
            self._layer(event, left)
        elif kind != "damping":
            style = "yellow" if kind == "warning" else None
            self.console.print(words(event), style=style, markup=False)

    def close(self) -> None:
        self.progress.stop()

    def _module(self, event: dict[str, Any]) -> None:
        self._count += 1
        total = max(self._width, self._count) if self._width else None
        name, facts = f"  {_clean(event['name'])}", f"{_loss(event)}  {size(peak_memory())}"
        self.progress.update(self.one, description=name, completed=self._count, total=total, visible=True, facts=facts)

    def _layer(self, event: dict[str, Any], left: float | None) -> None:
        self._width, self._count = self._count, 0
        self.progress.reset(self.one, visible=False)
        self.progress.update(self.all, advance=1, facts=f"{_memory(event)}{_left(left)}")
        self.console.print(layer_words(event), markup=False)


def layer_words(event: dict[str, Any]) -> str:
    """One line for a layer: its name, loss, memory and time."""
    seconds = finite(event.get("seconds"))
    said = [_clean(event["name"]), _loss(event), _memory(event), duration(seconds) if seconds is not None else ""]
    return "  ".join(filter(None, said))


def words(event: dict[str, Any]) -> str:
    """One line for any other event."""
    kind, message = event["event"], event.get("message")
    facts = (f"{k} {v}" for k, v in event.items() if k not in ("time", "event", "message") and _brief(v))
    return _clean(f"{kind}: {message}" if message else ", ".join([kind, *facts]))


def _clean(text: str) -> str:
    """A name may hold what steers a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _brief(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, str) and len(value) <= 60 and "\n" not in value)


def _loss(event: dict[str, Any]) -> str:
    known = (k for k in ("loss", "error") if finite(event.get(k)) is not None)
    return ", ".join(f"{k} {number(event[k])}" for k in known)


def _memory(event: dict[str, Any]) -> str:
    held = finite(event.get("memory"))
    return "" if held is None else size(held)


def _left(left: float | None) -> str:
    return "" if left is None else f", {duration(left)} left"


def peak_memory() -> int:
    """Most bytes this process ever had resident."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024
    except (OSError, StopIteration):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
