"""Tokenizers rebuilt from GGUF metadata, against transformers' reading of the same file; and written back."""

import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from fewbit import codecs
from fewbit.codecs.gguf_splits import SPLITS
from fewbit.codecs.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, USER
from fewbit.codecs.gguf_vocabulary import tokenizer_kv
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.files.gguf import open_gguf
from tests import real
from tests.codecs.ggufs import VOCAB, Kv, Raw, alphabet, llama, rewrite, tokenizer

TEXT = Path(__file__).parents[3] / "shared" / "text" / "eval_public.txt"
SAMPLES = (
    "the other inner hen", "Hello  world 12345 \n\n\t\t x  y   z", "", " ", "a\r\nb", "é漢字🙂", "don't I'LL 3.14159",
    "<think> the </think>", "<s>the</s>", "def f(x):\n    return x+1  # the\n", "x" * 300,
)  # fmt: skip
quiet = pytest.mark.filterwarnings("ignore")
newest = pytest.mark.skipif(version("transformers") < "5.23", reason="the oracle: older ones split text in other ways")


def files_of(path: Path) -> dict[str, bytes]:
    with codecs.open(path) as source:
        assert source.tokenizer is not None
        return dict(source.tokenizer)


def rebuilt(path: Path) -> Tokenizer:
    return Tokenizer.from_str(files_of(path)["tokenizer.json"].decode())


def theirs(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def agree(path: Path, texts: tuple[str, ...]) -> None:
    mine, other = rebuilt(path), theirs(path)
    for text in texts:
        ids = mine.encode(text).ids
        assert ids == other(text)["input_ids"], text[:80]
        assert mine.decode(ids, skip_special_tokens=False) == other.decode(ids), text[:80]


def with_pre(name: str) -> Callable[[Kv, Raw], None]:
    return lambda kv, tensors: kv.update({"tokenizer.ggml.pre": ("string", name)})


@quiet
@newest
@pytest.mark.parametrize("pre", ["default", "gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o", "qwen35"])
def test_byte_level_agrees_with_transformers(pre: str, tmp_path: Path) -> None:
    path = rewrite(llama(tmp_path / "a.gguf"), tmp_path / "b.gguf", with_pre(pre))
    agree(path, SAMPLES)


@newest
def test_splits_are_transformers() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    shared = SPLITS.keys() & GGUF_PRE_TOKENIZER_SPLITS.keys()
    assert len(shared) >= 12
    for name in shared:
        assert SPLITS[name] == (GGUF_PRE_TOKENIZER_SPLITS[name],), name


def sentencepiece(prefix: bool) -> Callable[[Kv, Raw], None]:
    """A vocabulary with scores instead of merges."""
    words = ["▁", *"theionr", "▁t", "he", "▁the", "in", "er", "▁in", "inn", "inner"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "<think>", "    ", *words]
    pieces += [f"[PAD{i}]" for i in range(len(pieces), VOCAB)]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, USER, USER, *[NORMAL] * len(words)]
    types += [5] * (VOCAB - len(types))

    def change(kv: Kv, tensors: Raw) -> None:
        kv.pop("tokenizer.ggml.merges", None)
        kv |= {
            "tokenizer.ggml.model": ("string", "llama"),
            "tokenizer.ggml.tokens": ("[string]", pieces),
            "tokenizer.ggml.token_type": ("[i32]", types),
            "tokenizer.ggml.scores": ("[f32]", [-float(i) for i in range(VOCAB)]),
            "tokenizer.ggml.add_space_prefix": ("bool", prefix),
            "tokenizer.ggml.add_bos_token": ("bool", True),
            "tokenizer.ggml.unknown_token_id": ("u32", 0),
            "tokenizer.ggml.padding_token_id": ("u32", 2),
        }

    return change


@newest
@quiet
def test_sentencepiece_agrees_with_transformers(tmp_path: Path) -> None:
    path = rewrite(llama(tmp_path / "a.gguf"), tmp_path / "b.gguf", sentencepiece(prefix=True))
    agree(path, ("the inner inn", "then the other thing", "é漢字🙂", "tin tin", "in"))


