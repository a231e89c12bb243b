"""The sweep: every causal-LM type of the installed transformers as a tiny twin, written to docs/sweep.md.

`python tests/sweep/sweep.py` regenerates the table; with names, it prints the verdicts on those. One worker process
takes the types one by one; a type that hangs or kills it costs that type alone.
"""

import json
import logging
import math
import select
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "sweep.md"
SECONDS = 60

# Default configs that are not complete, or that leave out the layers that make the type: what a real one says.
FULL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 4},
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy"},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"], "num_hidden_layers": 4},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 4, "moe_topk": 2},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
    "llama": {"num_key_value_heads": 8},
    "mixtral": {"head_dim": 128},
}


@dataclass(frozen=True, slots=True)
class Row:
    """The verdict on one type."""

    type: str
    error: float
    attention: str
    why: str
    seconds: float

    @property
    def verdict(self) -> str:
        return "exact" if self.error <= 1e-4 else "refused" if not math.isfinite(self.error) else "wrong"

    def line(self) -> str:
        error = f"{self.error:.1e}" if math.isfinite(self.error) else ""
        why = self.why.replace("|", "/")
        return f"| {self.type} | {self.verdict} | {self.attention} | {error} | {why} |"


def config_of(model_type: str) -> Any:
    """A full-size config of the type."""
    from fewbit.models import hf

    return hf.read_config({"model_type": model_type, **FULL.get(model_type, {})})


def judge(model_type: str) -> Row:
    from fewbit.models import twin

    start = time.perf_counter()
    try:
        verdict = twin.check(config_of(model_type))
    except Exception as error:  # a config that cannot be made is a row of the table too
        verdict = twin.Verdict(math.inf, "", f"{type(error).__name__}: {twin.first_line(error)}")
    return Row(model_type, verdict.error, verdict.attention, verdict.why, time.perf_counter() - start)


def work() -> None:
    """Types on standard input, one a line -> rows as JSON on standard output."""
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        row = judge(line.strip())
        print(json.dumps([row.type, row.error, row.attention, row.why, row.seconds]), flush=True)


def sweep(types: list[str]) -> Iterator[Row]:
    """Rows in order; the worker is started again after a type that it did not survive."""
    worker: subprocess.Popen[str] | None = None
    for model_type in types:
        worker = worker or start()
        row = ask(worker, model_type)
        if row is None:
            worker.kill()
            worker.wait()
            worker = None
        yield row or Row(model_type, math.inf, "", f"no answer in {SECONDS} s", SECONDS)
    if worker is not None and worker.stdin is not None:
        worker.stdin.close()
        worker.wait()


def start() -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__)), "--worker"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)


def ask(worker: subprocess.Popen[str], model_type: str) -> Row | None:
    if worker.stdin is None or worker.stdout is None:
        return None
    worker.stdin.write(f"{model_type}\n")
    worker.stdin.flush()
    ready, _, _ = select.select([worker.stdout], [], [], SECONDS)
    answer = worker.stdout.readline() if ready else ""
    return Row(*json.loads(answer)) if answer else None


def table(rows: list[Row], version: str) -> str:
    """docs/sweep.md: the exact types first."""
    order = {"exact": 0, "wrong": 1, "refused": 2}
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in order}
    head = f"""# Causal language models of transformers {version}

Written by `make sweep`. Each type as a tiny random twin of its full-size config, filled through the tensor names that
transformers saves, in float32: a ragged batch and one cached step, compared with eager transformers. Exact: relative
error of the logits at most 1e-4 (`load` refuses the others). Attention: ours (`fewbit`), or transformers' own (`eager`)
where a type has one that ours cannot stand for.

{counts["exact"]} exact, {counts["wrong"]} wrong, {counts["refused"]} refused, of {len(rows)}.

| type | verdict | attention | error | why |
|---|---|---|---|---|
"""
    lines = [row.line() for row in sorted(rows, key=lambda row: (order[row.verdict], row.type))]
    return head + "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    from fewbit.models import hf

    rows = []
    for row in sweep(names or hf.causal_types()):
        rows.append(row)
        print(f"{row.line()} {row.seconds:.2f} s", flush=True)
    if not names:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(table(rows, hf.VERSION))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    work() if sys.argv[1:] == ["--worker"] else main(sys.argv[1:])
