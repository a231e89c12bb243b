"""How far fewbit's logits are from a checkpoint's stored reference: the rows of `make fixtures`.

We compute in the reference's own dtype. Where activations are rounded, a difference in the last bit of an input moves
some of it by a whole step of the format, so no bound holds for every format: we measure, in the same run, how far our
own logits move under the reference's kind of noise, and allow three times that. The smallest bound is 1e-3.

* float32, activations rounded: our embeddings with relative noise of 3e-7.
* bfloat16: our bfloat16 against our float32.
* two references that should be equal (no rounding of activations): how far they are from each other.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewbit
from fewbit.files.safetensors import open_safetensors

LEAST = 1e-3
WEIGHTS = {"float32": 1e-3, "bfloat16": 1e-2}  # the tools decode weights in their compute dtype: 2**-9 each
NOISE = 3e-7


@dataclass(frozen=True)
class Row:
    """One line of the table. `quantized`: activations as declared; `weights`: weights only."""

    name: str
    dialect: str
    dtype: str
    quantized: float
    bound: float
    weights: float | None

    @property
    def ok(self) -> bool:
        return self.quantized <= self.bound and (self.weights is None or self.weights <= WEIGHTS[self.dtype])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def checkpoint_of(folder: Path) -> Path:
    """The folder, or the GGUF file in it."""
    return next(iter(sorted(folder.glob("*.gguf"))), folder)


def compare(folder: Path) -> Row:
    """Load a fixture both ways and hold it against its reference."""
    with open_safetensors(folder / "reference.safetensors") as file:
        stored = {name: file.read(name) for name in file.tensors if name.startswith(("logits", "input_ids"))}
    meta = json.loads((folder / "meta.json").read_text())
    ids, want, plain = stored["input_ids"], stored["logits_quantized"], stored.get("logits_dequantized_weights")
    wide = not any(word in str(meta["reference"]) for word in ("bf16", "bfloat16"))
    path = checkpoint_of(folder)
    model = fewbit.load(path, dtype=torch.float32)
    ours = logits(model, ids)
    if wide:
        own = relative(noisy(model, ids), ours)
    else:
        narrow = logits(fewbit.load(path, dtype=torch.bfloat16), ids)
        own, ours = relative(narrow, ours), narrow
    if meta["activations_quantized_in_reference"] is False and plain is not None:
        own = max(own, relative(plain, want))
    weights = None
    if plain is not None:
        weights = relative(logits(fewbit.load(path, dtype=torch.float32, activations="off"), ids), plain)
    dtype, dialect = "float32" if wide else "bfloat16", fewbit.inspect(path).dialect
    return Row(folder.name, dialect, dtype, relative(ours, want), max(LEAST, 3 * own), weights)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids).logits


def noisy(model: Any, ids: Tensor) -> Tensor:
    """Our logits when the embeddings are off in their last bit."""
    with torch.inference_mode():
        embedded = model.get_input_embeddings()(ids)
        noise = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(0))
        return model(inputs_embeds=embedded * (1 + NOISE * noise)).logits


def table(rows: list[Row]) -> str:
    """The table that `make fixtures` prints."""
    lines = [f"{'checkpoint':46s} {'dialect':18s} {'reference':9s} {'quantized':>10s} {'bound':>9s} {'weights':>10s}"]
    for r in rows:
        weights = "-" if r.weights is None else f"{r.weights:.2e}"
        mark = "" if r.ok else "  <-- over"
        numbers = f"{r.quantized:10.2e} {r.bound:9.2e} {weights:>10s}{mark}"
        lines.append(f"{r.name:46s} {r.dialect:18s} {r.dtype:9s} {numbers}")
    return "\n".join(lines)
