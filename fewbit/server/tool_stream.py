"""Calls found in a text as it comes: the name once it is known, then the arguments piece by piece.

A part is ("text", str), ("call", number, name) or ("arguments", number, piece).
"""

import re
from typing import Any

from fewbit.server.tools import CLOSE, OPEN, TAG, calls_in

Part = tuple[Any, ...]
# a call written in the usual order, up to where its arguments start
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
BETWEEN = "; \n\t\r"


class Calls:
    """One choice's parts. form: as in tools.Choosing."""

    def __init__(self, form: str):
        self.form, self.count = form, 0
        self._held = ""  # text of which it is not yet known what it is
        self._object = Object()
        start = {"none": self._plain, "hermes": self._text, "llama3_json": self._head, "array": self._whole}
        self._state = start.get(form, self._forced)

    def push(self, text: str, last: bool = False) -> list[Part]:
        self._held += text
        found: list[Part] = []
        while (parts := self._state(last)) is not None:
            found += parts
        return found

    def _plain(self, last: bool) -> list[Part] | None:
        held, self._held = self._held, ""
        return [("text", held)] if held else None

    def _forced(self, last: bool) -> list[Part] | None:
        """The whole text is one function's arguments."""
        held, self._held = self._held, ""
        if not held:
            return None
        return [*([] if self.count else [self._call(self.form)]), ("arguments", 0, held)]

    def _whole(self, last: bool) -> list[Part] | None:
        held, self._held = (self._held, "") if last else ("", self._held)
        return self._parts(held) if held else None

    def _text(self, last: bool) -> list[Part] | None:
        before, mark, after = self._held.partition(OPEN)
        keep = 0 if mark or last else overlap(before, OPEN)
        self._held = after if mark else before[len(before) - keep :]
        before = before[: len(before) - keep]
        if mark:
            self._state = self._head
        if self.count:  # white space between two calls
            before = before.strip()
        return [("text", before)] if before else [] if mark else None

    def _head(self, last: bool) -> list[Part] | None:
        if self.form == "llama3_json":
            self._held = self._held.lstrip(BETWEEN).removeprefix(TAG)
        if found := HEAD.match(self._held):
            self._held, self._object, self._state = self._held[found.end() :], Object(), self._arguments
            return [self._call(found.group(1))]
        return self._odd_hermes(last) if self.form == "hermes" else self._odd_llama(last)

    def _odd_hermes(self, last: bool) -> list[Part] | None:
        """A call in another order, or none at all: known at its end."""
        inner, mark, after = self._held.partition(CLOSE)
        if not mark and not last:
            return None
        self._held, self._state = after, self._text
        return self._parts(OPEN + inner + mark)

    def _odd_llama(self, last: bool) -> list[Part] | None:
        held = self._held
        if not held or (not last and (TAG.startswith(held) or held[0] == "{")):
            return None
        self._held = ""
        if last:
            return self._parts(held)
        self._state = self._plain
        return [("text", held)]

    def _arguments(self, last: bool) -> list[Part] | None:
        if not self._held:
            return None
        end = self._object.feed(self._held)
        piece, self._held = self._held[:end], self._held[end:]
        if self._object.done:
            self._state = self._tail
        return [("arguments", self.count - 1, piece)]

    def _tail(self, last: bool) -> list[Part] | None:
        """What closes a call is dropped."""
        mark = CLOSE if self.form == "hermes" else "}"
        _, found, after = self._held.partition(mark)
        if not found:
            return None
        self._held, self._state = after, self._text if self.form == "hermes" else self._head
        return []

    def _parts(self, text: str) -> list[Part]:
        left, calls = calls_in(text, self.form)
        found: list[Part] = [("text", left)] if left else []
        for call in calls:
            found += [self._call(call.name), ("arguments", self.count - 1, call.arguments)]
        return found

    def _call(self, name: str) -> Part:
        self.count += 1
        return ("call", self.count - 1, name)


class Object:
    """Where a JSON object that comes in pieces ends."""

    def __init__(self) -> None:
        self.depth, self.quoted, self.escaped, self.done = 0, False, False, False

    def feed(self, text: str) -> int:
        """How many characters of the text belong to it."""
        for i, mark in enumerate(text):
            if self.quoted:
                self._in_string(mark)
            elif mark == '"':
                self.quoted = True
            elif mark in "{[":
                self.depth += 1
            elif mark in "}]":
                self.depth -= 1
                if self.depth == 0:
                    self.done = True
                    return i + 1
        return len(text)

    def _in_string(self, mark: str) -> None:
        if self.escaped:
            self.escaped = False
        elif mark == "\\":
            self.escaped = True
        elif mark == '"':
            self.quoted = False


def overlap(text: str, mark: str) -> int:
    """The longest end of the text that begins the mark."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)
