"""tokenizer.json and tokenizer_config.json from GGUF metadata, and back.

A GGUF keeps the pieces, their types, and merges or scores; how text is cut before merging is a name (`pre`), which
stands for a row of SPLITS here. Byte-level BPE is model `gpt2`, SentencePiece BPE with byte fallback is `llama`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.files.gguf import GGUFFile

Json = dict[str, Any]
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # token types
SPACE = "\u2581"
GPT2, DIGITS = "<gpt2>", "<digits>"  # steps that tokenizers has a name for
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = (rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}{_REST}",)
QWEN2 = (rf"{_ENDINGS}|{_WORDS}|\p{{N}}{_REST}",)
TEKKEN = (rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}{_CASED_REST}",)
GPT4O = (rf"{_CASED[0]}{_ENDINGS}?|{_CASED[1]}{_ENDINGS}?|\p{{N}}{{1,3}}{_CASED_REST}",)
QWEN35 = (
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_BY_STEPS: dict[tuple[str, ...], tuple[str, ...]] = {
    LLAMA3: ("llama-bpe", "llama3", "llama-v3", "chatglm-bpe", "glm4", "falcon3", "smaug-bpe", "dbrx", "pixtral"),
    QWEN2: ("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez", "grok-2", "kormo"),
    QWEN35: ("qwen35",),
    (GPT2,): ("gpt-2", "default", "mpt", "olmo", "phi-2", "jais", "trillion", "granite-docling", "jina-v2-code"),
    (DIGITS, GPT2): ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    TEKKEN: ("tekken",),
    GPT4O: ("gpt-4o", "llama4", "kanana2", "minimax-m2"),
    DEEPSEEK3: ("deepseek-v3", "joyai-llm", "hunyuan-dense"),
}  # fmt: skip
SPLITS = {name: steps for steps, names in _BY_STEPS.items() for name in names}
WHOLE_WORDS = (
    "llama-bpe",
    "llama3",
    "llama-v3",
    "falcon3",
    "pixtral",
    "lfm2",
    "tekken",
)  # a known word needs no merges
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
            "pre_tokenizer": _pre_tokenizer(SPLITS[pre]),
            "post_processor": self._post_processor(last),
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {**_BPE, **model, "vocab": vocab, "merges": self._given_merges(vocab)},
        }

    def _sentencepiece(self) -> Json:
        """Spaces become a visible mark; pieces merge by score; what is left falls back to bytes."""
        prefix = bool(self.get("add_space_prefix", True))
        pieces = [SPACE * len(p) if p.isspace() and set(p) == {" "} else p for p in self.pieces]
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


_BPE = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False}


def _pre_tokenizer(steps: Iterable[str]) -> Json:
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    named: dict[str, Json] = {DIGITS: {"type": "Digits", "individual_digits": True}, GPT2: {**plain, "use_regex": True}}
    made = [
        named.get(step) or {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
        for step in steps
    ]
    made += [] if made[-1].get("use_regex") else [plain]
    return made[0] if len(made) == 1 else {"type": "Sequence", "pretokenizers": made}


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


def tokenizer_kv(files: Mapping[str, bytes], size: int) -> dict[str, tuple[str, Any]]:
    """tokenizer.json and its companions -> tokenizer.ggml.* for a vocabulary of `size` rows."""
    if "tokenizer.json" not in files:
        reasons = [f"found: {', '.join(files) or 'no tokenizer file'}", "tokenizer.json is what can be read"]
        raise UnsupportedError("a GGUF file carries its tokenizer, and there is none to write", reasons)
    data = json.loads(files["tokenizer.json"])
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    maker = {"BPE": _bpe_kv}.get(data["model"].get("type", "BPE"))
    if maker is None:
        kind = data["model"].get("type")
        raise UnsupportedError(f"tokenizer.json: model {kind!r} has no place in a GGUF file", ["BPE has"])
    kv = maker(data, *_pieces(data, size))
    ids = {p: i for i, p in enumerate(kv["tokenizer.ggml.tokens"][1])}
    for word, name in WORDS.items():
        token = config.get(f"{word}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            kv[f"tokenizer.ggml.{name}_token_id"] = ("u32", ids[token])
    return kv | _chat_kv(files, config)


def _chat_kv(files: Mapping[str, bytes], config: Json) -> dict[str, tuple[str, Any]]:
    template = config.get("chat_template") or files.get("chat_template.jinja", b"").decode()
    if isinstance(template, str):
        return {"tokenizer.chat_template": ("string", template)} if template else {}
    named = {entry["name"]: entry["template"] for entry in template}
    keys = {n: "tokenizer.chat_template" + ("" if n == "default" else f".{n}") for n in named}
    return {keys[n]: ("string", text) for n, text in named.items()}


def _pieces(data: Json, size: int) -> tuple[list[str], list[int]]:
    """Pieces by id, gaps filled, and their types."""
    vocab: dict[str, int] = data["model"]["vocab"]
    pieces = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    fallback = data["model"].get("byte_fallback")
    unk = data["model"].get("unk_token")
    for piece, i in vocab.items():
        kind = BYTE if fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", piece) else UNKNOWN if piece == unk else NORMAL
        _set(pieces, types, i, piece, kind)
    for token in data.get("added_tokens", []):
        text = token["content"].replace(SPACE, " ") if fallback and not token["special"] else token["content"]
        kind = UNKNOWN if token["content"] == unk and fallback else CONTROL if token["special"] else USER
        _set(pieces, types, token["id"], text, kind)
    return pieces, types


def _set(pieces: list[str], types: list[int], i: int, piece: str, kind: int) -> None:
    if i >= len(pieces):
        raise CheckpointError(f"tokenizer.json: token {piece!r} has id {i}, and the embedding has {len(pieces)} rows")
    pieces[i], types[i] = piece, kind


def _bpe_kv(data: Json, pieces: list[str], types: list[int]) -> dict[str, tuple[str, Any]]:
    model = data["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    bos, eos = _ends_of(data.get("post_processor"))
    kv: dict[str, tuple[str, Any]] = {
        "tokenizer.ggml.tokens": ("[string]", pieces),
        "tokenizer.ggml.token_type": ("[i32]", types),
        "tokenizer.ggml.add_bos_token": ("bool", bos),
        "tokenizer.ggml.add_eos_token": ("bool", eos),
    }
    if not model.get("byte_fallback"):
        pre = _pre_name(data)
        kv |= {"tokenizer.ggml.model": ("string", "gpt2"), "tokenizer.ggml.pre": ("string", pre)}
        return kv | {"tokenizer.ggml.merges": ("[string]", merges)}
    prefix = SPACE in json.dumps(data.get("normalizer"), ensure_ascii=False) and _prepends(data)
    kv |= {"tokenizer.ggml.model": ("string", "llama"), "tokenizer.ggml.pre": ("string", "default")}
    kv |= {"tokenizer.ggml.add_space_prefix": ("bool", prefix)}
    return kv | {"tokenizer.ggml.scores": ("[f32]", _scores_of(model, pieces))}


def _scores_of(model: Json, pieces: list[str]) -> list[float]:
    """The rank of the first merge that makes a piece, negated; what no merge makes goes last."""
    ranks: dict[str, int] = {}
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, len(ranks))
    return [-float(ranks.get(piece, len(ranks) + i)) for i, piece in enumerate(pieces)]


def _prepends(data: Json) -> bool:
    text = json.dumps([data.get("normalizer"), data.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _ends_of(processor: Json | None) -> tuple[bool, bool]:
    """Whether a post-processor adds a token before and after a text."""
    if processor is None:
        return False, False
    if processor["type"] == "Sequence":
        found = [_ends_of(p) for p in processor["processors"]]
        return any(f[0] for f in found), any(f[1] for f in found)
    single = processor.get("single", [])
    return bool(single) and "SpecialToken" in single[0], bool(single) and "SpecialToken" in single[-1]


def _pre_name(data: Json) -> str:
    steps = _steps(data.get("pre_tokenizer"))
    names = [name for name, known in SPLITS.items() if known == steps]
    if not names:
        reasons = [f"found: {steps}", f"known: {', '.join(SPLITS)}"]
        raise UnsupportedError("tokenizer.json: pre_tokenizer: a GGUF file has no name for how it cuts text", reasons)
    whole = bool(data["model"].get("ignore_merges"))
    return next((name for name in names if (name in WHOLE_WORDS) == whole), names[0])


def _steps(pre: Json | None) -> tuple[str, ...]:
    if pre is None:
        return ()
    kind = pre["type"]
    if kind == "Sequence":
        return tuple(step for part in pre["pretokenizers"] for step in _steps(part))
    if kind == "ByteLevel":
        return (GPT2,) if pre.get("use_regex", True) else ()
    if kind == "Digits" and pre.get("individual_digits"):
        return (DIGITS,)
    pattern = pre.get("pattern", {})
    return (str(pattern.get("Regex", pattern.get("String", kind))),)
