"""The engine on a GPU beside vLLM's figures: random weights in Llama-3.1-8B's shape, token ids in, greedy, no end.

    python benchmarks/gpu_engine.py FOLDER [--rows bf16,fp8,w4a16] [--columns 1,8,64,256,serve,prefill]
        [--shape 8b --layers 32] [--options '{"tensor_parallel_size": 2}'] [--profile 1,64]

FOLDER needs room for 16 GB; the model is made there once. Decode columns: batch x 128 output tokens over the whole
time of a call with 128 tokens in and 128 out. Serve: 512 requests at once, 100 to 1024 tokens in, 100 to 512 out.
Prefill: 16 texts of 2048 tokens, one token out. In brackets the share of what vLLM 0.24.0 gave on one H200 (ROWS).
--profile: what steps of so many streams are made of, by kernel: from the end of the one before it to its own.
"""

import argparse
import gc
import json
import logging
import random
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from random_llama import SHAPES, make
from torch.profiler import ProfilerActivity, profile

from fewbit import LLM, SamplingParams
from fewbit.engine.request import Request

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # kinds of the profiler's events
COLUMNS = ("1", "8", "64", "256", "serve", "prefill")
ROWS = {  # name: (options of LLM, vLLM's tokens a second by column)
    "bf16": ({}, (205, 1550, 8786, 15604, 10157, 42759)),
    "bf16-kv8": ({"kv_cache_dtype": "fp8", "kv_scale": 1.0}, (200, 1519, 8702, 15813, 10529, 43041)),
    "fp8": ({"quantization": "fp8"}, (283, 2152, 11727, 20602, 13084, 65861)),
    "fp8-kv8": (
        {"quantization": "fp8", "kv_cache_dtype": "fp8", "kv_scale": 1.0},
        (276, 2118, 11640, 20372, 13547, 65595),
    ),
    "w4a16": ({"quantization": "int4-g128"}, (298, 2145, 8734, 15335, 9944, 43085)),  # the better of its two kernels
    "w4a16-kv8": (
        {"quantization": "int4-g128", "kv_cache_dtype": "fp8", "kv_scale": 1.0},
        (254, 1909, 8729, 15385, 10247, 42812),
    ),
    "nvfp4": ({"quantization": "nvfp4-a16"}, None),
    "mxfp4": ({"quantization": "mxfp4-a16"}, None),
    "q4_k": ({"quantization": "q4_k"}, None),
}
COMMON = {"max_model_len": 4096, "gpu_memory_utilization": 0.85, "enable_prefix_caching": False,
          "max_num_batched_tokens": 16384, "max_num_seqs": 1024}  # fmt: skip
VOCAB = 128000


def texts(count: int, low: int, high: int, draw: random.Random) -> list[list[int]]:
    return [[draw.randrange(VOCAB) for _ in range(draw.randint(low, high))] for _ in range(count)]


def timed(llm: LLM, prompts: list[list[int]], most: list[int]) -> float:
    params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True, detokenize=False) for n in most]
    torch.cuda.synchronize()
    begun = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def decode(llm: LLM, batch: int, repeat: int) -> tuple[float, float]:
    """-> tokens a second, milliseconds of a step."""
    draw = random.Random(batch)
    timed(llm, texts(batch, 128, 128, draw), [3] * batch)  # compiles what this size is first to need
    whole = statistics.median(timed(llm, texts(batch, 128, 128, draw), [128] * batch) for _ in range(repeat))
    first = statistics.median(timed(llm, texts(batch, 128, 128, draw), [1] * batch) for _ in range(repeat))
    return batch * 128 / whole, (whole - first) / 127 * 1e3


def serve(llm: LLM) -> float:
    draw = random.Random(0)
    prompts = texts(512, 100, 1024, draw)
    most = [draw.randint(100, 512) for _ in prompts]
    return sum(most) / timed(llm, prompts, most)


