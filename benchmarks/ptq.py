"""Post-training quantization, ours beside the peers: perplexity, seconds, peak memory, on one model and one text.

    python benchmarks/ptq.py MODEL --calib calib.txt --eval eval.txt [--only W4] [--device cuda] [--peers FOLDER]

The calibration is the first 128 x 512 tokens of the text, as the peers take it; perplexity over non-overlapping windows
of 1024 tokens. Every run is a process of its own, so that peak memory is its own. FOLDER holds environments of the
peers, `FOLDER/llmcompressor/bin/python` and so on; benchmarks/ptq_peers.py is what runs in them.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

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
    ("W3 g{g} sym autoround 200", "int3-g{g}", "autoround", ["iters=200"], "auto-round"),
    ("W2 g64 sym gptq", "int2-g64", "gptq", [], "compressed-tensors"),
    ("W2 g64 asym gptq", "int2-g64-asym", "gptq", [], "compressed-tensors"),
    ("W2 g64 sym autoround 200", "int2-g64", "autoround", ["iters=200"], "auto-round"),
    ("FP8 dynamic", "FP8_DYNAMIC", "rtn", [], "compressed-tensors"),
    ("INT8 W8A8 rtn", "W8A8", "rtn", [], "compressed-tensors"),
    ("INT8 W8A8 smooth+gptq", "W8A8", "smooth+gptq", [], "compressed-tensors"),
    ("NVFP4 W4A4 rtn", "NVFP4", "rtn", [], "compressed-tensors"),
    ("NVFP4 W4A4 gptq", "NVFP4", "gptq", [], "compressed-tensors"),
    ("NVFP4 W4A4 autoround 200", "NVFP4", "autoround", ["iters=200"], "compressed-tensors"),
    ("MXFP4 W4A4 gptq", "MXFP4", "gptq", [], "compressed-tensors"),
]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--only", default="", help="rows whose label has these words; several such with commas")
    parser.add_argument("--group", type=int, default=64, help="group length of the W4 and W3 rows")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--kl", action="store_true", help="KL divergence against the model too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="rows run at once: for figures of quality, not of time")
    return parser.parse_args()


def run(command: list[str]) -> tuple[dict, float, float]:
    """-> the JSON it printed, seconds, peak resident MiB."""
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{err.decode()[-2000:]}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return json.loads(out), time.monotonic() - begun, peak


def fewbit(*words: str) -> list[str]:
    return [sys.executable, "-m", "fewbit", *words, "--json"]


def quality(model: Path, given: argparse.Namespace) -> str:
    """Perplexity, and where asked KL divergence against the model with its interval."""
    against = ["--against", str(given.model)] if given.kl else []
    found, _, _ = run(fewbit("eval", str(model), "--text", str(given.eval), "--context", "1024", "--windows",
                             str(given.windows), "--dtype", "bfloat16", "--device", given.device,
                             *against))  # fmt: skip
    shown = f"{found['perplexity']['value']:.2f}"
    if given.kl:
        kl = found["kl"]
        shown += f"\t{kl['value']:.4f} ({kl['low']:.4f} to {kl['high']:.4f})"
    return shown


def ours(row: tuple[str, str, str, list[str], str], given: argparse.Namespace) -> str:
    label, form, algo, options, dialect = row
    with TemporaryDirectory() as place:
        out = Path(place) / "out"
        bits, mixed, formats = form.format(g=given.group).partition(" of ")
        what = ["--target-bits", bits, "--from", formats] if mixed else ["-f", bits]
        sets = [word for option in options for word in ("--set", option)]
        done, wall, _ = run(fewbit(
            "quantize", str(given.model), "-o", str(out), *what, "-a", algo, *sets, "--to",
            dialect, "--calib", str(given.calib), "--calib-order", "first", "--device", given.device, "--no-report",
        ))  # fmt: skip
        value = quality(out, given)
        peak = done["memory"] / 2**20
    return f"fewbit\t{label.format(g=given.group)}\t{value}\t{done['seconds']:.1f}\t{wall:.1f}\t{peak:.0f}"


def peer(python: Path, row: dict, given: argparse.Namespace, dense: Path) -> str:
    """One peer's row, in its own environment, read back and measured by us."""
    script = Path(__file__).with_name("ptq_peers.py")
    with TemporaryDirectory() as place:
        out = Path(place) / "out"
        command = [str(python), str(script), row["tool"], row["scheme"], str(dense), str(out), str(given.calib)]
        done, wall, _ = run(command)
        value = quality(out, given)
    return f"{row['tool']}\t{row['label']}\t{value}\t{done['seconds']:.1f}\t{wall:.1f}\t{done['peak']:.0f}"


def wanted(label: str, asked: list[str]) -> bool:
    """Whether all words of one of those asked for are in the label."""
    return any(set(words.split()) <= set(label.split()) for words in asked)


def shown(row: Callable[[], str]) -> None:
    """A row, or why there is none: the others go on."""
    try:
        print(row(), flush=True)
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)


def main() -> None:
    given = arguments()
    kl = "KL (95 %)\t" if given.kl else ""
    print(f"tool\tscheme\tperplexity\t{kl}seconds\tprocess seconds\tpeak MiB", flush=True)
    print(f"-\tfloat\t{quality(given.model, given)}", flush=True)
    words = given.only.split(",")
    rows = [row for row in OURS if wanted(row[0].format(g=given.group), words)]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(given.jobs) as pool:
        for future in [pool.submit(ours, row, given) for row in rows]:
            shown(future.result)
    if given.peers:
        import ptq_peers

        with TemporaryDirectory() as place:
            dense = Path(place) / "dense"
            subprocess.run([*fewbit("convert", str(given.model), "--to", "dense", "-o", str(dense))], check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
            for row in ptq_peers.rows(given.group):
                python = given.peers / row["tool"] / "bin" / "python"
                if python.exists() and wanted(row["label"], words):
                    shown(lambda row=row, python=python: peer(python, row, given, dense))


if __name__ == "__main__":
    main()
