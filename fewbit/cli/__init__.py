"""The command line: one verb per workflow. Heavy imports happen inside the verbs, so --help answers at once."""

import os
import sys

import typer

from fewbit.cli import calibrating, checkpoints, quality, quantizing, serving, serving_demo, speaking
from fewbit.errors import FewbitError

app = typer.Typer(
    name="fewbit",
    help="Quantize any Hugging Face language model to any common low-bit format, prove what that cost, and serve it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line; expected errors become one message and exit code 1."""
    try:
        sys.exit(app(standalone_mode=False) or 0)  # what typer.Exit carries comes back as the value
    except FewbitError as error:
        sys.exit(f"fewbit: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe went away: what is left to flush has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        sys.exit(f"fewbit: {error}")
    except Exception as error:
        if not hasattr(error, "format_message"):  # a usage error of typer's has one
            raise
        asked = "" if sys.argv[1:] else error.format_message()  # no arguments: the message is the help itself
        print(asked or f"fewbit: {error.format_message()}\nTry: fewbit --help", file=sys.stderr)
        sys.exit(2)


for home in (checkpoints, quantizing, calibrating, quality, serving, speaking, serving_demo):
    for verb in home.VERBS:
        settings = serving.SETTINGS.get(verb)
        app.command(verb.__name__.rstrip("_").replace("_", "-"), context_settings=settings)(verb)
for group in speaking.GROUPS:
    app.add_typer(group)

if __name__ == "__main__":
    main()
