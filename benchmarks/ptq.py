"""Post-training quantization, ours beside the peers: perplexity, seconds, peak memory, on one model and one text.

    python benchmarks/ptq.py MODEL --calib calib.txt --eval eval.txt [--rows W4,FP8] [--device cuda] [--peers FOLDER]

The calibration is the first 128 x 512 tokens of the text, as the peers take it; perplexity over non-overlapping windows
of 1024 tokens. Every run is a process of its own, so that peak memory is its own. FOLDER gets an environment for each
peer that the rows ask for, made when missing: `FOLDER/llmcompressor` and so on; benchmarks/ptq_peers.py is what runs in
them. Ends with ours beside theirs: row by row, then the best of ours beside the best of theirs in each format.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import ptq_peers

# label, format (or bits per weight, of these formats), algorithm, options, dialect
OURS: list[tuple[str, str, str, list[str], str]] = [
    ("W4 g{g} sym rtn", "int4-g{g}", "rtn", [], "compressed-tensors"),
    ("W4 g{g} sym gptq", "int4-g{g}", "gptq", [], "compressed-tensors"),
    ("W4 g{g} sym awq", "int4-g{g}", "awq", [], "compressed-tensors"),
    ("W4 g{g} asym awq", "int4-g{g}-asym", "awq", [], "awq"),
    ("W4 g{g} sym awq+gptq", "int4-g{g}", "awq+gptq", [], "compressed-tensors"),
    ("W4 g{g} sym rotate+gptq", "int4-g{g}", "rotate+gptq", [], "compressed-tensors"),
    ("W4 g{g} sym hqq", "int4-g{g}", "hqq", [], "compressed-tensors"),
    ("W4 g{g} sym autoround 20", "int4-g{g}", "autoround", ["iters=20"], "auto-round"),
    ("W4 g{g} sym autoround 200", "int4-g{g}", "autoround", ["iters=200"], "auto-round"),
    ("W4 g{g} sym mixed rtn", "4.25 of int3-g{g},int4-g{g},int5-g{g},int8-g{g}", "rtn", [], "compressed-tensors"),
    ("MXFP4A16 rtn", "mxfp4-a16", "rtn", [], "compressed-tensors"),
    ("W3 g{g} sym gptq", "int3-g{g}", "gptq", [], "compressed-tensors"),
    ("W3 g{g} sym autoround 20", "int3-g{g}", "autoround", ["iters=20"], "auto-round"),
    ("W3 g{g} sym autoround 200", "int3-g{g}", "autoround", ["iters=200"], "auto-round"),
    ("W2 g64 sym gptq", "int2-g64", "gptq", [], "compressed-tensors"),
    ("W2 g64 asym gptq", "int2-g64-asym", "gptq", [], "compressed-tensors"),
    ("W2 g64 sym autoround 20", "int2-g64", "autoround", ["iters=20"], "auto-round"),
    ("W2 g64 sym autoround 200", "int2-g64", "autoround", ["iters=200"], "auto-round"),
    ("FP8 dynamic", "FP8_DYNAMIC", "rtn", [], "compressed-tensors"),
    ("FP8 dynamic gptq", "FP8_DYNAMIC", "gptq", [], "compressed-tensors"),
    ("INT8 W8A8 rtn", "W8A8", "rtn", [], "compressed-tensors"),
    ("INT8 W8A8 smooth+gptq", "W8A8", "smooth+gptq", [], "compressed-tensors"),
    ("NVFP4 W4A4 rtn", "NVFP4", "rtn", [], "compressed-tensors"),
    ("NVFP4 W4A4 gptq", "NVFP4", "gptq", [], "compressed-tensors"),
    ("NVFP4 W4A4 autoround 200", "NVFP4", "autoround", ["iters=200"], "compressed-tensors"),
    ("MXFP4 W4A4 gptq", "MXFP4", "gptq", [], "compressed-tensors"),
]


@dataclass(frozen=True, slots=True)
class Result:
    """One finished row. seconds: of quantizing alone; wall: of the whole process; peak: MiB; kl: with its interval."""

    tool: str
    label: str
    perplexity: float
    kl: str
    seconds: float
    wall: float
    peak: float

    def __str__(self) -> str:
        kl = f"\t{self.kl}" if self.kl else ""
        figures = f"{self.seconds:.1f}\t{self.wall:.1f}\t{self.peak:.0f}"
        return f"{self.tool}\t{self.label}\t{self.perplexity:.2f}{kl}\t{figures}"

    @property
    def family(self) -> str:
        """What is compared whatever the algorithm: `W4 g64`, `FP8 dynamic`."""
        return " ".join(self.label.split()[:2])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--rows", default="", help="those whose label has these words; several such with commas")
    parser.add_argument("--group", type=int, default=64, help="group length of the W4 and W3 rows")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--kl", action="store_true", help="KL divergence against the model too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="rows run at once: for figures of quality, not of time")
    return parser.parse_args()


def run(command: list[str]) -> tuple[dict, float]:
    """-> the JSON it printed, seconds."""
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{err.decode()[-2000:]}")
    return json.loads(out), time.monotonic() - begun


def fewbit(*words: str) -> list[str]:
    return [sys.executable, "-m", "fewbit", *words, "--json"]


def quality(model: Path, given: argparse.Namespace) -> tuple[float, str]:
    """Perplexity, and where asked KL divergence against the model with its interval."""
    against = ["--against", str(given.model)] if given.kl else []
    found, _ = run(fewbit("eval", str(model), "--text", str(given.eval), "--context", "1024", "--windows",
                             str(given.windows), "--dtype", "bfloat16", "--device", given.device,
                             *against))  # fmt: skip
    kl = found["kl"] if given.kl else None
    shown = f"{kl['value']:.4f} ({kl['low']:.4f} to {kl['high']:.4f})" if kl else ""
    return found["perplexity"]["value"], shown


def ours(row: tuple[str, str, str, list[str], str], given: argparse.Namespace) -> Result:
    label, form, algo, options, dialect = row
    with TemporaryDirectory() as place:
        out = Path(place) / "out"
        bits, mixed, formats = form.format(g=given.group).partition(" of ")
        what = ["--target-bits", bits, "--from", formats] if mixed else ["-f", bits]
        sets = [word for option in options for word in ("--set", option)]
        done, wall = run(fewbit(
            "quantize", str(given.model), "-o", str(out), *what, "-a", algo, *sets, "--to",
            dialect, "--calib", str(given.calib), "--calib-order", "first", "--device", given.device, "--no-report",
        ))  # fmt: skip
        found = quality(out, given)
    return Result("fewbit", label.format(g=given.group), *found, done["seconds"], wall, done["memory"] / 2**20)


def environment(folder: Path, tool: str) -> Path:
    """The Python of a peer's own environment, made when it is not there."""
    python = folder / tool / "bin" / "python"
    if not python.exists():
        print(f"making {folder / tool}: {' '.join(ptq_peers.NEEDS[tool])}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder / tool], check=True)
    command = [str(python), "-m", "pip", "install", "--quiet", *ptq_peers.NEEDS[tool]]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return python


def peer(row: dict[str, str], given: argparse.Namespace) -> Result:
    """One peer's row, in its own environment, read back and measured by us."""
    python, script = environment(given.peers, row["tool"]), Path(__file__).with_name("ptq_peers.py")
    with TemporaryDirectory() as place:
        out = Path(place) / "out"
        command = [str(python), str(script), row["tool"], row["scheme"], str(given.model), str(out), str(given.calib)]
        done, wall = run(command)
        found = quality(out, given)
    return Result(f"{row['tool']} {done['version']}", row["label"], *found, done["seconds"], wall, done["peak"])


def wanted(label: str, asked: list[str]) -> bool:
    """Whether all words of one of those asked for are in the label."""
    return any(set(words.split()) <= set(label.split()) for words in asked)


def shown(row: Callable[[], Result]) -> list[Result]:
    """A row, or why there is none: the others go on."""
    try:
        found = row()
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)
        return []
    print(found, flush=True)
    return [found]


