"""evaluate: perplexity of a model over a text, and how far it is from its base: KL divergence, top-1 agreement.

Non-overlapping windows, every token but the first of a window scored, log-softmax in float32. Both models run layer by
layer and are compared a piece of logits at a time; intervals come from a bootstrap over documents.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import expm1
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit import codecs
from fewbit.codecs.source import Source
from fewbit.errors import CheckpointError, RequestError
from fewbit.models.finding import refuse_on_errors
from fewbit.models.layers import Layers
from fewbit.models.text import tokenizer_of
from fewbit.models.verify import verify_source
from fewbit.quant.plan import Plan
from fewbit.quant.spec import Format
from fewbit.workflows.convert import Progress, quiet
from fewbit.workflows.evaluate_format import rounded
from fewbit.workflows.evaluate_intervals import RESAMPLES, Estimate, Figure, estimates
from fewbit.workflows.evaluate_stream import COLUMNS, check_ids, check_vocabularies, run, scores
from fewbit.workflows.evaluate_text import Windows, windows_of_ids, windows_of_text

DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
TOKENS, TOKENS_ON_GPU = 2048, 16384  # of a batch


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of one model over one text; those against a base are None without one."""

    path: str
    against: str | None
    format: str | None  # what the weights were rounded to as they were read
    text: str
    digest: str  # of the token ids
    windows: int
    documents: int
    context: int
    tokens: int  # scored
    dtype: str
    perplexity: Estimate
    base_perplexity: Estimate | None = None
    kl: Estimate | None = None  # nats per token, KL(base || model)
    agreement: Estimate | None = None  # of the most probable token
    difference: Estimate | None = None  # of log-perplexity, model - base, paired

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    path: str | Path,
    *,
    text: str | Path | None = None,
    ids: Tensor | Sequence[Tensor] | None = None,
    tokenizer: Any = None,
    against: str | Path | None = None,
    format: str | Format | Plan | None = None,
    context: int = 1024,
    windows: int | None = None,
    batch: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    max_memory: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress = quiet,
) -> Evaluation:
    """Score a model over a text file (or token ids), and against a base where one is named.

    format: round the weights to it as they are read; the checkpoint itself is then the base unless another is named.
    windows: at most so many; batch: windows run together; max_memory: bytes of hidden states kept in memory, the rest
    goes to a file; seed: of the bootstrap. dtype: None = as the base says. trust_remote_code: of both.
    """
    if format is not None and against is None:
        against = path
    with ExitStack() as stack, torch.no_grad():
        sources = [stack.enter_context(codecs.open(p, trust_remote_code)) for p in (path, against) if p is not None]
        for source in sources:
            refuse_on_errors(source.path, verify_source(source))
        base = Layers(sources[-1], dtype=DTYPES.get(str(dtype), dtype), device=device)
        all_layers = [base]
        if against is not None:
            of = sources[0] if format is None else rounded(sources[0], format)
            all_layers.insert(0, Layers(of, dtype=base.options.dtype, device=device))
            check_vocabularies(*all_layers)
        cut = chosen_windows(text, ids, tokenizer, sources[-1], context, windows)
        check_ids(base, cut.largest, max(map(len, cut.rows)))
        sums = _sums(all_layers, cut, batch, max_memory, stack, progress)
    if not bool(sums.isfinite().all()):
        raise CheckpointError(f"{path}: its logits over {cut.label} are not finite")
    found = estimates(by_document(sums, cut), FIGURES if against is not None else ALONE, seed, resamples)
    return Evaluation(
        str(path), None if against is None else str(against), None if format is None else told(format), cut.label,
        cut.digest, len(cut.rows), len(set(cut.documents)), context, cut.scored, str(base.options.dtype)[6:], **found,
    )  # fmt: skip


def _sums(
    all_layers: list[Layers], cut: Windows, batch: int | None, max_memory: int | None, stack: ExitStack,
    progress: Progress,
) -> Tensor:  # fmt: skip
    """-> [windows, COLUMNS], in the order of the windows."""
    batches = batched(cut, batch, all_layers[0].device)
    budget = None if max_memory is None else max_memory // len(all_layers)
    labels = ("model", "base") if len(all_layers) == 2 else ("layers",)
    stacked = cut.stacked(batches)
    runs = [run(m, stacked, stack, progress, label, budget) for m, label in zip(all_layers, labels, strict=True)]
    sums = torch.zeros(len(cut.rows), len(COLUMNS), dtype=torch.float64)
    for name in progress([str(i) for i in range(len(batches))], "scoring"):
        sums[batches[int(name)]] = scores(runs[0], runs[1] if len(runs) == 2 else None, int(name))
    return sums


def batched(cut: Windows, batch: int | None, device: torch.device) -> list[list[int]]:
    if batch is not None and batch < 1:
        raise RequestError(f"batch={batch}: at least one window runs at a time")
    tokens = TOKENS if device.type == "cpu" else TOKENS_ON_GPU
    return cut.batches(tokens if batch is None else batch * max(map(len, cut.rows)))


def chosen_windows(
    text: str | Path | None, ids: Tensor | Sequence[Tensor] | None, tokenizer: Any, base: Source, context: int,
    most: int | None,
) -> Windows:  # fmt: skip
    """The windows asked for; the tokenizer is the base's unless one is given."""
    if (text is None) == (ids is None):
        raise RequestError("evaluation runs over text=FILE (.txt, .jsonl, .parquet) or ids=TENSOR: give one of them")
    if text is None:
        return windows_of_ids(ids, context, most)
    return windows_of_text(text, tokenizer or tokenizer_of(base), context, most)


def by_document(sums: Tensor, cut: Windows) -> Tensor:
    order = {d: i for i, d in enumerate(dict.fromkeys(cut.documents))}
    place = torch.tensor([order[d] for d in cut.documents])
    return torch.zeros(len(order), sums.shape[1], dtype=sums.dtype).index_add_(0, place, sums)


def told(format: str | Format | Plan) -> str:
    return format if isinstance(format, str) else "a plan" if isinstance(format, Plan) else repr(format)


def mean(column: str) -> Figure:
    at = COLUMNS.index(column)
    return lambda sums: sums[..., at] / sums[..., 0]


ALONE: dict[str, Figure] = {"perplexity": lambda sums: mean("nll")(sums).exp()}
FIGURES = ALONE | {
    "base_perplexity": lambda sums: mean("base_nll")(sums).exp(),
    "kl": mean("kl"),
    "agreement": mean("agree"),
    "difference": lambda sums: mean("nll")(sums) - mean("base_nll")(sums),
}


def rows(found: Evaluation) -> list[tuple[str, str, str]]:
    """Rows for a table: (figure, value, 95 % interval)."""
    out = [row("perplexity", found.perplexity, ".3f")]
    if found.base_perplexity and found.difference and found.kl and found.agreement:
        d = found.difference
        low, high = (None if v is None else 100 * expm1(v) for v in (d.low, d.high))
        percent = Estimate(100 * expm1(d.value), low, high)
        out += [
            row("perplexity of the base", found.base_perplexity, ".3f"),
            row("perplexity increase, %", percent, "+.2f"),
            row("KL(base || model), nats per token", found.kl, ".5f"),
            row("top-1 agreement", found.agreement, ".4f"),
        ]
    return out


def row(name: str, estimate: Estimate, style: str) -> tuple[str, str, str]:
    if estimate.low is None or estimate.high is None:
        return name, f"{estimate.value:{style}}", "none: one document"
    return name, f"{estimate.value:{style}}", f"{estimate.low:{style}} to {estimate.high:{style}}"
