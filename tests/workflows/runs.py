"""Made-up runs for the report: a plain one with every part, a mixture of experts, and one full of hostile words."""

import math
import random
from typing import Any

NAME = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
KINDS = {
    "self_attn.q_proj": (2048, 2048, 0.9), "self_attn.k_proj": (512, 2048, 0.8), "self_attn.v_proj": (512, 2048, 1.2),
    "self_attn.o_proj": (2048, 2048, 1.4), "mlp.gate_proj": (5632, 2048, 1.0), "mlp.up_proj": (5632, 2048, 1.1),
    "mlp.down_proj": (2048, 5632, 1.6),
}  # fmt: skip

DISTRIBUTIONS = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj", "model.layers.11.mlp.gate_proj")


def run(layers: int = 22, seed: int = 0) -> dict[str, Any]:
    """Everything a run can hold, about the size of a small Llama."""
    rng = random.Random(seed)
    modules = [module(rng, n, layers, kind) for n in range(layers) for kind in KINDS]
    modules.append(
        {"name": "lm_head", "layer": None, "kind": "lm_head", "format": "int8-channel", "algo": "rtn",
         "shape": [32000, 2048], "bits": 8.0, "error": 0.0021, "seconds": 1.4, "rule": "recipe 're:.*lm_head'"}
    )  # fmt: skip
    return {
        "title": "TinyLlama-1.1B-Chat, int4-g128",
        "version": "0.2.0",
        "created": "2026-03-14 15:09",
        "command": f"fewbit quantize {NAME} --format int4-g128 --algo gptq -o out/TinyLlama-1.1B-int4",
        "recipe": RECIPE,
        "format": "int4-g128",
        "algo": "gptq",
        "dialect": "compressed-tensors",
        "out": "out/TinyLlama-1.1B-int4",
        "error_means": "relative output error",
        "model": {
            "name": NAME, "base": NAME,
            "architecture": "LlamaForCausalLM", "model_type": "llama", "parameters": 1_100_048_384, "layers": layers,
            "dtype": "bf16", "licence": {"license": "apache-2.0"},
        },
        "sizes": {
            "before": 2_200_119_864, "after": 713_000_000, "bits_per_weight": 5.185, "quantized_bits_per_weight": 4.125,
            "parts_before": [{"format": "bf16", "bytes": 2_200_119_864}],
            "parts_after": [
                {"format": "int4-g128", "bytes": 500_171_776}, {"format": "int8-channel", "bytes": 65_664_000},
                {"format": "bf16", "bytes": 147_164_224},
            ],
        },
        "modules": modules,
        "layers": [layer(rng, n, layers) for n in range(layers)],
        "coverage": {
            "source": "fewbit's own text: English, code, four other languages", "licence": "CC0-1.0",
            "tokens": 65_536, "documents": 41,
            "samples": 128, "lengths": [512] * 128, "digest": "sha256:5f0c1b0c6f3b9e0d",
            "dead": [{"name": "model.layers.0.mlp.down_proj", "dead": 13, "channels": 5632},
                     {"name": "model.layers.1.mlp.down_proj", "dead": 2, "channels": 5632}],
        },
        "evaluation": EVALUATION,
        "timing": {
            "total": 412.0, "memory": 2_310_000_000, "device": "cpu, 2 cores",
            "stages": {"read": 6.2, "calibration": 131.0, "codes": 242.0, "write": 12.1, "evaluation": 20.7},
        },
        "predictions": [
            {"what": "size", "predicted": 712_640_000, "actual": 713_000_000, "unit": "bytes", "tolerance": 0.01},
            {"what": "peak memory", "predicted": 2.15e9, "actual": 2.31e9, "unit": "bytes", "tolerance": 0.2},
            {"what": "time", "predicted": 260.0, "actual": 412.0, "unit": "seconds", "tolerance": 0.5},
        ],
        "distributions": [distribution(rng, name) for name in DISTRIBUTIONS],
        "digests": {"model.safetensors": "9b" * 32, "config.json": "4e" * 32},
        "environment": {"python": "3.11.9", "torch": "2.13.0", "cpu": "2 cores, avx512_vnni", "threads": 2},
        "warnings": ["model.layers.1.mlp.down_proj: damping raised from 0.01 to 0.08 (3 tries)"],
    }  # fmt: skip


def module(rng: random.Random, n: int, layers: int, kind: str) -> dict[str, Any]:
    rows, cols, weight = KINDS[kind]
    depth = 1 + 1.2 * math.exp(-n) + 0.6 * (n / layers) ** 2
    error = 0.006 * weight * depth * rng.uniform(0.8, 1.25) * (4 if (n, kind) == (1, "mlp.down_proj") else 1)
    rtn = error * rng.uniform(1.4, 2.6) * 40
    damp = 0.08 if (n, kind) == (1, "mlp.down_proj") else 0.02 if rng.random() < 0.06 else 0.01
    found = {
        "name": f"model.layers.{n}.{kind}", "layer": n, "kind": kind, "format": "int4-g128", "algo": "gptq",
        "shape": [rows, cols], "bits": 4.125, "bytes": rows * cols * 4125 // 8000, "error": error, "loss": error * 40,
        "rtn_loss": rtn, "damp": damp, "seconds": rows * cols / 6e6 * rng.uniform(0.9, 1.1),
        "rule": "format 'int4-g128'",
    }  # fmt: skip
    return found | ({"note": f"damping raised to {damp}"} if damp > 0.01 else {})