def densed(model: Path, place: str) -> Path:
    """What everyone starts from: the values of a GGUF file in bfloat16, which the peers can read."""
    if model.suffix != ".gguf":
        return model
    dense = Path(place) / "dense"
    run(fewbit("convert", str(model), "--to", "dense", "-o", str(dense)))
    return dense


def beside(mine: Result, theirs: Result, base: float) -> str:
    """Ours and theirs, and ours over theirs: increase of perplexity, seconds, peak."""
    increase = (mine.perplexity - base) / (theirs.perplexity - base) if theirs.perplexity != base else float("nan")
    return (f"{mine.label}\t{mine.perplexity:.2f}\t{theirs.perplexity:.2f} ({theirs.tool}: {theirs.label})\t"
            f"{increase:.3f}\t{mine.seconds:.1f}\t{theirs.seconds:.1f}\t{mine.seconds / theirs.seconds:.2f}\t"
            f"{mine.peak:.0f}\t{theirs.peak:.0f}\t{mine.peak / theirs.peak:.2f}")  # fmt: skip


def compared(mine: Sequence[Result], theirs: Sequence[Result], base: float) -> Iterable[str]:
    """Namesakes, then the best of each format."""
    head = "ours\ttheirs\tincrease, ratio\tseconds\ttheirs\tratio\tMiB\ttheirs\tratio"
    yield f"\nsame scheme\t{head}"
    yield from (beside(a, b, base) for b in theirs for a in mine if a.label == b.label)
    yield f"\nbest of a format\t{head}"
    for family in dict.fromkeys(b.family for b in theirs):
        sides = [[r for r in rows if r.family == family] for rows in (mine, theirs)]
        if all(sides):
            a, b = (min(rows, key=lambda r: r.perplexity) for rows in sides)
            yield beside(a, b, base)


def main() -> None:
    given = arguments()
    kl = "KL (95 %)\t" if given.kl else ""
    print(f"tool\tscheme\tperplexity\t{kl}seconds\tprocess seconds\tpeak MiB", flush=True)
    with TemporaryDirectory() as place:
        given.model = densed(given.model, place)
        base, _ = quality(given.model, given)
        print(f"-\tfloat\t{base:.2f}", flush=True)
        words = given.rows.split(",")
        rows = [row for row in OURS if wanted(row[0].format(g=given.group), words)]
        with ThreadPoolExecutor(given.jobs) as pool:
            futures = [pool.submit(ours, row, given) for row in rows]
            mine = [result for future in futures for result in shown(future.result)]
        if given.peers:
            theirs = [row for row in ptq_peers.rows(given.group) if wanted(row["label"], words)]
            found = [result for row in theirs for result in shown(partial(peer, row, given))]
            print("\n".join(compared(mine, found, base)), flush=True)


if __name__ == "__main__":
    main()
