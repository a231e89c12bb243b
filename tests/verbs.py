"""A verb of the command line within this process: a process of its own takes seconds to import what is here already."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest import mock

from fewbit.cli import main


@dataclass(frozen=True, slots=True)
class Done:
    """As subprocess has it."""

    returncode: int
    stdout: str
    stderr: str


def run(*args: object, given: str = "") -> Done:
    """given: what it reads."""
    out, error, code = io.StringIO(), io.StringIO(), 0
    argv, stdin = ["fewbit", *map(str, args)], io.StringIO(given)
    with mock.patch.multiple(sys, argv=argv, stdin=stdin), redirect_stdout(out), redirect_stderr(error):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                error.write(end.code)
    return Done(code, out.getvalue(), error.getvalue())
