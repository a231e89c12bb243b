"""tokenizer.ggml.* from a tokenizer.json: pieces by id, their types, and merges, or scores that order them."""

import json
import re
from collections.abc import Mapping
from typing import Any

from fewbit.codecs.gguf_splits import pre_name
from fewbit.codecs.gguf_tokenizer import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER, WORDS
from fewbit.errors import CheckpointError, UnsupportedError

Json = dict[str, Any]


def tokenizer_kv(files: Mapping[str, bytes], size: int) -> dict[str, tuple[str, Any]]:
    """tokenizer.json and its companions -> tokenizer.ggml.* for a vocabulary of `size` rows."""
    if "tokenizer.json" not in files:
        kept = [name for name in files if name.startswith(("tokenizer", "vocab", "merges", "spiece"))]
        if not kept:
            return {"tokenizer.ggml.model": ("string", "none")}
        reasons = [f"found: {', '.join(kept)}", "tokenizer.json is what can be read"]
        raise UnsupportedError("a GGUF file carries its tokenizer, and this one cannot be written", reasons)
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
        byte = fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", piece)
        kind = BYTE if byte else UNKNOWN if piece == unk else UNUSED if piece == f"[PAD{i}]" else NORMAL
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
        pre = pre_name(data)
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
