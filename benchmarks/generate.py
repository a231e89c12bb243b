"""Tokens per second of greedy decoding with a cache on the reference path: `python benchmarks/generate.py MODEL`.

`--format` quantizes on arrival; a GGUF is made dense first, in a folder that is dropped.
"""

import argparse
import platform
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers

import fewbit


def tokens_per_second(model: torch.nn.Module, prompt: int, tokens: int, repeat: int) -> tuple[float, float]:
    """-> the best and the median rate, the prompt's own pass not counted."""
    ids = torch.randint(10, 1000, (1, prompt), generator=torch.Generator().manual_seed(0))
    rates = []
    with torch.inference_mode():
        for _ in range(repeat):
            out = model(ids, use_cache=True)
            start = time.perf_counter()
            for _ in range(tokens):
                step = out.logits[:, -1:].argmax(-1)
                out = model(step, past_key_values=out.past_key_values, use_cache=True)
            rates.append(tokens / (time.perf_counter() - start))
    return max(rates), sorted(rates)[len(rates) // 2]


def load(path: Path, dtype: str, form: str | None) -> torch.nn.Module:
    if form is None or path.is_dir():
        return fewbit.load(path, dtype=dtype, format=form)
    with TemporaryDirectory() as folder:
        fewbit.convert(path, Path(folder) / "dense", "dense")
        return fewbit.load(Path(folder) / "dense", dtype=dtype, format=form)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a folder or a .gguf file")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--format", nargs="+", default=[None], help="quantize on arrival; default: as the file is")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    print(
        f"{' '.join(sys.argv)}\nfewbit {fewbit.__version__}, {versions}, {args.threads} threads, {platform.machine()}"
    )
    print(f"{'format':16} {'dtype':10} {'load s':>8} {'best':>8} {'median':>8}  tokens/s")
    for form in args.format:
        for dtype in args.dtype:
            start = time.perf_counter()
            model = load(args.model, dtype, form)
            seconds = time.perf_counter() - start
            best, median = tokens_per_second(model, args.prompt, args.tokens, args.repeat)
            print(f"{form or 'as stored':16} {dtype:10} {seconds:8.1f} {best:8.1f} {median:8.1f}", flush=True)


if __name__ == "__main__":
    main()
