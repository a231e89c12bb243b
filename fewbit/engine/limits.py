"""Limits: how long a text may be, how many pages of cache there are, how many requests run; "auto" on this machine.

On a GPU the room for the cache is what a step of the largest size leaves: it is run once, and looked at.
"""

import os
from dataclasses import dataclass

import torch

from fewbit.engine.config import EngineConfig
from fewbit.engine.params import SamplingParams
from fewbit.engine.request import Request, Stream
from fewbit.engine.runner import Paged
from fewbit.engine.scheduler import Work
from fewbit.engine.start import Loaded, apart
from fewbit.errors import CapacityError, RequestError

CPU_CACHE = 1 << 30  # bytes of KV cache on a CPU, of which only used pages are ever touched
GRAPHS = 3 << 30  # bytes left on a GPU for CUDA graphs and for what a sampler needs
LARGE = 70 << 30  # bytes of a GPU that four times as many requests share, as under vLLM


@dataclass(frozen=True, slots=True)
class Limits:
    max_len: int
    pages: int
    most_running: int
    budget: int  # tokens of a step
    token: int = 0  # bytes of KV cache that one takes on this rank; 0: no pages are kept


def running(config: EngineConfig, loaded: Loaded) -> int:
    """Most requests at once. Those of a runner without pages have caches that nothing bounds."""
    if config.max_num_seqs:
        return config.max_num_seqs
    if loaded.device.type == "cpu":
        return 64
    _, total = torch.cuda.mem_get_info(loaded.device)
    return 1024 if loaded.paged and total >= LARGE else 256


def budget(config: EngineConfig, loaded: Loaded) -> int:
    """Tokens of a step."""
    asked = config.max_num_batched_tokens or (512 if loaded.device.type == "cpu" else 8192)
    return max(asked, running(config, loaded))


def limits_of(config: EngineConfig, loaded: Loaded) -> Limits:
    """How long a text may be, how many pages there are, how many requests run."""
    size, most_running, most = config.block_size, running(config, loaded), budget(config, loaded)
    asked = config.max_model_len or loaded.longest
    if config.max_model_len and config.max_model_len > loaded.longest:
        raise RequestError(f"max_model_len={config.max_model_len}: the model's positions reach {loaded.longest}")
    if not loaded.paged:
        return Limits(asked, most_running * -(-asked // size), most_running, most)
    each = [measured(config, loaded)] if loaded.team is None else loaded.team.measure(lambda: measured(config, loaded))
    token, room = min(each, key=lambda rank: rank[1] // rank[0])
    pages = min(room // (token * size), most_running * -(-asked // size))
    if pages * size < asked:
        if config.max_model_len or pages * size < 2:
            need, got = asked * token, pages * size
            raise CapacityError(f"max_model_len={asked} needs {need} bytes of KV cache, and there is room for {room}: "
                                f"{got} tokens. Give a smaller max_model_len, or more memory")  # fmt: skip
        asked = pages * size
    return Limits(asked, pages, most_running, most, token)


def measured(config: EngineConfig, loaded: Loaded) -> tuple[int, int]:
    """Bytes of KV cache that a token takes on this rank, and what there are. It runs the model: all ranks do so."""
    token = tried(loaded, 1, 1)
    if config.kv_cache_memory_bytes:
        return token, config.kv_cache_memory_bytes
    if loaded.device.type != "cuda":
        return token, min(CPU_CACHE, available() // 2 // config.tensor_parallel_size)
    torch.cuda.empty_cache()
    held, most = torch.cuda.memory_allocated(loaded.device), budget(config, loaded)
    torch.cuda.reset_peak_memory_stats(loaded.device)
    tried(loaded, most, min(most, config.max_model_len or loaded.longest))
    working = torch.cuda.max_memory_allocated(loaded.device) - held - token * most
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(loaded.device)
    return token, max(0, int(free - total * (1 - config.gpu_memory_utilization)) - max(working, 0) - GRAPHS)


def tried(loaded: Loaded, tokens: int, longest: int) -> int:
    """Run a step of so many tokens in texts no longer than that. -> what one token takes in the cache"""
    lengths = [longest] * (tokens // longest) + ([tokens % longest] if tokens % longest else [])
    pages = [-(-length // loaded.page) for length in lengths]
    runner = Paged(
        loaded.model, sum(pages), loaded.page, loaded.cache_dtype, apart(loaded.model), len(lengths), longest
    )
    works, at = [], 0
    for length, count in zip(lengths, pages, strict=True):
        stream = Stream(Request("", [0] * length, SamplingParams()), 0, 0, [0] * length, pages=[*range(at, at + count)])
        works.append(Work(stream, 0, length))
        at += count
    runner.run(works)
    found = runner.slot_bytes
    runner.free()
    return found


def available() -> int:
    """Bytes of memory that could be had now."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
