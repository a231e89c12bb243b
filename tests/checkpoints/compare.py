"""How far fewbit's logits are from a checkpoint's stored reference: the rows of `make fixtures`."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import fewbit
from fewbit.files.safetensors import open_safetensors

# Largest relative error (Frobenius) per kind of reference; the reference's own arithmetic is what the bound is for.
# fp32: the reference ran in float32 with the same activation rounding.
# bf16: the reference ran in bfloat16 (2**-9 per operation, some 60 roundings deep), no activation rounding.
# bf16+act: activations rounded as well: an input that bf16 moves across an edge moves by one step of the format.
BOUNDS = {"fp32": 1e-3, "bf16": 2e-2, "bf16+act": 8e-2}


@dataclass(frozen=True)
class Row:
    """One line of the table. `quantized`: with activations as declared; `weights`: weights only."""

    name: str
    dialect: str
    kind: str
    quantized: float
    bound: float
    weights: float | None

    @property
    def ok(self) -> bool:
        return self.quantized <= self.bound and (self.weights is None or self.weights <= BOUNDS["fp32"])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def checkpoint_of(folder: Path) -> Path:
    """The folder, or the GGUF file in it."""
    return next(iter(sorted(folder.glob("*.gguf"))), folder)


def kind_of(meta: dict[str, object]) -> str:
    """What arithmetic the stored reference used, as its meta.json tells."""
    reference = str(meta["reference"])
    wide = "bf16" not in reference and "bfloat16" not in reference
    if wide:
        return "fp32"
    return "bf16" if meta["activations_quantized_in_reference"] is False else "bf16+act"


def compare(folder: Path) -> Row:
    """Load a fixture both ways and hold it against its reference."""
    with open_safetensors(folder / "reference.safetensors") as file:
        stored = {name: file.read(name) for name in file.tensors if name.startswith(("logits", "input_ids"))}
    meta = json.loads((folder / "meta.json").read_text())
    path = checkpoint_of(folder)
    quantized = relative(logits(path, stored["input_ids"]), stored["logits_quantized"])
    weights = None
    if "logits_dequantized_weights" in stored:
        weights = relative(logits(path, stored["input_ids"], "off"), stored["logits_dequantized_weights"])
    kind = kind_of(meta)
    return Row(folder.name, fewbit.inspect(path).dialect, kind, quantized, BOUNDS[kind], weights)


def logits(path: Path, ids: Tensor, activations: str = "declared") -> Tensor:
    model = fewbit.load(path, dtype=torch.float32, activations=activations)
    with torch.inference_mode():
        return model(ids).logits


def table(rows: list[Row]) -> str:
    """The table that `make fixtures` prints."""
    head = f"{'checkpoint':48s} {'dialect':18s} {'reference':9s} {'quantized':>10s} {'bound':>7s} {'weights':>10s}"
    lines = [head]
    for r in rows:
        weights = "-" if r.weights is None else f"{r.weights:.2e}"
        mark = "" if r.ok else "  <-- over"
        lines.append(
            f"{r.name:48s} {r.dialect:18s} {r.kind:9s} {r.quantized:10.2e} {r.bound:7.0e} {weights:>10s}{mark}"
        )
    return "\n".join(lines)
