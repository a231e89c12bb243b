"""What the peers' tools wrote in integers, against the rows and logits that their own code gives for it."""

from dataclasses import replace

import pytest
from torch import Tensor

from fewbit.quant.qtensor import QTensor, Quantized
from tests.codecs import common

PLAIN = common.effective
GPTQ = (
    "gptq-v2-w4-g64-asym-qwen2", "gptq-w3-g128-sym-llama", "gptq-w4-g128-dynamic-llama", "gptq-w4-g128-mixtral",
    "gptq-w4-g128-sym-descact-llama", "gptq-w8-g128-sym-qwen2",
)  # fmt: skip
# reference -> which logits it stores, and how far float32 arithmetic on our weights may be from them
FLOAT32 = {"autoawq-gemm-w4-g128-llama": "logits_quantized", "autoround-mixedbits-llama": "logits_dequantized_weights"}
# bfloat16 rounds weights and scales by 2**-9 each at most: GPTQModel's rows are that far from the file's own numbers
ROUNDED_ROWS = 2.0**-7
ROUNDED_LOGITS = 2e-2


def rounded(q: Quantized) -> Tensor:
    """The weight as a bfloat16 runtime computes it: scales rounded first, then each product."""
    scale = q.weight.planes["scale0"].bfloat16().to(q.weight.planes["scale0"].dtype)
    weight = QTensor(q.weight.spec, q.weight.shape, q.weight.planes | {"scale0": scale})
    return PLAIN(replace(q, weight=weight)).bfloat16().float()


@pytest.mark.parametrize("name", [*GPTQ, *FLOAT32, "bnb-nf4-llama", "bnb-int8-llama"])
def test_every_tensor_has_a_place(name: str) -> None:
    with common.open_source(name) as source:
        assert source.modules and not source.surplus and not source.explicit
        assert {"lm_head.weight", "model.embed_tokens.weight"} <= source.dense.keys()
        assert not source.plan.idle([*source.modules, *(n.removesuffix(".weight") for n in source.dense)])


@pytest.mark.parametrize("name", GPTQ)
def test_gptq_in_the_runtime_s_own_arithmetic(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly the rows GPTQModel decodes, once we round as it does; and its logits from all of them."""
    with common.open_source(name) as source:
        rows = common.sampled(name, source)
        assert rows and max(rows.values()) <= ROUNDED_ROWS
        far = common.relative(common.logits(name, source, False), common.reference(name)["logits_quantized"])
        monkeypatch.setattr(common, "effective", rounded)
        assert set(common.sampled(name, source).values()) == {0.0}
        near = common.relative(common.logits(name, source, False), common.reference(name)["logits_dequantized_weights"])
    assert near <= 1e-5 and far <= ROUNDED_LOGITS, (near, far)


@pytest.mark.parametrize("name", FLOAT32)
def test_float32_references(name: str) -> None:
    with common.open_source(name) as source:
        assert set(common.sampled(name, source).values()) == {0.0}
        gap = common.relative(common.logits(name, source, False), common.reference(name)[FLOAT32[name]])
    assert gap <= 1e-5, gap


def test_nf4(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "bnb-nf4-llama"
    with common.open_source(name) as source:
        gap = common.relative(common.logits(name, source, False), common.reference(name)["logits_quantized"])
        monkeypatch.setattr(common, "effective", lambda q: PLAIN(q).bfloat16().float())
        assert set(common.sampled(name, source).values()) == {0.0}
    assert gap <= ROUNDED_LOGITS, gap


def test_int8() -> None:
    """The reference rounds its input too (LLM.int8) and runs in bfloat16: a code off is 1/127 of a row's largest."""
    name = "bnb-int8-llama"
    with common.open_source(name) as source:
        assert max(common.sampled(name, source).values()) <= 1e-6
        gap = common.relative(common.logits(name, source, False), common.reference(name)["logits_quantized"])
    assert gap <= 3e-2, gap
