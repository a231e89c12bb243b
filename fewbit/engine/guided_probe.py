"""Compiles a stranger's grammar in a process that may die of it: a chain of rules overflows the compiler's stack, some
conjunctions of patterns take gigabytes. A grammar that survives here is compiled again where it is used.

Run as a script (with llguidance alone, so that it starts in a moment) this file is that process.
"""

import signal
import struct
import sys
import threading
from typing import BinaryIO

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

SECONDS = 0.4  # of processor time
MEMORY = 1 << 30
STACK = 2 << 20  # a quarter of what a thread has where the grammar is used
LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000, max_lexer_states=20_000, step_max_items=20_000, max_grammar_size=100_000,
    verbose_errors=False,
)  # fmt: skip


class Bytes:
    """A tokenizer of 256 bytes and an end: grammars explode without the help of a vocabulary."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
    tokens = [bytes([i]) for i in range(256)] + [b"<end>"]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def tried(tokenizer: LLTokenizer, grammar: str) -> str:
    """-> what is wrong with it, or nothing."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
        matcher.deep_copy()
    return str(matcher.get_error())


def read(stream: BinaryIO) -> str | None:
    """One length and as many bytes of text; None at the end."""
    head = stream.read(4)
    return stream.read(*struct.unpack("<I", head)).decode() if len(head) == 4 else None


def written(text: str) -> bytes:
    data = text.encode(errors="replace")
    return struct.pack("<I", len(data)) + data


def serve() -> None:
    tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))
    answer("")
    while (grammar := read(sys.stdin.buffer)) is not None:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # ends the process, inside the compiler too
        found = tried(tokenizer, grammar)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answer(found[:1000])


def answer(text: str) -> None:
    sys.stdout.buffer.write(written(text))
    sys.stdout.buffer.flush()


def main() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the parent, whose end ends this
    threading.stack_size(STACK)
    worker = threading.Thread(target=serve)
    worker.start()
    worker.join()


if __name__ == "__main__":
    main()
