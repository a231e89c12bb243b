"""How text is cut before byte-level merging: GGUF has a name for each way, tokenizer.json spells it out in steps."""

from collections.abc import Iterable
from typing import Any

from fewbit.errors import UnsupportedError

Json = dict[str, Any]
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
_CASED_WORD = r"\s?[\p{Lu}\p{Ll}\p{Lt}]+"  # DeepSeek spells these letters out, range by range
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
DEEPSEEK = (
    r"[\r\n]", _CASED_WORD, "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$", _HAN, DIGITS,
)  # fmt: skip
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, DIGITS)
_BY_STEPS: dict[tuple[str, ...], tuple[str, ...]] = {
    LLAMA3: ("llama-bpe", "llama3", "llama-v3", "chatglm-bpe", "glm4", "falcon3", "smaug-bpe", "dbrx", "pixtral"),
    QWEN2: ("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez", "grok-2", "kormo"),
    QWEN35: ("qwen35",),
    (GPT2,): ("gpt-2", "default", "mpt", "olmo", "phi-2", "jais", "trillion", "granite-docling", "jina-v2-code"),
    (DIGITS, GPT2): ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    TEKKEN: ("tekken",),
    GPT4O: ("gpt-4o", "llama4", "kanana2", "minimax-m2"),
    DEEPSEEK: ("deepseek-llm",),
    DEEPSEEK_CODER: ("deepseek-coder",),
    DEEPSEEK3: ("deepseek-v3", "joyai-llm", "hunyuan-dense"),
}  # fmt: skip
SPLITS = {name: steps for steps, names in _BY_STEPS.items() for name in names}
# a word that is a piece is taken whole, without merging
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")


def pre_tokenizer(steps: Iterable[str]) -> Json:
    """The steps as tokenizer.json says them."""
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    named: dict[str, Json] = {DIGITS: {"type": "Digits", "individual_digits": True}, GPT2: {**plain, "use_regex": True}}
    made = [
        named.get(step) or {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
        for step in steps
    ]
    made += [] if made[-1].get("use_regex") else [plain]
    return made[0] if len(made) == 1 else {"type": "Sequence", "pretokenizers": made}


def pre_name(data: Json) -> str:
    """The name for how a tokenizer.json cuts text."""
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
    step = str(pattern.get("Regex", pattern.get("String", kind))).replace("\r", r"\r").replace("\n", r"\n")
    return (_CASED_WORD if step.startswith("\\s?[A-Za-z\u00b5\u00c0-") else step,)
