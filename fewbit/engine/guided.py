"""Guided decoding by llguidance: which tokens may come next, so that the answer fits a schema, a pattern or a grammar.

A stranger's grammar is tried in a process of its own first (guided_guard); what then still grows while an answer is
made is bounded by the compiler's own limits, and ends that one answer.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark
from torch import Tensor

from fewbit.engine import guided_source
from fewbit.engine.guided_guard import brief, guard
from fewbit.engine.guided_probe import LIMITS
from fewbit.engine.guided_source import StructuredOutputs
from fewbit.errors import RequestError

KEPT = 64


class Grammars:
    """The compiled grammars of one tokenizer; safe to call from any thread."""

    def __init__(self, tokenizer: Any, vocab: int, ends: Iterable[int] = ()) -> None:
        """vocab: how many logits there are; ends: the ids that end an answer, the tokenizer's own unless given."""
        self._tokenizer, self._vocab, self._ends = tokenizer, vocab, sorted(ends)
        self._lock = threading.Lock()
        self._reader: LLTokenizer | None = None
        self._kept: OrderedDict[tuple[str, str], Grammar | RequestError] = OrderedDict()

    def compile(self, structured: StructuredOutputs) -> "Grammar":
        key = guided_source.source(structured)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._tried(key)
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            found = self._kept[key]
        if isinstance(found, RequestError):
            raise RequestError(str(found))
        return found

    def _tried(self, key: tuple[str, str]) -> "Grammar | RequestError":
        try:
            grammar = _grammar(*key)
            guard().check(grammar)
            return Grammar(self._read(), grammar, self._vocab)
        except RequestError as error:
            return error

    def _read(self) -> LLTokenizer:
        if self._reader is None:
            self._reader = _reader(self._tokenizer, self._vocab, self._ends)
        return self._reader


class Grammar:
    def __init__(self, reader: LLTokenizer, grammar: str, vocab: int) -> None:
        self._first, self._vocab = LLMatcher(reader, grammar, log_level=0, limits=LIMITS), vocab
        self.start().mask()  # builds what all matchers share
        if self._first.is_error():
            raise RequestError(f"the grammar does not compile: {brief(self._first.get_error())}")

    def start(self) -> "Matcher":
        return Matcher(self._first.deep_copy(), self._vocab)


class Matcher:
    """One answer's place in its grammar. After an error nothing is allowed any more, and `error` says why."""

    def __init__(self, matcher: LLMatcher, vocab: int) -> None:
        self._matcher, self._words = matcher, (vocab + 31) // 32

    def mask(self) -> Tensor:
        """-> [ceil(vocab / 32)] int32, bit i % 32 of word i // 32 set where token i may come next."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.int32)[: self._words]
        return torch.zeros(self._words, dtype=torch.int32) if self._matcher.is_error() else bits

    def accept(self, token: int) -> None:
        if not self.finished:
            self._matcher.consume_token(token)

    @property
    def finished(self) -> bool:
        """Nothing more can come: the answer is whole, or an error ended it."""
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> str | None:
        return brief(self._matcher.get_error()) or None


def _grammar(kind: str, text: str) -> str:
    """-> as llguidance takes it."""
    if kind == "json_schema":
        return str(LLMatcher.grammar_from_json_schema(text))
    if kind == "regex":
        return str(LLMatcher.grammar_from_regex(text))
    return str(LLMatcher.grammar_from_lark(_lark(text) if kind == "gbnf" else text))


def _lark(text: str) -> str:
    try:
        return str(any_to_lark(text))
    except Exception as error:  # a converter written for sound input
        raise RequestError(f"the grammar (GBNF) cannot be read: {str(error)[:200]}") from error


def _reader(tokenizer: Any, vocab: int, ends: list[int]) -> LLTokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise RequestError(
            "structured outputs need the bytes of every token; this model's tokenizer does not tell them"
        )
    ends = ends or [tokenizer.eos_token_id]
    try:
        return LLTokenizer(backend.to_str(), n_vocab=max(vocab, len(tokenizer)), eos_token=ends)
    except ValueError as error:
        raise RequestError(f"structured outputs cannot use this model's tokenizer: {str(error)[:200]}") from error
