"""The `fewbit` command and `python -m fewbit`: an interrupt ends quietly from the first import to the last."""

import signal
import sys


def main() -> None:
    try:
        from fewbit.cli import main as cli

        cli()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:  # the answer is given; the interpreter's own end would die of an interrupt with another code
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    main()
