"""Keeps the process that tries grammars first (guided_probe), and starts it again when one has killed it."""

import functools
import select
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

from fewbit.engine import guided_probe
from fewbit.errors import RequestError, UnsupportedError

SECONDS = 5.0  # for one grammar, with the way there and back; its share of a processor has a far lower limit
START = 20.0


class Guard:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def check(self, grammar: str) -> None:
        """RequestError where the grammar is wrong, or costs too much to find that out."""
        with self._lock:
            child = self._started()
            try:
                found = _asked(child, grammar)
            except (OSError, EOFError, TimeoutError) as error:
                _end(child)
                self._child = _start(self)
                raise RequestError("the grammar is too deep, too large or too ambiguous to compile") from error
        if found:
            raise RequestError(f"the grammar does not compile: {brief(found)}")

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._child is None or self._child.poll() is not None:
            self._child = _start(self)
        if not getattr(self._child, "ready", False):
            _greeted(self._child)
        return self._child


def brief(message: str) -> str:
    """Of a compiler's message, what fits in an error."""
    return " ".join(message.split("<state>")[0].replace("<non-verbose/>", "").split())[:400]


@functools.cache
def guard() -> Guard:
    """One for the process."""
    return Guard()


def _start(owner: Guard) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-P", str(Path(guided_probe.__file__))]
    pipe, none = subprocess.PIPE, subprocess.DEVNULL
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=none, bufsize=0)
    weakref.finalize(owner, _end, child)
    return child


def _greeted(child: "subprocess.Popen[bytes]") -> None:
    try:
        _answer(child, time.monotonic() + START)
    except (OSError, EOFError, TimeoutError) as error:
        _end(child)
        raise UnsupportedError("structured outputs: the process that compiles grammars does not start") from error
    child.ready = True  # type: ignore[attr-defined]


def _asked(child: "subprocess.Popen[bytes]", grammar: str) -> str:
    assert child.stdin is not None
    child.stdin.write(guided_probe.written(grammar))
    return _answer(child, time.monotonic() + SECONDS)


def _answer(child: "subprocess.Popen[bytes]", deadline: float) -> str:
    size = int.from_bytes(_exactly(child, 4, deadline), "little")
    return _exactly(child, size, deadline).decode()


def _exactly(child: "subprocess.Popen[bytes]", count: int, deadline: float) -> bytes:
    assert child.stdout is not None
    data = b""
    while len(data) < count:
        if not select.select([child.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        more = child.stdout.read(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def _end(child: "subprocess.Popen[bytes]") -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
