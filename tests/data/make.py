"""Cuts the full fixtures down to what this folder holds: one module of each, as its tool wrote it, with the rows that
the tool itself decoded; and the smallest whole checkpoint. Run from the repository: python tests/data/make.py FIXTURES
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
WHOLE = "gguf-q2_k-llamacpp-qwen2"
MODULE = "model.layers.0.self_attn.k_proj"
CONFIGS = ("config.json", "quantize_config.json", "hf_quant_config.json", "quantization_config.json")


def cut(source: Path) -> None:
    """One module of a safetensors fixture."""
    target = HERE / source.name
    target.mkdir(exist_ok=True)
    for name in CONFIGS:
        if (source / name).exists():
            shutil.copy(source / name, target / name)
    with safe_open(source / "model.safetensors", "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys() if k.startswith(MODULE + ".")}  # noqa: SIM118
    reference = load_file(source / "reference.safetensors")
    rows = {k: v[:8].clone() for k, v in reference.items() if k.startswith(f"dequantized.{MODULE}")}
    if not rows:
        return shutil.rmtree(target)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return save_file(rows, target / "expected.safetensors")


def whole(source: Path) -> None:
    """A complete checkpoint with its logits."""
    target = HERE / source.name
    target.mkdir(exist_ok=True)
    for file in (*source.glob("*.gguf"), source / "meta.json"):
        shutil.copy(file, target / file.name)
    reference = load_file(source / "reference.safetensors")
    kept = {k: v for k, v in reference.items() if k in ("input_ids", "logits_quantized")}
    save_file(kept, target / "reference.safetensors")


def main(fixtures: Path) -> None:
    whole(fixtures / WHOLE)
    for folder in sorted(p.parent for p in fixtures.glob("*/model.safetensors")):
        cut(folder)
    total = sum(p.stat().st_size for p in HERE.rglob("*") if p.is_file())
    print(json.dumps({"bytes": total, "folders": len(list(HERE.iterdir()))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
