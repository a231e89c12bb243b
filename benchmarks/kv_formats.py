"""What each format of the KV cache costs along a long text: KL by position, and needles found again.

python benchmarks/kv_formats.py [MODEL] [--length N] [--formats fp8:1.0,fp8,int8,...]

The shipped calibration text, as long as the model's positions reach, with three needles (a number each) at a tenth, a
half and nine tenths; behind it all three are asked for. An engine's runner reads it in chunks over its own pages, as it
would be served, and is compared with one whose cache holds the model's values: KL(values || format) of the next token,
nats, in eight stretches of positions; and of the numbers asked for, how many tokens are the most probable ones, and
their mean log-probability. fp8, fp8-head and the like are measured first, on samples of the same text by another seed;
a number behind a colon is a scale given. Without MODEL: SmolLM2-135M.
"""

import argparse
import importlib.metadata as metadata
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.engine.config import EngineConfig
from fewbit.engine.params import SamplingParams
from fewbit.engine.request import Request, Stream
from fewbit.engine.runner import Paged
from fewbit.engine.scheduler import Work
from fewbit.engine.start import Loaded, apart, load
from fewbit.quant.kv import HEAD, KV_FORMATS
from fewbit.workflows.calibrate_kv import calibrate_kv
from fewbit.workflows.calibration import calibration
from fewbit.workflows.demo import fetch

FORMATS = "fp8:1.0,fp8,int8,nvfp4,nvfp4+rotate,int4+rotate"
NEEDLES = {"harbour": 73914, "mill": 20586, "orchard": 61847}
DEPTHS = (0.1, 0.5, 0.9)
STRETCHES, CHUNK = 8, 512


def text(words: Any, length: int) -> tuple[Tensor, list[int]]:
    """[length] token ids; places of the tokens of the numbers that are asked for."""
    asked, places = [], []
    for name, number in NEEDLES.items():
        asked += words(f" The secret number of the {name} is", add_special_tokens=False)["input_ids"]
        digits = words(f" {number}", add_special_tokens=False)["input_ids"]
        places += range(len(asked), len(asked) + len(digits))
        asked += digits + words(".", add_special_tokens=False)["input_ids"]
    stories = [words(f" The secret number of the {n} is {v}.", add_special_tokens=False)["input_ids"]
               for n, v in NEEDLES.items()]  # fmt: skip
    room = length - len(asked) - sum(map(len, stories))
    (hay,) = calibration(words, samples=1, length=room, order="first").ids
    found, at = hay.tolist(), 0
    parts: list[int] = []
    for depth, story in zip(DEPTHS, stories, strict=True):
        cut = int(room * depth)
        parts += found[at:cut] + story
        at = cut
    whole = torch.tensor(parts + found[at:] + asked)
    return whole, [length - len(asked) + place for place in places]


def run(loaded: Loaded, ids: Tensor) -> tuple[list[Tensor], int]:
    """Logits of every token, in chunks [CHUNK, V]; bytes that a token takes in the cache."""
    pages = -(-len(ids) // loaded.page)
    runner = Paged(loaded.model, pages, loaded.page, loaded.cache_dtype, apart(loaded.model), 1, len(ids))
    everything = SamplingParams(prompt_logprobs=0)
    stream = Stream(Request("", ids.tolist(), everything), 0, 0, ids.tolist(), pages=list(range(pages)))
    stops = [*range(CHUNK, len(ids), CHUNK), len(ids)]
    found = [runner.run([Work(stream, max(0, stop - 1) // CHUNK * CHUNK, stop)]).rows for stop in stops]
    return found, runner.slot_bytes


def compare(base: list[Tensor], found: list[Tensor], ids: Tensor, places: list[int]) -> tuple[list[float], int, float]:
    """-> KL by stretch, needle tokens that are the most probable, their mean log-probability"""
    kl, right, total, at = [], 0, 0.0, 0
    for wanted, given in zip(base, found, strict=True):
        want, got = wanted.float().log_softmax(-1), given.float().log_softmax(-1)
        kl.append((want.exp() * (want - got)).sum(-1))
        for place in places:
            if at < place <= at + len(got):
                row = got[place - 1 - at]
                right += int(row.argmax() == ids[place])
                total += float(row[ids[place]])
        at += len(got)
    return [float(part.mean()) for part in torch.cat(kl).chunk(STRETCHES)], right, total / len(places)


def asked(name: str, model: Path, folder: Path) -> dict[str, Any]:
    """fp8:1.0 is a scale given, fp8 and the like are measured, +rotate turns."""
    name, _, turn = name.partition("+")
    name, _, scale = name.partition(":")
    plain = name.removesuffix(HEAD)
    found: dict[str, Any] = {"kv_cache_dtype": plain, "kv_rotate": bool(turn)}
    if scale:
        return found | {"kv_scale": float(scale)}
    if plain == name and (KV_FORMATS[plain].dynamic or plain == "fp8_e5m2"):
        return found
    side = folder / f"{name}.safetensors"
    calibrate_kv(model, side, name, samples=8, length=512, seed=1)
    return found | {"kv_scales": str(side)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--length", type=int, help="tokens; the model's positions unless given")
    parser.add_argument("--formats", default=FORMATS)
    args = parser.parse_args()
    path = args.model or fetch()
    loaded = load(EngineConfig.of(model=str(path)))
    ids, places = text(loaded.tokenizer, args.length or loaded.longest)
    base, token = run(loaded, ids)
    print(f"python {' '.join(sys.argv)}; torch {torch.__version__}, transformers {metadata.version('transformers')}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    print(f"{path.name}: {len(ids)} tokens, {len(places)} of them needles; KL in nats by eighths of the text")
    print(f"{'format':>18} {'bytes':>6} {'KL, first eighth to last':^63} {'needles':>8} {'logprob':>8} {'s':>4}")
    _, right, mean = compare(base, base, ids, places)
    print(f"{'values':>18} {token:>6} {'':63} {right:>5}/{len(places)} {mean:8.3f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.formats.split(","):
            begun = time.monotonic()
            loaded = load(EngineConfig.of(model=str(path), **asked(name, path, Path(folder))))
            found, token = run(loaded, ids)
            kl, right, mean = compare(base, found, ids, places)
            shown, seconds = " ".join(f"{value:7.5f}" for value in kl), time.monotonic() - begun
            print(f"{name:>18} {token:>6} {shown} {right:>5}/{len(places)} {mean:8.3f} {seconds:4.0f}", flush=True)


if __name__ == "__main__":
    main()
