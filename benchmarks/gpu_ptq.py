"""A random model of Llama-3.1-8B's shape, quantized on a GPU from disk to disk: seconds of each way, and of its phases.

    PYTHONPATH=. python benchmarks/gpu_ptq.py FOLDER [--ways gptq,rtn] [--layers 32] [--samples 128] [--length 2048]

FOLDER needs room for 16 GB of bf16 and what is written from it. The model is made there once. Prints first what the
disk gives without us; then a line for each way, and under it the seconds of its phases over all threads.
"""

import argparse
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from phases import disk_speed, measured

from fewbit.files.shard import Part, write_shard
from fewbit.workflows.quantize import quantize

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WAYS = {"gptq": ("W4A16", "gptq"), "rtn": ("W4A16", "rtn"), "fp8": ("FP8_DYNAMIC", "rtn"), "nvfp4": ("NVFP4A16", "rtn"),
        "awq": ("W4A16", "awq"), "hqq": ("W4A16", "hqq")}  # fmt: skip


def shapes(layers: int) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each shard: everything else, then one layer each."""
    h, i, kv = 4096, 14336, 1024
    out: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (128256, h), "lm_head.weight": (128256, h), "model.norm.weight": (h,)}
    ]
    for n in range(layers):
        p = f"model.layers.{n}."
        out.append({
            p + "self_attn.q_proj.weight": (h, h), p + "self_attn.k_proj.weight": (kv, h),
            p + "self_attn.v_proj.weight": (kv, h), p + "self_attn.o_proj.weight": (h, h),
            p + "mlp.gate_proj.weight": (i, h), p + "mlp.up_proj.weight": (i, h), p + "mlp.down_proj.weight": (h, i),
            p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,),
        })  # fmt: skip
    return out


def make(folder: Path, layers: int, device: str) -> Path:
    """The model, if it is not there yet: every shard by a thread, synced, so that nothing is left to be written."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    held = shapes(layers)
    names = [f"model-{n:05d}-of-{len(held):05d}.safetensors" for n in range(1, len(held) + 1)]

    def shard(n: int) -> None:
        generator = torch.Generator(device).manual_seed(n)
        parts = {key: Part("BF16", shape, partial(noise, shape, generator)) for key, shape in held[n].items()}
        write_shard(folder / names[n], parts)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(shard, range(len(held))))
    index = {key: name for name, tensors in zip(names, held, strict=True) for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    return folder


def noise(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    found = torch.randn(shape, generator=generator, device=generator.device)
    return (found.mul_(shape[-1] ** -0.5) if len(shape) == 2 else 1 + 0.1 * found).bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ways", default="rtn,fp8,nvfp4,gptq")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    begun = time.monotonic()
    model = make(given.folder / "model", given.layers, given.device)
    print(f"model made in {time.monotonic() - begun:.0f} s", flush=True)
    files = sorted(model.glob("*.safetensors"))
    size = sum(p.stat().st_size for p in files)
    print(f"disk: {disk_speed(given.folder, files[0])}", flush=True)
    ids = torch.randint(0, 128000, (given.samples, given.length), generator=torch.Generator().manual_seed(1))
    for way in given.ways.split(","):
        form, algo = WAYS[way]
        out = given.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        try:
            with measured() as clock:
                done = quantize(model, out, form, algo=algo, calib=list(ids), samples=given.samples,
                                length=given.length, device=given.device, report=False)  # fmt: skip
        except Exception as error:
            print(f"{way}\t{type(error).__name__}: {error}", flush=True)
            continue
        written = sum(p.stat().st_size for p in out.glob("*.safetensors"))
        device = torch.cuda.max_memory_allocated() / 2**30 if given.device == "cuda" else 0
        print(f"{way}\t{form} by {algo}\t{done.seconds:.1f} s\t{size / done.seconds / 1e9:.2f} GB/s read\t"
              f"{written / 1e9:.2f} GB written\thost peak {done.memory / 2**30:.2f} GiB\tdevice peak {device:.2f} GiB"
              f"\n\t{clock}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
