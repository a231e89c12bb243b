"""The engine on a CPU beside transformers in the same run: a random Llama of 1.1B parameters, or MODEL, greedy, no end.

    python benchmarks/cpu_engine.py FOLDER [--model MODEL] [--rows bf16,int4,...] [--rounds 2] [--threads 2]

FOLDER needs room for 2.2 GB; the model is made there once. Every row is a process of its own and all rows run in turn,
`rounds` times, so that a slow minute falls on all of them; the best of each is shown. One: tokens a second of one
stream after its first, 128 tokens in; eight: of eight streams; prefill: tokens a second of a text of 512; ready:
seconds from the start of the process to the first token; MB: the most memory held. In brackets: how many times
transformers' figure (`peer`: its own code in bfloat16, dynamic cache).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BEGUN = time.time()
FIGURES = ("one", "eight", "prefill", "ready", "MB")
ROWS: dict[str, dict[str, Any]] = {  # name: options of LLM
    "bf16": {},
    "int4": {"quantization": "int4-g128"},
    "int4-fast": {"quantization": "int4-g128", "activations": "fast"},
    "int8": {"quantization": "int8-channel"},
    "int8-fast": {"quantization": "int8-channel", "activations": "fast"},
    "fp8": {"quantization": "fp8-channel-a16"},
    "nvfp4": {"quantization": "nvfp4-a16"},
    "mxfp4": {"quantization": "mxfp4-a16"},
    "file": {},  # as MODEL is stored
    "file-fast": {"activations": "fast"},
}
OUT = 32  # tokens of a decoding stream


def ours(model: Path, name: str) -> dict[str, float]:
    from fewbit import LLM
    from fewbit.engine.bench import measure

    llm = LLM(model, max_model_len=1024, max_num_seqs=8, enable_prefix_caching=False, **ROWS[name])
    engine = llm.llm_engine
    measure(engine, 1, 128, 1, repeat=1, warm=0)
    ready = time.time() - BEGUN
    one, eight = (measure(engine, n, 128, OUT, repeat=1) for n in (1, 8))
    text = measure(engine, 1, 512, 1, repeat=2)
    return {"one": one.decode_rate, "eight": eight.decode_rate, "prefill": 512 / text.seconds, "ready": ready}


def peer(model: Path) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    draw = torch.Generator().manual_seed(0)

    @torch.inference_mode()
    def rate(streams: int, length: int, tokens: int) -> tuple[float, float]:
        """-> tokens a second after the first, of the prompt"""
        ids = torch.randint(10, 1000, (streams, length), generator=draw)
        begun = time.perf_counter()
        out = loaded(ids, use_cache=True, logits_to_keep=1)
        first = time.perf_counter()
        for _ in range(tokens):
            step = out.logits[:, -1:].argmax(-1)
            out = loaded(step, past_key_values=out.past_key_values, use_cache=True)
        done = time.perf_counter()
        return streams * tokens / (done - first), streams * length / (first - begun)

    rate(1, 128, 1)
    ready = time.time() - BEGUN
    one, eight = rate(1, 128, OUT)[0], rate(8, 128, OUT)[0]
    return {"one": one, "eight": eight, "prefill": max(rate(1, 512, 0)[1] for _ in range(3)), "ready": ready}


def child(model: Path, name: str) -> None:
    found = peer(model) if name == "peer" else ours(model, name)
    from fewbit.workflows.run_view import peak_memory  # not of who began it, as getrusage has it

    found["MB"] = peak_memory() / 2**20
    print(json.dumps(found))


def run(model: Path, name: str, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, str(model), "--child", name]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def best(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: (min if name in ("ready", "MB") else max)(each[name] for each in rounds) for name in FIGURES}


def shown(name: str, found: dict[str, float], beside: dict[str, float]) -> str:
    parts = [f"{found[f]:.1f} ({found[f] / beside[f]:.2f})" for f in FIGURES]
    return "\t".join([name, *parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, help="a folder or a .gguf file, as it is stored: rows file, file-fast")
    parser.add_argument("--rows", default="bf16,int4,int4-fast,int8,int8-fast,fp8,nvfp4,mxfp4")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.folder, given.child)
    else:
        compare(given)


def compare(given: argparse.Namespace) -> None:
    from random_llama import make

    model = given.model or make(given.folder / "model", "1.1b")
    names = ["file", "file-fast"] if given.model else given.rows.split(",")
    dense = model
    if model.suffix == ".gguf":
        import fewbit

        dense = given.folder / f"{model.stem}-dense"
        if not dense.exists():
            fewbit.convert(model, dense, "dense")
    held: dict[str, list[dict[str, float]]] = {name: [] for name in ["peer", *names]}
    for _ in range(given.rounds):
        for name, rounds in held.items():
            rounds.append(run(dense if name == "peer" else model, name, given.threads))
    print("\t".join(["", *FIGURES]))
    figures = {name: best(rounds) for name, rounds in held.items()}
    for name, found in figures.items():
        print(shown(name, found, figures["peer"]), flush=True)


if __name__ == "__main__":
    main()