def layer(rng: random.Random, n: int, layers: int) -> dict[str, Any]:
    return {
        "name": f"model.layers.{n}", "layer": n, "seconds": 17 + rng.uniform(-1, 1) + (4 if n == 0 else 0),
        "memory": int(1.9e9 + 1.2e7 * n + rng.uniform(0, 2e7)), "error": 0.004 + 0.0011 * n * rng.uniform(0.9, 1.1),
    }  # fmt: skip


def distribution(rng: random.Random, name: str) -> dict[str, Any]:
    before = [int(4e5 * math.exp(-((i - 31.5) ** 2) / 90)) + rng.randrange(20) for i in range(64)]
    after = [int(n * (1.25 if i % 3 else 0.45) * rng.uniform(0.9, 1.1)) for i, n in enumerate(before)]
    return {"module": name, "low": -0.31, "high": 0.31, "before": before, "after": after}


EVALUATION = [
    {"metric": "perplexity", "text": "wikitext", "base": 12.31, "value": 12.53, "low": 12.49, "high": 12.58,
     "change": 0.0179, "change_low": 0.0146, "change_high": 0.0219, "tokens": 65536, "documents": 62},
    {"metric": "perplexity", "text": "code", "base": 3.214, "value": 3.266, "change": 0.0162, "change_low": 0.0094,
     "change_high": 0.0237, "tokens": 32768, "documents": 40},
    {"metric": "perplexity", "text": "German", "base": 9.41, "value": 9.74, "change": 0.0351, "change_low": 0.0262,
     "change_high": 0.0448, "tokens": 32768, "documents": 35},
    {"metric": "KL divergence", "text": "wikitext", "value": 0.0213, "low": 0.0201, "high": 0.0228},
    {"metric": "KL divergence", "text": "code", "value": 0.0154, "low": 0.0139, "high": 0.0171},
    {"metric": "top-1 agreement", "text": "wikitext", "value": 0.931, "low": 0.926, "high": 0.936, "share": True},
]  # fmt: skip

RECIPE = """version: 1
format: int4-g128
algo:
  name: gptq
  act_order: static
rules:
  - modules: re:.*lm_head
    format: int8-channel
    algo: rtn
"""


def mixture(layers: int = 16, experts: int = 32, seed: int = 1) -> dict[str, Any]:
    """A mixture of experts: three modules for each expert, some of which saw too few tokens; no evaluation."""
    rng = random.Random(seed)
    modules, seen = [], []
    for n in range(layers):
        tokens = [
            int(2048 * rng.paretovariate(1.3)) if rng.random() > 0.03 else rng.randrange(40) for _ in range(experts)
        ]
        seen.append({"layer": n, "tokens": tokens})
        modules += [module(rng, n, layers, kind) for kind in list(KINDS)[:4]]
        for e in range(experts):
            for kind in ("gate_proj", "up_proj", "down_proj"):
                made = module(rng, n, layers, f"mlp.{kind}") | {
                    "kind": f"mlp.experts.{kind}",
                    "name": f"model.layers.{n}.mlp.experts.{e}.{kind}",
                }
                modules.append(made | {"format": "nvfp4" if n % 2 else "fp8-block"})
    whole = run(layers, seed)
    coverage = whole["coverage"] | {
        "experts": seen,
        "least_tokens": 64,
        "policy": "weights-only",
        "lengths": [rng.randrange(60, 513) for _ in range(128)],
    }
    kept = {k: v for k, v in whole.items() if k not in ("evaluation", "predictions", "distributions", "warnings")}
    return kept | {"modules": modules, "coverage": coverage, "title": "Mixture"}


EVIL = '<script>window.hacked = 1</script>"\'&</script><img src=x onerror="window.hacked = 2"><!--'


def hostile() -> dict[str, Any]:
    """Every word that can come from a stranger is an attempt to break out; some numbers are none."""
    return spoil(run(3))


def spoil(value: Any) -> Any:
    keep = {"metric": 1}
    if isinstance(value, dict):
        return {k: spoil(v) if k not in keep else v + EVIL for k, v in value.items()} | (
            {EVIL: "x"} if "python" in value else {}
        )
    if isinstance(value, list):
        return [spoil(v) for v in value]
    if isinstance(value, float) and value in (0.0021, 1.4):
        return math.nan
    return value + EVIL if isinstance(value, str) else value
