"""Stop strings in text that comes piece by piece: what may go out, and when to stop.

Each string is followed by its own automaton (Knuth, Morris, Pratt 1977), so a character costs the same however long the
strings are and whatever the text repeats.
"""

import functools
from collections.abc import Sequence


class Stops:
    """`found`: the string that was met. Text that may still become one is held back."""

    def __init__(self, strings: Sequence[str], include: bool) -> None:
        self._each, self._include = [_Follower(one) for one in strings], include
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """-> what may go out now."""
        met = [(at, -len(one.string), one.string) for one in self._each if (at := one.push(text)) is not None]
        if met:
            return self._end(text, *min(met))
        kept = max((one.matched for one in self._each), default=0)
        whole = self._held + text
        self._held = whole[len(whole) - kept :]
        return whole[: len(whole) - kept]

    def _end(self, text: str, at: int, _: int, string: str) -> str:
        whole, self.found = self._held + text[:at], string
        self._held = ""
        return whole if self._include else whole[: len(whole) - len(string)]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


class _Follower:
    """matched: how much of the string the text now ends with."""

    def __init__(self, string: str) -> None:
        self.string, self.matched = string, 0
        self._back = _borders(string)

    def push(self, text: str) -> int | None:
        """-> where in `text` the string ends, if it does."""
        start = 0
        if not self.matched:
            start = text.find(self.string[0])
            if start < 0:
                return None
        for at in range(start, len(text)):
            if self._step(text[at]):
                return at + 1
        return None

    def _step(self, letter: str) -> bool:
        while self.matched and self.string[self.matched] != letter:
            self.matched = self._back[self.matched]
        self.matched += self.string[self.matched] == letter
        return self.matched == len(self.string)


@functools.lru_cache(maxsize=256)
def _borders(string: str) -> list[int]:
    """Of each length, how much of a prefix so long is again its end."""
    back = [0, 0]
    for letter in string[1:]:
        length = back[-1]
        while length and string[length] != letter:
            length = back[length]
        back.append(length + (string[length] == letter))
    return back
