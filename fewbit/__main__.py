"""The `fewbit` command and `python -m fewbit`: an interrupt ends quietly from the first import to the last."""

import os
import signal
import sys


def main() -> None:
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