def test_sentencepiece_by_hand(tmp_path: Path) -> None:
    """Best score first; a space before the text; bytes for what no piece holds."""
    path = rewrite(llama(tmp_path / "a.gguf"), tmp_path / "b.gguf", sentencepiece(prefix=True))
    mine = rebuilt(path)
    assert mine.encode("the inner").tokens == ["<s>", "▁the", "▁in", "n", "er"]
    assert mine.encode("t!").tokens == ["<s>", "▁t", "<0x21>"]
    assert mine.encode("the    tin").tokens == ["<s>", "▁the", "    ", "▁t", "in"]  # llama.cpp's way after a piece
    assert mine.decode(mine.encode("the é").ids) == "the é"
    bare = rebuilt(rewrite(path, tmp_path / "c.gguf", sentencepiece(prefix=False)))
    assert bare.encode("the").tokens == ["<s>", "t", "he"]


def test_what_the_metadata_says_is_in_the_config(tmp_path: Path) -> None:
    def change(kv: Kv, tensors: Raw) -> None:
        kv["tokenizer.ggml.add_bos_token"] = "bool", True
        kv["tokenizer.ggml.add_eos_token"] = "bool", True
        kv["tokenizer.chat_template.tools"] = "string", "{{ tools }}"

    path = rewrite(llama(tmp_path / "a.gguf"), tmp_path / "b.gguf", change)
    config = json.loads(files_of(path)["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == ("<s>", "</s>", "<pad>")
    assert config["model_max_length"] == 256
    assert [t["name"] for t in config["chat_template"]] == ["default", "tools"]
    mine = rebuilt(path)
    assert mine.encode("the").tokens == ["<s>", "t", "he", "</s>"]
    assert mine.encode("a<think>b", add_special_tokens=False).tokens == ["a", "<think>", "b"]
    assert mine.decode(mine.encode("a<think>b").ids) == "a<think>b"


@quiet
def test_the_rebuilt_files_are_a_transformers_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = llama(tmp_path / "a.gguf")
    for name, data in files_of(path).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    folder = AutoTokenizer.from_pretrained(tmp_path)
    for text in SAMPLES:
        assert folder(text)["input_ids"] == rebuilt(path).encode(text).ids
    assert folder.chat_template == "{{ messages }}"


@quiet
@pytest.mark.parametrize("model", ["smollm2", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_real_vocabularies_agree_with_transformers(model: str) -> None:
    path = getattr(real, model)()
    texts = (TEXT.read_text(),) if TEXT.exists() else ()
    agree(path, (*SAMPLES[:-1], *texts))


# back again


class Held:
    """Metadata as if it came from a file."""

    def __init__(self, kv: Kv):
        self.path, self.kv = Path("x.gguf"), {key: value for key, (_, value) in kv.items()}

    def kv_value(self, key: str, *kinds: str) -> Any:
        return self.kv[key]

    kv_array = kv_value


@pytest.mark.parametrize(
    "pre", ["gpt-2", "llama-bpe", "qwen2", "smollm", "deepseek-v3", "deepseek-llm", "deepseek-coder", "tekken"]
)
def test_byte_level_is_written_back(pre: str, tmp_path: Path) -> None:
    path = rewrite(llama(tmp_path / "a.gguf"), tmp_path / "b.gguf", with_pre(pre))
    written = tokenizer_kv(files_of(path), VOCAB)
    with open_gguf(path) as file:
        kv = {key: value for key, value in file.typed_kv().items() if key.startswith("tokenizer.")}
    assert written == kv


def test_sentencepiece_is_written_back(tmp_path: Path) -> None:
    from fewbit.codecs.gguf_tokenizer import Rebuilt

    path = rewrite(llama(tmp_path / "a.gguf"), tmp_path / "b.gguf", sentencepiece(prefix=True))
    written = tokenizer_kv(files_of(path), VOCAB)
    assert written["tokenizer.ggml.model"] == ("string", "llama")
    assert written["tokenizer.ggml.add_space_prefix"] == ("bool", True)
    again = Tokenizer.from_str(Rebuilt(Held(written))["tokenizer.json"].decode())  # type: ignore[arg-type]
    for text in ("the inner inn", "é 漢", "the    tin<think>"):
        assert again.encode(text).tokens == rebuilt(path).encode(text).tokens


def test_deepseeks_spelled_out_letters_are_known() -> None:
    def spell(data: dict[str, Any]) -> None:
        steps = [s for s in SPLITS["deepseek-llm"] if s != "<digits>"]
        steps[:2] = ["[\r\n]", "\\s?[A-Za-zµÀ-ÖØ-öø-ƺ]+"]
        cut = [{"type": "Split", "pattern": {"Regex": s}, "behavior": "Isolated", "invert": False} for s in steps]
        cut += [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": False}]
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": cut}

    assert tokenizer_kv(edited(spell), VOCAB)["tokenizer.ggml.pre"] == ("string", "deepseek-llm")


def edited(change: Callable[[dict[str, Any]], None]) -> Mapping[str, bytes]:
    data = json.loads(tokenizer()["tokenizer.json"])
    change(data)
    return {**tokenizer(), "tokenizer.json": json.dumps(data).encode()}


def test_what_cannot_be_written() -> None:
    cases: list[tuple[Callable[[dict[str, Any]], None], str]] = [
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "no name for how it cuts text(.|\n)*Whitespace"),
        (lambda d: d["model"].update(type="Unigram"), "'Unigram' has no place"),
        (
            lambda d: d["added_tokens"].append({"id": 999, "content": "<x>", "special": True}),
            "id 999, and the embedding",
        ),
    ]
    for change, text in cases:
        with pytest.raises((UnsupportedError, CheckpointError), match=text):
            tokenizer_kv(edited(change), VOCAB)


def test_gaps_are_filled_and_types_told() -> None:
    kv = tokenizer_kv(tokenizer(), VOCAB)
    pieces, types = kv["tokenizer.ggml.tokens"][1], kv["tokenizer.ggml.token_type"][1]
    assert pieces[-1] == f"[PAD{VOCAB - 1}]"
    assert types[:4] == [CONTROL, CONTROL, CONTROL, NORMAL]
    assert types[pieces.index("<think>")] == USER
    assert types[-1] == 5
    assert len(set(pieces)) == VOCAB
    assert set(alphabet()) < set(pieces)


# what lies


def bad_merge(kv: Kv, tensors: Raw) -> None:
    kv["tokenizer.ggml.merges"] = "[string]", ["Ġ t", "q u i"]


def unknown_model(kv: Kv, tensors: Raw) -> None:
    kv["tokenizer.ggml.model"] = "string", "rwkv"


def no_scores(kv: Kv, tensors: Raw) -> None:
    sentencepiece(True)(kv, tensors)
    kv.pop("tokenizer.ggml.scores")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (with_pre("cuneiform"), r"'tokenizer.ggml.pre': 'cuneiform' is not known(.|\n)*llama-bpe"),
        (unknown_model, r"'tokenizer.ggml.model': 'rwkv' is not read(.|\n)*gpt2"),
        (bad_merge, r"'tokenizer.ggml.merges': entry 1"),
        (no_scores, r"'tokenizer.ggml.scores' is missing"),
    ],
)
def test_bad_vocabularies_fail_where_they_are_used(change: Any, text: str, tmp_path: Path) -> None:
    """The weights load without them."""
    path = rewrite(llama(tmp_path / "a.gguf"), tmp_path / "b.gguf", change)
    with codecs.open(path) as source:
        assert source.dense
        assert source.tokenizer is not None
        with pytest.raises((UnsupportedError, CheckpointError), match=text):
            source.tokenizer["tokenizer.json"]


def test_no_vocabulary_is_no_tokenizer(tmp_path: Path) -> None:
    def strip(kv: Kv, tensors: Raw) -> None:
        for key in [key for key in kv if key.startswith("tokenizer.")]:
            del kv[key]

    with codecs.open(rewrite(llama(tmp_path / "a.gguf"), tmp_path / "b.gguf", strip)) as source:
        assert source.tokenizer is None
