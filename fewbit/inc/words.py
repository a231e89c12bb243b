"""What is said in a config is one of what is known, in any case, or an error with the nearest that is."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from fewbit.errors import RequestError


def near(word: str, known: Iterable[str]) -> str:
    names = list(known)
    found = get_close_matches(word, names, 3) or get_close_matches(word.upper(), names, 3)
    return f"did you mean {', '.join(found)}?" if found else f"known: {', '.join(names)}"


def choice(value: object, known: Sequence[str], where: str) -> str:
    """-> as `known` spells it."""
    spelt = {word.upper(): word for word in known}
    if not isinstance(value, str) or value.upper() not in spelt:
        raise RequestError(f"{where}={value!r}: no such value; {near(str(value), known)}")
    return spelt[value.upper()]


def known_keys(given: Iterable[str], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise RequestError(f"{where}: no key is called {key!r}; {near(str(key), known)}")
