"""The peers' FP8, NVFP4, MX and integer checkpoints: decoded rows, logits of decoded weights, logits as they run.

A bound is 1e-3 where the reference ran in float32. Elsewhere it says what the reference did: ran in bf16 (2**-9 a
rounding, some 1e-2 of logits after two layers), or rounded inputs that bf16 had already moved: a code that flips is a
whole step, so the two are like two roundings of the same inputs, each as far from the unrounded model as the other and
at most sqrt(2) times that apart (WHOLE).
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit import codecs
from fewbit.codecs import Source
from fewbit.quant.reference import fake_quant
from tests.codecs.common import build, logits, open_source, reference, relative, sampled

EXACT, F32, BF16, WHOLE = 1e-6, 1e-3, 2e-2, -(2**0.5)
STEP = 0.15  # rows taken from the model before export: bf16 arithmetic put some codes on the other side of a tie
# name -> bounds of the rows, of the logits of decoded weights, of the logits as they run
BOUNDS: dict[str, tuple[float, float, float]] = {
    "ct-fp8-block-llama": (EXACT, F32, F32),
    "ct-fp8-dynamic-kvfp8-qwen2": (EXACT, F32, F32),
    "ct-fp8-static-llama": (EXACT, F32, F32),
    "ct-mixed-w4a16mlp-fp8attn-llama": (EXACT, F32, F32),
    "ct-mxfp4a16-llama": (EXACT, F32, BF16),
    "ct-nvfp4-llama": (2**-8, 2**-8, WHOLE),  # the library decodes FP4 in bf16
    "ct-old-sparse24-fp8dyn-llama": (EXACT, F32, F32),
    "ct-old-w4a16-g64-actorder-group-llama": (EXACT, F32, F32),
    "ct-w4a16-asym-awq-llama": (EXACT, F32, F32),
    "ct-w4a16-g128-qwen3moe": (EXACT, 2**-9, 2**-8),  # the reference held its experts in bf16
    "ct-w4a16-g128-sym-gptq-actorder-weight-qwen2": (EXACT, F32, F32),
    # scale = amax / 127.5: the largest value of each token lies on a tie between codes, and the last bit decides; the
    # library itself is 8.4e-3 from its reference on another machine
    "ct-w8a8-int8-dynamic-smoothquant-llama": (EXACT, F32, 1 / 127.5 * 2),
    "fp8-autofp8-static-kvscale-llama": (EXACT, F32, F32),
    "fp8-deepseek-block-llama": (EXACT, F32, F32),
    "fp8-gptqmodel-row-llama": (EXACT, F32, F32),
    "modelopt-fp8-kvfp8-llama": (STEP, F32, WHOLE),
    "modelopt-fp8-pb-wo-llama": (2**-8, F32, BF16),
    "modelopt-fp8-pc-pt-qwen2": (STEP, F32, WHOLE),
    "modelopt-int4-awq-llama": (0.35, F32, BF16),  # rows before smoothing, and bf16
    "modelopt-mixed-fp8-nvfp4-auto-llama": (2**-8, F32, WHOLE),
    "modelopt-nvfp4-kvfp8-llama": (2**-8, F32, WHOLE),
    "modelopt-nvfp4-qwen3moe": (EXACT, F32, WHOLE),
    "modelopt-w4a8-awq-llama": (EXACT, F32, WHOLE),  # and its weights passed through FP8 once more
}


@pytest.mark.parametrize("name", BOUNDS)
def test_rows_and_logits(name: str) -> None:
    rows, dequantized, quantized = BOUNDS[name]
    with open_source(name) as source:
        found = sampled(name, source)
        assert min(found.values()) <= max(EXACT, rows if rows < STEP else 0), found
        assert max(found.values()) <= rows, found
        stored, plain = reference(name), logits(name, source, activations=False)
        if "logits_dequantized_weights" in stored:
            assert relative(plain, stored["logits_dequantized_weights"]) <= dequantized
        bound = quantized if quantized > 0 else -quantized * relative(plain, stored["logits_quantized"])
        got = relative(running(name, source), stored["logits_quantized"])
        assert got <= bound, f"{got} over {bound}"


def running(name: str, source: Source) -> Tensor:
    """Logits with inputs rounded, and the cache where the config says so."""
    if source.plan.kv is None:
        return logits(name, source, activations=True)
    from transformers import DynamicCache

    class Rounded(DynamicCache):
        def update(self, k: Tensor, v: Tensor, layer: int, *args: Any, **more: Any) -> Any:
            return super().update(rounded(k, layer, "k"), rounded(v, layer, "v"), layer, *args, **more)

    def rounded(x: Tensor, layer: int, of: str) -> Tensor:
        scale = source.read(source.kv[f"model.layers.{layer}.self_attn"][of])
        assert isinstance(scale, Tensor) and source.plan.kv is not None
        return fake_quant(x, source.plan.kv, {"scale0": scale.float().view(1, 1)})

    with torch.no_grad():
        return build(source, activations=True)(reference(name)["input_ids"], past_key_values=Rounded()).logits


def test_no_tensor_of_a_fixture_is_left_over() -> None:
    for name in BOUNDS:
        with open_source(name) as source:
            assert not source.surplus and source.dialect in codecs.CODECS, name
            held = {t for entry in source.modules.values() for t in entry.tensors}
            cache = {t for scales in source.kv.values() for t in scales.values()}
            assert held | cache | set(source.dense) == set(source.checkpoint.tensors), name
            assert all(info.dtype in ("BF16", "F32", "F16") for info in source.dense.values()), name
            assert source.plan.idle([*source.modules, *(n.removesuffix(".weight") for n in source.dense)]) == [], name
