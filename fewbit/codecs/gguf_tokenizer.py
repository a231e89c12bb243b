"""tokenizer.json and tokenizer_config.json from GGUF metadata.

A GGUF keeps the pieces, their types, and merges or scores; how text is cut before merging is a name (`pre`), which
stands for a row of gguf_splits. Byte-level BPE is model `gpt2`, SentencePiece BPE with byte fallback is `llama`.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fewbit.codecs.gguf_splits import SPLITS, WHOLE_WORDS, pre_tokenizer
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.files.gguf import GGUFFile

Json = dict[str, Any]
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # token types
SPACE = "\u2581"
COMPOSED = ("qwen2", "qwen35", "deepseek-r1-qwen")  # text is put in Unicode's composed form first
WORDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


class Rebuilt(Mapping[str, bytes]):
    """The tokenizer files of a GGUF, made when first asked for: a large vocabulary takes seconds."""

    def __init__(self, file: GGUFFile):
        self._file = file
        self._made: dict[str, bytes] = {}

    def __getitem__(self, name: str) -> bytes:
        if not self._made:
            vocabulary = Vocabulary(self._file)
            files = {"tokenizer.json": vocabulary.tokenizer(), "tokenizer_config.json": vocabulary.config()}
            self._made = {n: json.dumps(v, ensure_ascii=False).encode() for n, v in files.items()}
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(("tokenizer.json", "tokenizer_config.json"))

    def __len__(self) -> int:
        return 2


def tokenizer_files(file: GGUFFile) -> Mapping[str, bytes] | None:
    """None when the file holds no vocabulary."""
    held = file.kv.get("tokenizer.ggml.tokens") and file.kv.get("tokenizer.ggml.model") not in (
        None,
        "no_vocab",
        "none",
    )
    return Rebuilt(file) if held else None


class Vocabulary:
    """The vocabulary of one file."""

    def __init__(self, file: GGUFFile):
        self.file = file
        self.model = str(file.kv_value("tokenizer.ggml.model", "string"))
        self.pieces: list[str] = file.kv_array("tokenizer.ggml.tokens", "string")
        types = file.kv.get("tokenizer.ggml.token_type")
        self.types: list[int] = types if types is not None else [NORMAL] * len(self.pieces)

    def get(self, name: str, default: Any = None) -> Any:
        return self.file.kv.get(f"tokenizer.ggml.{name}", default)

    def tokenizer(self) -> Json:
        makers = {"gpt2": self._byte_level, "llama": self._sentencepiece}
        if self.model not in makers:
            key = f"{self.file.path}: key 'tokenizer.ggml.model': {self.model!r} is not read"
            raise UnsupportedError(
                key, [f"known: {', '.join(makers)}", "the weights load; tokens must come from elsewhere"]
            )
        parts = makers[self.model]()
        return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": self._added(parts), **parts}

    def config(self) -> Json:
        """tokenizer_config.json."""
        special = {f"{word}_token": self._special(name) for word, name in WORDS.items()}
        bos, eos = self._ends()
        out: Json = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        out |= {**special, "add_bos_token": bos, "add_eos_token": eos}
        length = self.file.kv.get(f"{self.file.kv.get('general.architecture')}.context_length")
        out |= {"model_max_length": length} if isinstance(length, int) else {}
        templates = self._templates()
        return out | ({"chat_template": templates} if templates else {})

    def _templates(self) -> str | list[Json] | None:
        """The chat template, or all of them by name where there are several."""
        default = self.file.kv.get("tokenizer.chat_template")
        prefix = "tokenizer.chat_template."
        named = {key.removeprefix(prefix): value for key, value in self.file.kv.items() if key.startswith(prefix)}
        if not named:
            return str(default) if default else None
        every = {**({"default": default} if default else {}), **named}
        return [{"name": name, "template": text} for name, text in every.items()]

    def _special(self, name: str) -> str | None:
        number = self.get(f"{name}_token_id")
        return self.pieces[number] if isinstance(number, int) and 0 <= number < len(self.pieces) else None

    def _ends(self) -> tuple[bool, bool]:
        """Whether a text begins with bos and ends with eos; files that do not say follow their model's habit."""
        habit = self.model == "llama" or self.get("pre") in ("llama-bpe", "llama3", "llama-v3", "tekken")
        bos = bool(self.get("add_bos_token", habit)) and self._special("bos") is not None
        return bos, bool(self.get("add_eos_token", False)) and self._special("eos") is not None

    def _added(self, parts: Json) -> list[Json]:
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        vocab = parts["model"]["vocab"]
        return [
            {"id": i, "content": piece, **plain, "special": kind != USER}
            for i, (piece, kind) in enumerate(zip(self.pieces, self.types, strict=True))
            if (kind in (CONTROL, USER) and piece in vocab) or (kind == UNKNOWN and self.model == "llama")
        ]

    def _byte_level(self) -> Json:
        pre = str(self.get("pre", "default"))
        if pre not in SPLITS:
            key = f"{self.file.path}: key 'tokenizer.ggml.pre': {pre!r} is not known"
            raise UnsupportedError(
                key, [f"known: {', '.join(SPLITS)}", "cutting text in another way gives other tokens"]
            )
        vocab = {piece: i for i, piece in enumerate(self.pieces)}
        model = {"type": "BPE", "unk_token": None, "byte_fallback": False, "ignore_merges": pre in WHOLE_WORDS}
        last: Json = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
        return {
            "normalizer": {"type": "NFC"} if pre in COMPOSED else None,
            "pre_tokenizer": pre_tokenizer(SPLITS[pre]),
            "post_processor": self._post_processor(last),
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {**_BPE, **model, "vocab": vocab, "merges": self._given_merges(vocab)},
        }

    def _sentencepiece(self) -> Json:
        """Spaces become a visible mark; pieces merge by score; what is left falls back to bytes."""
        prefix = bool(self.get("add_space_prefix", True))
        pieces = _marked(self.pieces)
        vocab = {piece: i for i, piece in enumerate(pieces)}
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
        decoders: list[Json] = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
        strip: Json = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        unk = next((p for p, kind in zip(pieces, self.types, strict=True) if kind == UNKNOWN), self._special("unknown"))
        given = self.get("merges") is not None
        merges = self._given_merges(vocab) if given else merges_of(pieces, self._scores(), self.types)
        model = {"type": "BPE", "unk_token": unk, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
        normalizers = [{"type": "Prepend", "prepend": SPACE}, replace] if prefix else [replace]
        return {
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": None,
            "post_processor": self._post_processor(None),
            "decoder": {"type": "Sequence", "decoders": [*decoders, strip] if prefix else decoders},
            "model": {**_BPE, **model, "vocab": vocab, "merges": merges},
        }

    def _scores(self) -> list[float]:
        scores = self.get("scores")
        if scores is None:
            raise CheckpointError(f"{self.file.path}: key 'tokenizer.ggml.scores' is missing, and so are merges")
        return list(scores)

    def _given_merges(self, vocab: Mapping[str, int]) -> list[list[str]]:
        merges = [merge.split(" ") for merge in self.file.kv_array("tokenizer.ggml.merges", "string")]
        for i, merge in enumerate(merges):
            if len(merge) != 2 or merge[0] not in vocab or merge[1] not in vocab or "".join(merge) not in vocab:
                what = "is not two pieces of the vocabulary that make a third"
                raise CheckpointError(f"{self.file.path}: key 'tokenizer.ggml.merges': entry {i} {merge!r} {what}")
        return merges

    def _post_processor(self, byte_level: Json | None) -> Json | None:
        bos, eos = self._ends()
        if not bos and not eos:
            return byte_level
        first, last = self._special("bos") or "", self._special("eos") or ""
        template = _template(first if bos else "", last if eos else "", self.pieces)
        return {"type": "Sequence", "processors": [byte_level, template]} if byte_level else template


def _marked(pieces: list[str]) -> list[str]:
    """Runs of spaces under their visible mark, where shorter runs can be merged to them."""
    runs = {len(p) for p in pieces if p and set(p) == {" "}} | {1}
    built = {n for n in runs if any(k in runs and n - k in runs for k in range(1, n))}
    return [SPACE * len(p) if p and set(p) == {" "} and len(p) in built else p for p in pieces]


_BPE = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False}


