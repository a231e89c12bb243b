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
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
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
    """The verdict on one type.

    kernels: of a layer outside attention, its own code's and fused; empty where they cannot be counted. refused: what
    cannot be fused, and why. doubts: of how its layers are wired.
    """

    type: str
    error: float
    attention: str
    why: str
    seconds: float
    paged: bool = False
    kernels: Sequence[int] = ()
    refused: Sequence[str] = ()
    doubts: int = 0

    @property
    def verdict(self) -> str:
        return "exact" if self.error <= 1e-4 else "refused" if not math.isfinite(self.error) else "wrong"

    @property
    def explained(self) -> bool:
        return self.verdict == "exact" and self.paged and not self.refused

    def line(self) -> str:
        error = f"{self.error:.1e}" if math.isfinite(self.error) else ""
        cells = [self.type, self.verdict, "paged" if self.paged else self.attention, error,
                 " → ".join(map(str, self.kernels)), str(len(self.refused) or ""),
                 "; ".join([self.why, *self.refused] if self.why else self.refused).replace("|", "/")]  # fmt: skip
        return f"| {' | '.join(cells)} |"


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
    row = Row(model_type, verdict.error, verdict.attention, verdict.why, 0.0)
    return replace(fused(row) if verdict.exact else row, seconds=time.perf_counter() - start)


def fused(row: Row) -> Row:
    """With what of it is paged and fused."""
    from fewbit.engine import proof
    from fewbit.models import fuse, fuse_count, observe

    config = config_of(row.type)
    said = [f"{d.kind} of {d.where}{f' ({d.what})' if d.kind == 'merged' else ''}: {d.reason}"
            for d in fuse.plan(config).refused if d.refused]  # fmt: skip
    try:
        found = fuse_count.counted(config)
    except Exception:  # code of a model that does not run in bfloat16
        kernels: Sequence[int] = ()
    else:
        kernels = (found.plain, found.fused)
    doubts = len(observe.observe(config).refused)
    return replace(row, paged=proof.check(config).exact, kernels=kernels, refused=said, doubts=doubts)


def work() -> None:
    """Types on standard input, one a line -> rows as JSON on standard output."""
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        row = judge(line.strip())
        print(json.dumps(astuple(row)), flush=True)


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
    explained = [row for row in rows if row.explained]
    wired = sum(not row.doubts for row in explained)
    head = f"""# Causal language models of transformers {version}

Written by `make sweep`. Each type as a tiny random twin of its full-size config, filled through the tensor names that
transformers saves, in float32: a ragged batch and one cached step, compared with eager transformers. Exact: relative
error of the logits at most 1e-4 (`load` refuses the others). Attention: ours over a cache of pages (`paged`), ours
(`fewbit`), or transformers' own (`eager`) where a type has one that ours cannot stand for. Kernels: what a decoder
layer launches outside attention for one token, of its kinds of layers the most, in its own code → fused. Refused: what
looks as if it could be fused and is not, which `--fusion strict` makes an error; why stands in the last column. torch's
own LayerNorm is no refusal, for it is one kernel, nor is what does not look like linears that read one tensor, a norm,
a gated MLP or a rotary embedding, nor additions beside which there is no norm of ours.

{counts["exact"]} exact, {counts["wrong"]} wrong, {counts["refused"]} refused, of {len(rows)}.
Fully explained (exact, paged, nothing refused): {len(explained)},
and {wired} of them with the wiring of their layers proven as well (`fewbit inspect --fusion`).

| type | verdict | attention | error | kernels | refused | why |
|---|---|---|---|---|---|---|
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
