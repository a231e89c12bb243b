"""Starting an engine: the model as asked for, its tokenizer, and what "auto" comes to on this machine."""

import gc
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fewbit import codecs
from fewbit.engine import proof
from fewbit.engine.config import EngineConfig
from fewbit.engine.runner import Alone, Paged, Runner
from fewbit.errors import CapacityError, CheckpointError, RequestError
from fewbit.models import build, hf
from fewbit.models.text import tokenizer as read_tokenizer
from fewbit.modules import paged
from fewbit.quant.formats import FORMATS

ONLINE = {"fp8": "fp8-tensor", "int8": "int8-channel-a8"}  # vLLM's names of what is quantized on arrival
CACHES: dict[str, torch.dtype | None] = {
    "auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
    "fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2,
}  # fmt: skip
DTYPES = {"auto": None, "half": "float16", "float": "float32"}
CPU_CACHE = 1 << 30  # bytes of KV cache on a CPU, of which only used pages are ever touched
CHANGING = ("dynamic", "longrope")  # kinds of rotary tables that depend on the longest text of a batch


@dataclass(slots=True)
class Loaded:
    """A model ready to run. ends: token ids that end a text."""

    model: Any
    tokenizer: Any
    device: torch.device
    cache_dtype: torch.dtype | None
    page: int
    ends: frozenset[int]
    vocab: int
    longest: int  # tokens that its positions reach

    @property
    def paged(self) -> bool:
        return hf.attention_of(self.model) == paged.NAME

    def runner(self, limits: "Limits") -> Runner:
        if not self.paged:
            return Alone(self.model, proof.cache_of(self.model.config))
        return Paged(self.model, limits.pages, self.page, self.cache_dtype, apart(self.model))

    def free(self) -> None:
        self.model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class Limits:
    max_len: int
    pages: int
    most_running: int
    budget: int  # tokens of a step


def load(config: EngineConfig) -> Loaded:
    if config.kv_cache_dtype not in CACHES:
        raise RequestError(f"kv_cache_dtype={config.kv_cache_dtype!r}: known are {', '.join(CACHES)}")
    device = torch.device(device_named(config.device))
    model: Any = build.load(
        config.model, device=device, dtype=DTYPES.get(config.dtype, config.dtype), kernels=config.kernels,
        activations=config.activations, format=online(config), trust_remote_code=config.trust_remote_code,
        attend=proof.attention,
    )  # fmt: skip
    try:
        tokenizer = read_tokenizer(config.tokenizer or config.model)
    except CheckpointError:
        if config.tokenizer:
            raise
        tokenizer = None  # token ids in, token ids out
    text = model.config.get_text_config()
    return Loaded(model, tokenizer, device, CACHES[config.kv_cache_dtype], config.block_size, ends(model, tokenizer),
                  text.vocab_size, int(getattr(text, "max_position_embeddings", None) or 1 << 20))  # fmt: skip


def device_named(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def online(config: EngineConfig) -> str | None:
    """What `quantization` means for this checkpoint: nothing more than a check where it is quantized already."""
    asked = config.quantization
    if asked is None:
        return None
    with codecs.open(config.model) as source:
        dialect, quantized = source.dialect, bool(source.modules)
    plain = asked.lower().replace("_", "-")
    if quantized:
        if plain.removesuffix("-marlin") != dialect:
            raise RequestError(f"quantization={asked!r}: {config.model} is {dialect}; leave it out, or say that")
        return None
    row = ONLINE.get(plain, plain)
    if row not in FORMATS:
        raise RequestError(f"quantization={asked!r}: {config.model} is not quantized, and there is no such format to "
                           f"quantize it to; known: {', '.join([*ONLINE, *FORMATS])}")  # fmt: skip
    return row


def ends(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        value = getattr(holder, "eos_token_id", None)
        found |= {value} if isinstance(value, int) else set(value or ())
    return frozenset(found)


def apart(model: Any) -> bool:
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(v for v in rope.values() if isinstance(v, dict))]
    return any(kind.get("rope_type") in CHANGING for kind in kinds)


def limits_of(config: EngineConfig, loaded: Loaded) -> Limits:
    """How long a text may be, how many pages there are, how many requests run."""
    size, cpu = config.block_size, loaded.device.type == "cpu"
    most_running = config.max_num_seqs or (64 if cpu else 256)
    budget = max(config.max_num_batched_tokens or (512 if cpu else 8192), most_running)
    asked = config.max_model_len or loaded.longest
    if config.max_model_len and config.max_model_len > loaded.longest:
        raise RequestError(f"max_model_len={config.max_model_len}: the model's positions reach {loaded.longest}")
    if not loaded.paged:
        return Limits(asked, most_running * -(-asked // size), most_running, budget)
    token = Paged(loaded.model, 1, size, loaded.cache_dtype).slot_bytes()
    room = config.kv_cache_memory_bytes or cache_room(config, loaded.device)
    pages = min(room // (token * size), most_running * -(-asked // size))
    if pages * size < asked:
        if config.max_model_len or pages * size < 2:
            need, got = asked * token, pages * size
            raise CapacityError(f"max_model_len={asked} needs {need} bytes of KV cache, and there is room for {room}: "
                                f"{got} tokens. Give a smaller max_model_len, or more memory")  # fmt: skip
        asked = pages * size
    return Limits(asked, pages, most_running, budget)


def cache_room(config: EngineConfig, device: torch.device) -> int:
    """Bytes for the KV cache."""
    if device.type != "cuda":
        return min(CPU_CACHE, available() // 2)
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(free - total * (1 - config.gpu_memory_utilization)))


def available() -> int:
    """Bytes of memory that could be had now."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
