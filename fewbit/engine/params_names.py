"""Constructors that answer an unknown keyword with a RequestError naming the near ones."""

import difflib
import functools
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from fewbit.engine.params_fields import shown
from fewbit.errors import RequestError


def named(owner: type, also: Mapping[str, str], refused: Mapping[str, str]) -> None:
    """Make the constructor of a dataclass answer unknown keywords with a RequestError that names near ones."""
    plain: Callable[..., None] = owner.__init__  # type: ignore[misc]
    known = {one.name for one in fields(owner)}

    @functools.wraps(plain)
    def init(self: Any, /, **given: Any) -> None:
        for name in [name for name in given if name not in known]:
            value = given.pop(name)
            if name in refused:
                if not _nothing(value):
                    raise RequestError(f"{name} is not supported: {refused[name]}")
            elif name not in also:
                raise RequestError(_unknown(owner, name, sorted(known)))
            elif given.setdefault(also[name], value) is not value:
                raise RequestError(f"{name} is another name of {also[name]}; give one of them")
        plain(self, **given)

    owner.__init__ = init  # type: ignore[misc]


def _unknown(owner: type, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name[:64], known)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
    return f"{owner.__name__} has no {shown(name)}; {hint}"


def _nothing(value: Any) -> bool:
    """What a field that is not supported may still be given."""
    return value is None or value is False or (isinstance(value, list | dict) and not value)
