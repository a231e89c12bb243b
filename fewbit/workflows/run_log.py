"""RunLog: what a run did, one JSON line per event, on disk at once; and a live view of the same.

A killed run leaves at most half a line, which the next one cuts off before it goes on. On a terminal every layer has a
bar while it is worked on and stays as one line; elsewhere a plain line comes now and then.
"""

import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from fewbit.errors import CheckpointError
from fewbit.files.staging import raise_write_error
from fewbit.workflows.report_data import plain
from fewbit.workflows.run_view import Bars, Lines, View, peak_memory


class RunLog:
    """The log of one run, through any number of resumptions.

    layers: how many there are, for the time left. live: a terminal's bars; None asks the stream.
    """

    def __init__(self, path: Path | str, layers: int = 0, live: bool | None = None, stream: TextIO | None = None):
        self.path, self.layers, self.complete = Path(path), layers, False
        stream = stream or sys.stderr
        self._earlier, self._size = _mend(self.path)
        self._seen = {e["name"] for e in self._earlier if e.get("event") == "layer"}
        self._now, self._began = 0, time.monotonic()
        try:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise_write_error(self.path, error)
        bars = stream.isatty() if live is None else live
        self._view: View = Bars(layers, len(self._seen), stream) if bars else Lines(layers, stream)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            self._view.close()
            os.close(self._fd)
            self._fd = -1

    def start(self, **facts: Any) -> None:
        """The first event: "start", or "resumed" where an earlier run left off."""
        if self._earlier:
            self.event("resumed", layers_done=len(self._seen), **facts)
        else:
            self.event("start", **facts)

    def module(self, name: str, **facts: Any) -> None:
        """A module has its codes; facts: the fields of report_data.Module."""
        self.event("module", name=name, **facts)

    def layer(self, name: str, **facts: Any) -> None:
        """A layer is done; facts: the fields of report_data.Layer. Memory is measured where it is not given."""
        new = name not in self._seen
        self._seen.add(name)
        self._now += new
        self.event("layer", name=name, **({"memory": peak_memory()} | facts))

    def damping(self, name: str, **facts: Any) -> None:
        self.event("damping", name=name, **facts)

    def warning(self, message: str, **facts: Any) -> None:
        self.event("warning", message=message, **facts)

    def done(self, **facts: Any) -> None:
        """The result is whole: from here on a disk that is full costs the log and nothing else."""
        self.complete = True
        self.event("done", **facts)

    def event(self, kind: str, **facts: Any) -> None:
        """Append one line, then show it."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        record = {"time": now, "event": kind, **plain(facts)}
        self._append(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._view.show(record, self.left())

    def left(self) -> float | None:
        """Seconds that the layers still to come will take, by the mean of those done in this process."""
        if not self._now or not self.layers:
            return None
        return (time.monotonic() - self._began) / self._now * max(self.layers - len(self._seen), 0)

    def events(self) -> list[dict[str, Any]]:
        """Everything logged so far, by this process and those before it."""
        return read_log(self.path)

    def _append(self, line: bytes) -> None:
        try:
            _write(self._fd, line)
            self._size += len(line)
        except OSError as error:
            _forget(self._fd, self._size)
            if not self.complete:
                raise_write_error(self.path, error)


def read_log(path: Path | str) -> list[dict[str, Any]]:
    """The events of a log; a last line that was torn off does not count."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror}") from error
    lines = data.split(b"\n")
    found = []
    for i, line in enumerate(lines[:-1]):
        try:
            event = json.loads(line)
        except ValueError as error:
            raise CheckpointError(f"{path}: line {i + 1} is not JSON: {error}") from error
        if not isinstance(event, dict):
            raise CheckpointError(f"{path}: line {i + 1} is not an event but {line[:40]!r}")
        found.append(event)
    return found


def _mend(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(earlier events, bytes they take); half a line at the end is cut off."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return [], 0
    events = read_log(path)
    size = path.read_bytes().rfind(b"\n") + 1
    if size < path.stat().st_size:
        os.truncate(path, size)
    return events, size


def _write(fd: int, line: bytes) -> None:
    done = 0
    while done < len(line):
        done += os.write(fd, line[done:])


def _forget(fd: int, size: int) -> None:
    """Take back what a failed write left of its line."""
    try:
        os.ftruncate(fd, size)
    except OSError:  # the reader of a log cuts it off as well
        return
