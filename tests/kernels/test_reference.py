"""The reference kernel is quant.reference.linear, however it cuts the weight."""

import pytest
import torch

from fewbit.errors import SpecError, UnsupportedError
from fewbit.kernels import registry, torch_dequant
from fewbit.kernels.registry import FLOATS, KERNELS, Kernel
from fewbit.kernels.select import select
from fewbit.quant.formats import FORMATS
from fewbit.quant.qtensor import Quantized, Transform, stack
from fewbit.quant.reference import encode, linear
from fewbit.quant.spec import Format

CPU = torch.device("cpu")
NAMES = [
    "int8-tensor", "int4-g32", "int3-g128-asym", "fp8-channel", "fp8-block", "fp8-1x128", "mxfp4", "mxfp6-e3m2",
    "nvfp4", "nf4", "nf4-dq", "q4_k", "q6_k", "q8_0", "iq4_nl", "int8-channel-a8",
]  # fmt: skip


def weights(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) / shape[-1] ** 0.5


def quantized(name: str, shape: tuple[int, int]) -> Quantized:
    return Quantized(FORMATS[name], encode(weights(shape), FORMATS[name].weight))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [1 << 8, 1 << 14, 1 << 30])
def test_equals_the_oracle(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_dequant, "CHUNK", chunk)
    q = quantized(name, (384, 256))
    x, bias = torch.randn(3, 5, 256), torch.randn(384)
    packed = torch_dequant.prepack_linear(q)
    assert sum(run.shape[-2] for run in packed.runs) == 384
    torch.testing.assert_close(torch_dequant.run_linear(x, packed, bias), linear(x, q, bias), rtol=1e-5, atol=1e-5)


def test_small_chunks_do_cut() -> None:
    q = quantized("int4-g32", (3000, 1024))
    assert len(torch_dequant.prepack_linear(q).runs) > 1


def test_transforms() -> None:
    q = quantized("int4-g32", (96, 128))
    rotation = torch.linalg.qr(torch.randn(32, 32))[0]
    transforms = (
        Transform("permute", {"index": torch.randperm(128)}),
        Transform("input_scale", {"scale": torch.rand(128) + 0.5}),
        Transform("rotate", {"matrix": rotation}),
        Transform("low_rank", {"a": torch.randn(4, 128), "b": torch.randn(96, 4)}),
    )
    full = Quantized(Format(q.format.weight, FORMATS["fp8-channel"].act), q.weight, {}, transforms)
    x = torch.randn(7, 128)
    got = torch_dequant.run_linear(x, torch_dequant.prepack_linear(full))
    torch.testing.assert_close(got, linear(x, full), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["int4-g32", "nvfp4", "fp8-block", "q4_k"])
def test_experts_are_linears(name: str) -> None:
    each = [Quantized(FORMATS[name], encode(weights((256, 256)) * (e + 1), FORMATS[name].weight)) for e in range(4)]
    packed = torch_dequant.prepack_experts(Quantized(FORMATS[name], stack([q.weight for q in each])))
    rows = [2, 0, 5, 1]
    x = torch.randn(8, 256)
    got = torch_dequant.run_experts(x, packed, rows)
    want = torch.cat([linear(part, q) for part, q in zip(x.split(rows), each, strict=True)])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_select_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(format: Format, device: torch.device, dtype: torch.dtype) -> str:
        return "no weight of this kind"

    run, prepack = KERNELS[-2].run, KERNELS[-2].prepack
    gpu = Kernel("gpu-only", "linear", ("cuda",), FLOATS, never, prepack, run)
    picky = Kernel("picky", "linear", (), FLOATS, never, prepack, run)
    half = Kernel("half", "linear", (), (torch.float16,), never, prepack, run)
    monkeypatch.setattr(registry, "KERNELS", (gpu, picky, half, *KERNELS))
    registry.kernels.cache_clear()
    chosen, refused = select("linear", FORMATS["int4-g32"], CPU, torch.float32)
    assert chosen.name == "reference"
    mine, ours = ["gpu-only", "picky", "half"], ["packed", "scaled", "humming", "humming-rounded", "triton"]
    assert [name for name, _ in refused] == mine + ours
    assert "not on cpu" in refused[0][1] and refused[1][1] == "no weight of this kind" and "float32" in refused[2][1]
    with pytest.raises(UnsupportedError, match="picky: no weight of this kind"):
        select("linear", FORMATS["int4-g32"], CPU, torch.float32, "picky")
    monkeypatch.undo()
    registry.kernels.cache_clear()


def test_unknown_name() -> None:
    known = "auto, decoded, emulated, humming, humming-rounded, packed, reference, scaled, triton"
    with pytest.raises(SpecError, match=f"known: {known}"):
        select("linear", FORMATS["int4-g32"], CPU, torch.float32, "marlin")
