"""A process that renders chat templates, so that one that never ends or fills the memory ends alone.

A line of JSON in: the template first, then a context for each rendering. A line of JSON out: {"text"} or {"error"}.
Needs jinja2 and nothing of this package; it is run by its path. The alarm kills it when a rendering takes too long.
"""

import contextlib
import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

MEMORY = 1 << 30  # bytes of address space
LONGEST = 32 << 20  # characters of a rendering


def environment() -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}: marks what an assistant wrote, for training; rendered as it is."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
               separators: Any = None, sort_keys: bool = False) -> str:  # fmt: skip
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def rendered(template: Any, context: dict[str, Any]) -> str:
    pieces, length = [], 0
    for piece in template.generate(**context):
        pieces.append(piece)
        length += len(piece)
        if length > LONGEST:
            raise ValueError(f"more than {LONGEST} characters")
    return "".join(pieces)


def answers(template: Any, line: str, seconds: float) -> dict[str, str]:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return {"text": rendered(template, json.loads(line))}
    except Exception as error:  # templates are programs: they fail in every way
        return {"error": f"{error or type(error).__name__}"[:1000]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main(seconds: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which closes our input
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_REAL, seconds + 5)
    try:
        template = environment().from_string(json.loads(sys.stdin.readline()))
        found: dict[str, str] = {"text": ""}
    except Exception as error:
        found = {"error": f"the chat template is no template: {error}"[:1000]}
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps(found), flush=True)
    for line in sys.stdin:
        print(json.dumps(answers(template, line, seconds)), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
