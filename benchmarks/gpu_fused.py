"""Kernels of a decoder layer and its time in a CUDA graph, as transformers defines it and with fused modules.

    python benchmarks/gpu_fused.py [--types llama,qwen3,gemma3_text] [--tokens 1,16,256] [--names]

Attention is left out (it gives its queries back), so that what is around it is measured. Random weights of an 8B's
shape in bf16. A layer is the difference of two depths, divided.
"""

import argparse
import gc
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fewbit.models import fuse, hf
from fewbit.models.fill import prepare, settle

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
DEPTHS = (2, 6)
STUB = "fewbit-no-attention"
REPLAYS = 30


def no_attention(module: nn.Module, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return query.transpose(1, 2), None


hf.register_unmasked_attention(STUB, no_attention)


def made(model_type: str, layers: int, fused: bool) -> Any:
    config = hf.read_config({"model_type": model_type, **SHAPE, "num_hidden_layers": layers})
    model = hf.build(config, torch.bfloat16, STUB)
    prepare(model)
    for module in model.modules():
        for name, held in module._parameters.items():
            if held is not None:
                noise = torch.randn(held.shape, dtype=held.dtype, device="cuda")
                value = noise * held.shape[-1] ** -0.5 if held.dim() > 1 else 1 + 0.1 * noise
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
    model.to("cuda")
    if fused:
        fuse.apply(model, fuse.plan(config))
    settle(model)
    return model


@torch.inference_mode()
def kernels(model: Any, ids: Tensor) -> Counter[str]:
    """Names of what one forward launches."""
    model(input_ids=ids, use_cache=False)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        model(input_ids=ids, use_cache=False)
        torch.cuda.synchronize()
    return Counter(e.name for e in seen.events() if e.device_type == DeviceType.CUDA)


@torch.inference_mode()
def microseconds(model: Any, ids: Tensor) -> float:
    """Of one replay of the captured forward."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            model(input_ids=ids, use_cache=False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(input_ids=ids, use_cache=False)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) * 1000 / REPLAYS


def layer(model_type: str, fused: bool, tokens: list[int]) -> tuple[Counter[str], dict[int, float]]:
    """What one layer launches, and how long it takes with so many tokens."""
    counts, times = [], []
    for depth in DEPTHS:
        model = made(model_type, depth, fused)
        inputs = {m: torch.randint(3, 1000, (1, m), device="cuda") for m in tokens}
        counts.append(kernels(model, inputs[tokens[0]]))
        times.append({m: microseconds(model, ids) for m, ids in inputs.items()})
        del model
        gc.collect()
        torch.cuda.empty_cache()
    by = DEPTHS[1] - DEPTHS[0]
    launched = Counter({n: round((c - counts[0][n]) / by, 2) for n, c in counts[1].items() if c > counts[0][n]})
    return launched, {m: (times[1][m] - times[0][m]) / by for m in tokens}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--types", default="llama,qwen3,gemma3_text")
    parser.add_argument("--tokens", default="1,16,256")
    parser.add_argument("--names", action="store_true", help="what the fused layer launches")
    asked = parser.parse_args()
    tokens = [int(m) for m in asked.tokens.split(",")]
    print(f"{torch.cuda.get_device_name()}; per decoder layer without attention, bf16")
    print(f"{'type':12} {'':8} {'kernels':>7} " + " ".join(f"{f'us M={m}':>9}" for m in tokens))
    for model_type in asked.types.split(","):
        for fused in (False, True):
            said = "fused" if fused else "plain"
            try:
                launched, times = layer(model_type, fused, tokens)
            except Exception as error:  # one type that fails leaves the others their rows
                print(f"{model_type:12} {said:8} {type(error).__name__}: {error}")
                continue
            row = " ".join(f"{times[m]:9.1f}" for m in tokens)
            print(f"{model_type:12} {said:8} {sum(launched.values()):7.1f} {row}", flush=True)
            if asked.names and fused:
                print("\n".join(f"    {n:5} {name[:100]}" for name, n in launched.items()))


if __name__ == "__main__":
    main()
