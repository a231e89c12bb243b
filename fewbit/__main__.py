"""The `fewbit` command and `python -m fewbit`: an interrupt ends quietly from the first import to the last."""

import atexit
import contextlib
import os
import signal
import sys


def main() -> None:
    try:
        run()
    except SystemExit as leaving:
        if leaving.code == 130:
            leave(130)
        raise


def leave(code: int) -> None:
    """Without Python's own end: that stops an engine's thread within C++, where it aborts, and dies of the signal after
    all where an interrupt came within an exec, as dataclasses have them.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def run() -> None:
    heard, told = os.pipe()
    for end in (heard, told):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    try:
        from fewbit.cli import main as cli

        cli()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:  # torch's import swallows an interrupt of numpy's, which cannot be imported again
        if interrupted(heard):
            sys.exit(130)
        raise
    finally:  # the answer is given; the interpreter's own end would die of an interrupt with another code
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def interrupted(heard: int) -> bool:
    """Whether an interrupt has come, whatever became of it."""
    try:
        return signal.SIGINT in os.read(heard, 1 << 16)
    except BlockingIOError:
        return False


if __name__ == "__main__":
    main()
