"""encode and fake_quant against compressed-tensors' own functions, in float32: scales, zeros and codes bit for bit."""

import pytest
import torch
from torch import Tensor

from fewbit.quant.elements import E2M1, E4M3, E8M0, ELEMENTS, F32, Element
from fewbit.quant.qtensor import QTensor, codes, scale_codes
from fewbit.quant.reference import decode, encode, fake_quant
from fewbit.quant.spec import QuantSpec, Scale, spec

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors.mx_utils import compress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    compute_dynamic_scales_and_zp,
    generate_gparam,
    maybe_pad_tensor_for_block_quant,
)  # fmt: skip

N, K = 48, 512
MX = {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
BLOCKS = {"tensor": (0, 0), "channel": (1, 0), "group": (1, 64)}


def integer(bits: int, symmetric: bool, block: tuple[int, int]) -> QuantSpec:
    if symmetric:
        return spec(ELEMENTS[f"int{bits}"], (F32, *block), rule="range")
    element = ELEMENTS[f"uint{bits}"]
    return spec(element, (F32, *block), zeros=((element, *block),), rule="range")


def integer_args(bits: int, symmetric: bool, strategy: str) -> QuantizationArgs:
    group = {"group_size": 64} if strategy == "group" else {}
    return QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, **group)


INTS = [
    (
        f"int{bits}-{strategy}{'' if symmetric else '-asym'}",
        integer(bits, symmetric, block),
        integer_args(bits, symmetric, strategy),
    )
    for bits in range(2, 9)
    for symmetric in (True, False)
    for strategy, block in BLOCKS.items()
]


def floats(bits: int, **how: object) -> QuantizationArgs:
    return QuantizationArgs(num_bits=bits, type="float", **how)


