"""Log-probabilities in OpenAI's two shapes: the lists of plain completions, the objects of chat."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

LEAST = -9999.0  # what JSON gets for minus infinity

Texts = Callable[[int], str]


def number(value: float) -> float:
    return value if value > LEAST else LEAST


def text_of(token: int, found: Any, texts: Texts, as_ids: bool) -> str:
    if as_ids:
        return f"token_id:{token}"
    decoded = found.decoded_token if found is not None else None
    return decoded if decoded is not None else texts(token)


class Lists:
    """text_offset, token_logprobs, tokens, top_logprobs, over the prompt too where it is echoed."""

    def __init__(self, texts: Texts, as_ids: bool = False):
        self.texts, self.as_ids, self.offset = texts, as_ids, 0

    def of(self, tokens: Sequence[int], rows: Sequence[Mapping[int, Any] | None], top: int) -> dict[str, list[Any]]:
        """rows: for each token, the log-probabilities known there; None: the first token of a prompt."""
        found: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token, row in zip(tokens, rows, strict=True):
            own = row.get(token) if row else None
            text = text_of(token, own, self.texts, self.as_ids)
            found["text_offset"].append(self.offset)
            found["tokens"].append(text)
            found["token_logprobs"].append(None if own is None else number(own.logprob))
            found["top_logprobs"].append(None if not row else self._best(row, token, top))
            self.offset += len(text)
        return found

    def _best(self, row: Mapping[int, Any], token: int, top: int) -> dict[str, float]:
        """The likeliest and the one taken; where two tokens have one text, the likelier stands."""
        found: dict[str, float] = {}
        ranked = sorted(row.items(), key=lambda item: -item[1].logprob)
        for place, (one, value) in enumerate(ranked):
            if place < top or one == token:
                found.setdefault(text_of(one, value, self.texts, self.as_ids), number(value.logprob))
        return found


def objects(tokens: Sequence[int], rows: Sequence[Mapping[int, Any]], top: int, texts: Texts,
            as_ids: bool = False) -> list[dict[str, Any]]:  # fmt: skip
    """Chat's logprobs.content."""
    found = []
    for token, row in zip(tokens, rows, strict=True):
        ranked = sorted(row.items(), key=lambda item: -item[1].logprob)[:top]
        entry = _object(token, row[token], texts, as_ids)
        entry["top_logprobs"] = [_object(one, value, texts, as_ids) for one, value in ranked]
        found.append(entry)
    return found


def _object(token: int, value: Any, texts: Texts, as_ids: bool) -> dict[str, Any]:
    text = text_of(token, value, texts, as_ids)
    return {"token": text, "logprob": number(value.logprob), "bytes": list(text.encode("utf-8", "replace"))}


def prompt_rows(rows: Sequence[Mapping[int, Any] | None], texts: Texts) -> list[dict[str, Any] | None]:
    """vLLM's prompt_logprobs: by token id."""
    return [None if row is None else {
        str(token): {"logprob": number(v.logprob), "rank": v.rank, "decoded_token": text_of(token, v, texts, False)}
        for token, v in row.items()} for row in rows]  # fmt: skip
