"""INC on a GPU: measured as on a CPU, real FP8 where the number type is the card's, weights that arrive quantized."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fewbit import LLM, SamplingParams
from fewbit.inc.session import Session
from fewbit.models.build import load
from tests.inc.test_engine import PROMPTS, config, nodes
from tests.models import saved
from tests.tiny import llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
TYPES = ("llama", "qwen3", "gemma3_text", "mixtral")
ATTENTION = {"types": ["Matmul", "Softmax", "ModuleFusedSDPA"]}


def run(path: Path, quant: Path, device: str, **options: Any) -> tuple[list[list[int]], dict[str, Any]]:
    options = {"max_model_len": 64, "max_num_seqs": 4, "dtype": "float32", **options}
    llm = LLM(str(path), quantization="inc", quant_config=str(quant), device=device, **options)
    found = llm.generate(PROMPTS, SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    facts = llm.llm_engine.facts()
    llm.llm_engine.model_executor.shutdown()
    return [list(one.outputs[0].token_ids) for one in found], facts


ENCODED = 24  # bytes of a value at most while it is encoded, with what that makes on the way


@pytest.mark.parametrize("name", TYPES)
def test_measured_as_on_a_cpu(name: str, tmp_path: Path) -> None:
    path = saved.save(saved.model(name), tmp_path / name)
    held = []
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        run(path, config(tmp_path / device, mode="MEASURE"), device)
        held.append(nodes(tmp_path / device))
    assert held[0].keys() == held[1].keys()
    for key, node in held[0].items():
        for x, y in zip(node["inputs"], held[1][key]["inputs"], strict=True):
            assert y[0][0] == pytest.approx(x[0][0], rel=1e-3), key
    quant = config(tmp_path / "cpu", device_for_scales="GAUDI2")
    texts = [run(path, quant, device, kv_cache_dtype="fp8_inc")[0] for device in ("cpu", "cuda")]
    assert texts[0] == texts[1]


def test_real_fp8(tmp_path: Path) -> None:
    """Gaudi 3's e4m3 is the card's: cuBLASLt multiplies it, under CUDA graphs where attention is left to kernels."""
    path = llama(tmp_path / "model")
    run(path, config(tmp_path, mode="MEASURE"), "cuda", dtype="bfloat16")
    _, facts = run(path, config(tmp_path, blocklist=ATTENTION), "cuda", dtype="bfloat16")
    rows = {row["format"]: row["kernel"] for row in facts["kernels"]}
    assert rows["fp8-tensor-static"] not in ("reference", "triton"), rows
    assert "attention" not in facts


def test_weights_arrive_quantized(tmp_path: Path) -> None:
    """The most that the card ever holds is what it holds at the end, and one matrix while it is encoded there."""
    path = llama(tmp_path / "model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, head_dim=128,
                 num_attention_heads=8, num_key_value_heads=8)  # fmt: skip
    quant = config(tmp_path, scale_method="unit_scale", blocklist=ATTENTION)
    session = Session(quant)
    session.plan(path, cached=False)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load(path, device="cuda", format=session.arrives)
    peak = torch.cuda.max_memory_allocated() - before
    sizes = [a.numel() for n, a in load_file(path / "model.safetensors").items() if "proj" in n or "lm_head" in n]
    linears = sum(sizes)
    others = sum(p.nbytes for p in model.parameters() if p.device.type == "cuda")
    assert peak < linears * 1.1 + others + ENCODED * max(sizes) < 2 * linears