def _template(bos: str, eos: str, pieces: list[str]) -> Json:
    def sequence(name: str, number: int) -> list[Json]:
        parts: list[Json] = [{"Sequence": {"id": name, "type_id": number}}]
        before: list[Json] = [{"SpecialToken": {"id": bos, "type_id": number}}] if bos else []
        after: list[Json] = [{"SpecialToken": {"id": eos, "type_id": number}}] if eos else []
        return [*before, *parts, *after]

    tokens = {t: {"id": t, "ids": [pieces.index(t)], "tokens": [t]} for t in (bos, eos) if t}
    single, pair = sequence("A", 0), [*sequence("A", 0), *sequence("B", 1)]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


def merges_of(pieces: list[str], scores: list[float], types: list[int]) -> list[list[str]]:
    """Every way to make a piece of two others, best piece first; pieces a user defined go before all."""
    joinable = {p for p, kind in zip(pieces, types, strict=True) if kind in (NORMAL, USER)}
    order = [i for i, p in enumerate(pieces) if p in joinable]
    order.sort(key=lambda i: (0, i) if types[i] == USER else (1, -scores[i]))
    cuts = ((pieces[i][:at], pieces[i][at:]) for i in order for at in range(1, len(pieces[i])))
    return [[left, right] for left, right in cuts if left in joinable and right in joinable]