NV = {"strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}
FP8 = [
    ("fp8-tensor", spec(E4M3, (F32, 0, 0), rule="range"), floats(8, strategy="tensor")),
    ("fp8-channel", spec(E4M3, (F32, 1, 0), rule="range"), floats(8, strategy="channel")),
    ("fp8-group", spec(E4M3, (F32, 1, 128), rule="range"), floats(8, group_size=128)),
    ("fp8-block", spec(E4M3, (F32, 4, 128), rule="range"), floats(8, strategy="block", block_structure=[4, 128])),
]
SHARED = [
    ("mxfp4", spec(E2M1, (E8M0, 1, 32), rule="mx-round"), floats(4, group_size=32, **MX)),
    ("mxfp8", spec(E4M3, (E8M0, 1, 32), rule="mx-round"), floats(8, group_size=32, **MX)),
    ("nvfp4", QuantSpec(E2M1, (Scale(E4M3, (1, 16)), Scale(F32, (0, 0), "div")), rule="range"), floats(4, **NV)),
]
SCHEMES = {name: (s, args) for name, s, args in (*INTS, *FP8, *SHARED)}


def samples() -> dict[str, Tensor]:
    """Ordinary weights, and the edges: dead blocks, tiny and huge blocks, one sign only, values on rounding ties."""
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(N, K, generator=g)
    spread = normal * torch.exp2(torch.randint(-20, 20, (N, K), generator=g).float())
    dead = normal.clone()
    dead[:, :128] = 0
    dead[1] = 0
    tiny = normal * 1e-38
    return {
        "normal": normal * 0.02,
        "uniform": torch.rand(N, K, generator=g) - 0.3,
        "spread": spread,
        "positive": normal.abs() + 0.5,
        "negative": -normal.abs() - 0.5,
        "dead": dead,
        "zero": torch.zeros(N, K),
        "tiny": tiny,
        "huge": normal * 1e36,
        "ties": torch.randint(-16, 17, (N, K), generator=g).float() / 4,
        "outlier": normal * 1e-3 + 100 * (torch.rand(N, K, generator=g) > 0.999),
    }


def theirs(w: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """-> their quantized values, scale, zero point, global scale."""
    whole, x = None, w
    if args.strategy == "tensor_group":
        whole = generate_gparam(w.amin(), w.amax())
    if args.strategy == "block":
        rows, cols = args.block_structure
        x = maybe_pad_tensor_for_block_quant(w, (rows, cols))
        x = x.unflatten(0, (-1, rows)).unflatten(-1, (-1, cols)).transpose(1, 2)  # [R, C, rows, cols]
        low, high = x.amin((-2, -1)), x.amax((-2, -1))
    elif args.strategy == "tensor":
        low, high = w.amin(), w.amax()
    else:
        x = w.unflatten(-1, (-1, args.group_size or w.shape[-1]))
        low, high = x.amin(-1), x.amax(-1)
    scale, zero = calculate_qparams(low, high, args, global_scale=whole)
    return quantize(w, scale, zero, args, global_scale=whole), scale, zero, whole


def signed(q: QTensor, element: Element, raw: Tensor) -> Tensor:
    """Codes of our canonical form as the values that compressed-tensors speaks of."""
    if element.kind != "int":
        return raw
    middle = 2 ** (int(element.bits) - 1)
    return (raw.int() ^ middle) - middle if element.signed else raw.int() - middle


def same(name: str, ours: Tensor, other: Tensor) -> None:
    differ = (ours.reshape(-1) != other.reshape(-1)).sum().item()
    assert differ == 0, f"{name}: {differ} of {ours.numel()} differ"


@pytest.mark.parametrize("name", SCHEMES)
def test_encode_is_theirs_bit_for_bit(name: str) -> None:
    s, args = SCHEMES[name]
    for label, w in samples().items():
        q = encode(w, s)
        values, scale, zero, whole = theirs(w, args)
        where = f"{name} of {label}"
        if s.element.name == "e2m1":
            same(f"{where}: codes", q.planes["codes"], pack_fp4_to_uint8(values))
        elif s.element.name == "e4m3":
            same(f"{where}: codes", codes(q), values.to(torch.float8_e4m3fn).view(torch.uint8))
        else:
            same(f"{where}: codes", signed(q, s.element, codes(q)), values.int())
        if s.scales[0].element.name == "e8m0":
            same(f"{where}: scale", q.planes["scale0"], compress_mx_scale(scale, torch.uint8))
        elif whole is not None:
            same(f"{where}: scale", q.planes["scale0"].view(torch.float8_e4m3fn).float(), scale)
            same(f"{where}: global scale", q.planes["scale1"], whole)
        else:
            same(f"{where}: scale", q.planes["scale0"], scale)
        if s.zeros:
            same(f"{where}: zero", signed(q, s.zeros[0].element, scale_codes(q, "zero0")), zero.int())
        same(f"{where}: decoded", decode(q), fake_quantize(w, scale, zero, args, global_scale=whole))


def rounded(element: Element, scale: tuple[Element, int, int], rule: str = "range") -> QuantSpec:
    zeros = () if element.kind != "int" or element.signed else ((element, *scale[1:]),)
    return spec(element, scale, zeros=zeros, rule=rule, dynamic=1)


INT4, INT8, UINT8 = ELEMENTS["int4"], ELEMENTS["int8"], ELEMENTS["uint8"]
DYNAMIC: dict[str, tuple[QuantSpec, dict[str, object]]] = {
    "int8-token": (rounded(INT8, (F32, 1, 0)), {"num_bits": 8, "strategy": "token"}),
    "int8-token-asym": (rounded(UINT8, (F32, 1, 0)), {"num_bits": 8, "strategy": "token", "symmetric": False}),
    "int4-token": (rounded(INT4, (F32, 1, 0)), {"num_bits": 4, "strategy": "token"}),
    "int8-tensor": (rounded(INT8, (F32, 0, 0)), {"num_bits": 8, "strategy": "tensor"}),
    "fp8-token": (rounded(E4M3, (F32, 1, 0)), {"num_bits": 8, "type": "float", "strategy": "token"}),
    "fp8-tensor": (rounded(E4M3, (F32, 0, 0)), {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8-1x128": (rounded(E4M3, (F32, 1, 128)), {"num_bits": 8, "type": "float", "group_size": 128}),
    "mxfp4": (rounded(E2M1, (E8M0, 1, 32), "mx-round"), {"num_bits": 4, "type": "float", "group_size": 32, **MX}),
    "mxfp8": (rounded(E4M3, (E8M0, 1, 32), "mx-round"), {"num_bits": 8, "type": "float", "group_size": 32, **MX}),
    "fp4-group": (rounded(E2M1, (E4M3, 1, 16)), {"num_bits": 4, "type": "float", **NV}),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_fake_quant_of_activations_is_theirs(name: str) -> None:
    s, given = DYNAMIC[name]
    args = QuantizationArgs(dynamic=True, **given)
    for label, w in samples().items():
        x = w.view(2, 24, K)
        scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
        same(f"{name} of {label}", fake_quant(x, s), fake_quantize(x, scale, zero, args))


def test_a_static_global_scale_and_a_static_zero() -> None:
    local = floats(4, dynamic="local", **NV)
    nvfp4 = QuantSpec(E2M1, (Scale(E4M3, (1, 16), dynamic=True), Scale(F32, (0, 0), "div")), rule="range")
    static = QuantizationArgs(num_bits=8, type="int", strategy="tensor", symmetric=False)
    for label, w in samples().items():
        x = w.view(2, 24, K)
        whole = torch.tensor([448 * 6 / 3.0])
        scale, zero = compute_dynamic_scales_and_zp(x, local, torch.nn.Identity(), global_scale=whole)
        ours = fake_quant(x, nvfp4, {"scale1": whole.view(1, 1)})
        same(f"nvfp4 of {label}", ours, fake_quantize(x, scale, zero, local, global_scale=whole))
        scale, zero = torch.tensor([0.037]), torch.tensor([-31], dtype=torch.int8)
        planes = {"scale0": scale.view(1, 1), "zero0": torch.tensor([[97]], dtype=torch.uint8)}
        ours = fake_quant(x, spec(UINT8, (F32, 0, 0), zeros=((UINT8, 0, 0),), rule="range"), planes)
        same(f"static int8 of {label}", ours, fake_quantize(x, scale, zero, static))
