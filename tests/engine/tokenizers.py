"""Tokenizers for the tests of this folder: the byte-level one of the fixtures, and one with byte fallback made here."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

FIXTURE = Path(__file__).parents[2] / ".." / "shared" / "fixtures" / "_tokenizer" / "tokenizer.json"


@cache
def byte_level() -> Any:
    if not FIXTURE.is_file():
        pytest.skip(f"{FIXTURE} is not there")
    backend = Tokenizer.from_file(str(FIXTURE))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def byte_fallback() -> Any:
    """As SentencePiece models are: U+2581 for a space, 256 byte tokens, the first space of a text dropped."""
    pieces = [
        "▁",
        *"abcdefghijklmnopqrstuvwxyzé漢字😀.,",
        "▁the",
        "ing",
        "▁of",
        "nd",
        "漢字",
        "\N{REPLACEMENT CHARACTER}",
    ]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    backend = Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