def prefill(llm: LLM, repeat: int) -> float:
    draw = random.Random(1)
    timed(llm, texts(16, 2048, 2048, draw), [1] * 16)
    return 16 * 2048 / statistics.median(timed(llm, texts(16, 2048, 2048, draw), [1] * 16) for _ in range(repeat))


def measure(llm: LLM, column: str, repeat: int) -> tuple[float, str]:
    if column == "serve":
        return serve(llm), ""
    if column == "prefill":
        return prefill(llm, repeat), ""
    rate, step = decode(llm, int(column), repeat)
    return rate, f" {step:.2f} ms"


def profiled(llm: LLM, streams: int, steps: int = 8) -> None:
    """Kernels may begin before the last one ends, so that only the time from end to end adds up."""
    engine = llm.llm_engine
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, detokenize=False)
    for i, prompt in enumerate(texts(streams, 128, 128, random.Random(streams))):
        engine.add(Request(f"profile {i}", prompt, params))
    for _ in range(12):
        engine.step()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
    while engine.has_work():
        engine.step()
    with tempfile.TemporaryDirectory() as folder:
        seen.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    spans = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") in ON_DEVICE)
    took: dict[str, list[float]] = defaultdict(list)
    ended = spans[0][0]
    for _, end, name in spans:
        took[name].append(max(0.0, end - ended))
        ended = max(ended, end)
    print(f"{streams} streams, {steps} steps: {ended - spans[0][0]:.0f} us, {len(spans)} launches")
    for name, each in sorted(took.items(), key=lambda item: -sum(item[1]))[:25]:
        print(f"{sum(each):10.1f} us {len(each):6} x {statistics.mean(each):8.2f}  {name[:120]}", flush=True)


def resident(what: str) -> int:
    """KiB of this process, as Linux says."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def row(
    name: str, model: Path, columns: list[str], repeat: int, options: dict[str, object], profiles: list[int]
) -> None:
    given, peer = ROWS[name]
    peer = peer if model.name == "8b" else None
    torch.zeros(1, device="cuda")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, begun = resident("VmHWM"), time.perf_counter()
    llm = LLM(model, **COMMON | given | options)
    ready = time.perf_counter() - begun
    engine = llm.llm_engine
    tokens, held = engine.limits.pages * engine.config.block_size, torch.cuda.memory_allocated() / 2**30
    host = (resident("VmHWM") - before) / 2**20
    print(f"{name}: ready {ready:.1f} s, {tokens} KV tokens, {held:.1f} GiB held, {host:.2f} GiB of the host at most "
          "beyond what the runtime had", flush=True)  # fmt: skip
    timed(llm, texts(4, 100, 200, random.Random(9)), [4] * 4)
    for column in columns:
        rate, more = measure(llm, column, repeat)
        known = peer is not None and column in COLUMNS
        beside = f"\t[{rate / peer[COLUMNS.index(column)]:.2f} of {peer[COLUMNS.index(column)]}]" if known else ""
        print(f"{name}\t{column}\t{rate:.0f} tok/s{more}{beside}", flush=True)
    for streams in profiles:
        profiled(llm, streams)
    llm.llm_engine.shutdown()
    del llm, engine
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", default="bf16,fp8,w4a16")
    parser.add_argument("--columns", default=",".join(COLUMNS))
    parser.add_argument("--shape", default="8b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--options", type=json.loads, default={}, help="more options of LLM, as JSON")
    parser.add_argument("--profile", default="", help="numbers of streams whose steps are looked into")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d ms %(message)s")
    name = f"{given.shape}-{given.layers}" if given.layers else given.shape
    model = make(given.folder / name, given.shape, given.layers, "cuda")
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    profiles = [int(n) for n in given.profile.split(",") if n]
    for name in given.rows.split(","):
        try:
            row(name, model, [c for c in given.columns.split(",") if c], given.repeat, given.options, profiles)
        except Exception as error:  # the other rows are still worth their time
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
