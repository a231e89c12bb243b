"""What each format of the KV cache costs along a long text: KL by position, and needles found again.

python benchmarks/kv_formats.py [MODEL] [--length N] [--formats fp8:1.0,fp8,int8,...]

The shipped calibration text, as long as the model's positions reach, with three needles (a number each) at a tenth, a
half and nine tenths; behind it all three are asked for. Against the same model whose keys and values are not rounded:
KL(base || format) of the next token, nats, in eight stretches of positions; and of the numbers asked for, how many
tokens are the most probable ones, and their mean log-probability. `load` rounds as an engine's cache does
(tests/engine/test_kv_cache.py). fp8 and int8-head are measured with `fewbit calibrate` on samples of another seed; a
number behind a colon is a scale given. Without MODEL: SmolLM2-135M.
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

import fewbit
from fewbit.models import hf
from fewbit.models.kv import Asked
from fewbit.models.text import tokenizer
from fewbit.quant.kv import HEAD, KV_FORMATS
from fewbit.workflows.calibrate_kv import calibrate_kv
from fewbit.workflows.calibration import calibration
from fewbit.workflows.demo import fetch

FORMATS = "fp8:1.0,fp8,fp8-head,fp8_e5m2,int8,nvfp4,nvfp4+turn,int4,int4+turn"
NEEDLES = {"harbour": 73914, "mill": 20586, "orchard": 61847}
DEPTHS = (0.1, 0.5, 0.9)
STRETCHES, PIECE = 8, 256


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


def logprobs(model: Any, hidden: Tensor, at: int) -> Tensor:
    return hf.output_head(model)(hidden[at : at + PIECE]).float().log_softmax(-1)  # type: ignore[misc]


def run(model: Any, ids: Tensor) -> Tensor:
    """[T, H]: what the output head reads."""
    with torch.inference_mode():
        return model.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0]


def compare(model: Any, base: Tensor, hidden: Tensor, ids: Tensor, places: list[int]) -> tuple[list[float], int, float]:
    """-> KL by stretch, needle tokens that are the most probable, their mean log-probability"""
    kl, right, total = [], 0, 0.0
    with torch.inference_mode():
        for at in range(0, len(ids), PIECE):
            want, got = (logprobs(model, h, at) for h in (base, hidden))
            kl.append((want.exp() * (want - got)).sum(-1))
            for place in places:
                if at <= place - 1 < at + PIECE:
                    row = got[place - 1 - at]
                    right += int(row.argmax() == ids[place])
                    total += float(row[ids[place]])
    return [float(part.mean()) for part in torch.cat(kl).chunk(STRETCHES)], right, total / len(places)


def asked(name: str, model: Path, folder: Path) -> Asked:
    """fp8:1.0 is a scale given, fp8 and the like are measured, +turn turns."""
    name, _, turn = name.partition("+")
    name, _, scale = name.partition(":")
    plain = name.removesuffix(HEAD)
    if scale or turn or (KV_FORMATS[plain].dynamic and plain == name) or plain == "fp8_e5m2":
        return Asked(plain, None, float(scale) if scale else None, bool(turn))
    side = folder / f"{name}.safetensors"
    calibrate_kv(model, side, name, samples=8, length=512, seed=1)
    return Asked(plain, str(side))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--length", type=int, help="tokens; the model's positions unless given")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    path = args.model or fetch()
    base = fewbit.load(path, dtype=args.dtype)
    length = args.length or base.config.get_text_config().max_position_embeddings
    ids, places = text(tokenizer(path), length)
    print(f"python {' '.join(sys.argv)}; torch {torch.__version__}, transformers {metadata.version('transformers')}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    print(f"{path.name}: {length} tokens, {len(places)} of them needles; KL in nats by eighths of the text")
    truth = run(base, ids)
    _, right, mean = compare(base, truth, truth, ids, places)
    print(f"{'format':>12} {'KL, first eighth ... last':^60} {'needles':>8} {'logprob':>8} {'s':>4}", flush=True)
    print(f"{'values':>12} {'':60} {right:>5}/{len(places)} {mean:8.3f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.formats.split(","):
            begun = time.monotonic()
            model = fewbit.load(path, dtype=args.dtype, cached=asked(name, path, Path(folder)))
            kl, right, mean = compare(base, truth, run(model, ids), ids, places)
            shown = " ".join(f"{value:7.5f}" for value in kl)
            seconds = time.monotonic() - begun
            print(f"{name:>12} {shown:>60} {right:>5}/{len(places)} {mean:8.3f} {seconds:4.0f}", flush=True)


if __name__ == "__main__":
    main()
