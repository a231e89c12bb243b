"""From tokens to text, token by token: whole characters only, in time linear in the tokens, until a stop string."""

from collections.abc import Callable, Sequence
from typing import Any

from fewbit.engine.params import SamplingParams
from fewbit.engine.text_stop import Stops

HALF = "\N{REPLACEMENT CHARACTER}"
PENDING = 3  # a character of four bytes lacks at most its last; each of three bytes may show as one HALF
WINDOW = 16  # tokens after which the window moves on
LONGEST = 64


class Detokenizer:
    """One answer's text. The token that ends an answer (an end id, a stop id) is not text and is not pushed."""

    def __init__(self, tokenizer: Any, params: SamplingParams) -> None:
        self._pieces: list[str] = []
        self._count, self._free = 0, params.min_tokens
        self._stream = Stream(tokenizer, params.skip_special_tokens) if tokenizer and params.detokenize else None
        self._stops = Stops(params.stop or (), params.include_stop_str_in_output)

    @property
    def stopped(self) -> str | None:
        """The stop string that was met."""
        return self._stops.found

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def push(self, tokens: Sequence[int]) -> str:
        """-> the text that may go out now."""
        return self._out("".join(self._one(token) for token in tokens))

    def finish(self) -> str:
        """-> what was held back: the start of a stop string that did not come, half a character."""
        if self._stream is None or self.stopped is not None:
            return ""
        return self._out(self._stopping(self._stream.finish()) + self._stops.finish())

    def _one(self, token: int) -> str:
        self._count += 1
        if self._stream is None or self.stopped is not None:
            return ""
        piece = self._stream.push(token)
        return piece if self._count <= self._free else self._stopping(piece)

    def _stopping(self, piece: str) -> str:
        return "" if self.stopped is not None else self._stops.push(piece)

    def _out(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece


class Stream:
    """Tokens to text by decoding a short window of the last tokens.

    A window begins where text was whole, and with tokens that have shown text: decoders treat the first token of a text
    as special.
    """

    def __init__(self, tokenizer: Any, skip_special: bool) -> None:
        self._decode = _decoder(tokenizer, skip_special)
        self._skipped = _special(tokenizer) if skip_special else frozenset()
        self._window: list[int] = []
        self._shown = ""  # of the window's text, what has gone out
        self._whole = 0  # tokens of the window after which its text was last whole

    def push(self, token: int) -> str:
        if token in self._skipped:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        half = min(PENDING, len(text) - len(text.rstrip(HALF)))
        if half and len(self._window) - self._whole <= PENDING:
            return ""
        piece = self._show(text, half)
        if not half:
            self._move()
        elif len(self._window) > LONGEST:  # text that is no text: do not decode it again and again
            piece += self.finish()
            self._keep(self._window[-WINDOW:])
        return piece

    def finish(self) -> str:
        return self._show(self._decode(self._window), 0)

    def _show(self, text: str, held: int) -> str:
        if not text.startswith(self._shown):  # byte fallback: one broken byte breaks all bytes before it
            self._window, self._shown, self._whole = self._window[self._whole :], "", 0
            text = self._decode(self._window)
        piece = text[len(self._shown) : len(text) - held]
        self._shown += piece
        return piece

    def _move(self) -> None:
        if len(self._window) > LONGEST or (len(self._window) > WINDOW and self._decode(self._window[self._whole :])):
            self._keep(self._window[self._whole :])
        self._whole = len(self._window)

    def _keep(self, window: list[int]) -> None:
        self._window, self._shown = window, self._decode(window)
        self._whole = len(window)


def _decoder(tokenizer: Any, skip_special: bool) -> Callable[[Sequence[int]], str]:
    """Without the clean-up of spaces, which would change text that has gone out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return lambda ids: backend.decode(ids, skip_special_tokens=skip_special)
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)


def _special(tokenizer: Any) -> frozenset[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(token for token, entry in added.items() if entry.special)


def token_text(tokenizer: Any, token: int) -> str:
    """One token alone, as a logprob names it; half a character shows as U+FFFD."""
    return _decoder(tokenizer, False)([token])
