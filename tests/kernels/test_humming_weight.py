"""What is handed to humming-kernels, read back by its documented meaning: the very values of the reference."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fewbit.kernels import few, humming_linear, scaled_linear
from fewbit.kernels.humming_layout import Layout, layout
from fewbit.kernels.humming_weight import TILE, fits, flipped, padded, scales, words, zeros
from fewbit.kernels.registry import kernels
from fewbit.quant import elements
from fewbit.quant.formats import FORMATS
from fewbit.quant.join import join
from fewbit.quant.pack import pack, unpack
from fewbit.quant.qtensor import QTensor, Quantized
from fewbit.quant.reference import decode, encode, scale_values, zero_values
from fewbit.quant.spec import Format

DTYPES = (torch.bfloat16, torch.float16)
CASES = [
    (name, dtype, rounded) for dtype in DTYPES for rounded in (False, True) for name, form in FORMATS.items()
    if isinstance(layout(form, dtype, rounded), Layout)
    and not (rounded and isinstance(layout(form, dtype, False), Layout))
]  # fmt: skip
N, COLUMNS = 136, {"64": 320, "128": 384, "_k": 512}


def told(name: str | Format, dtype: torch.dtype, rounded: bool = False) -> Layout:
    how = layout(FORMATS[name] if isinstance(name, str) else name, dtype, rounded)
    assert isinstance(how, Layout), how
    return how


@pytest.mark.parametrize(("name", "dtype", "rounded"), CASES, ids=lambda c: str(c).removeprefix("torch."))
def test_values_survive(name: str, dtype: torch.dtype, rounded: bool) -> None:
    n, k = N, next((k for group, k in COLUMNS.items() if group in name), 288)
    how = told(name, dtype, rounded)
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(len(name))) / 16
    w = encode(values * (torch.rand(n, 1) + 0.5), FORMATS[name].weight)
    want = decode(w)
    moved = 2.01 * zero_values(w).abs().repeat_interleave(how.group, 1) if how.zeros == "values" else 0.0  # type: ignore[union-attr]
    bound = (2.0**-8 if rounded and how.kind != "block" else 2.0**-23) * (want.abs() + moved)
    off = (read_back(w, how, dtype) - want).abs()
    assert bool((off <= bound).all()), float((off / want.abs().clamp(min=1e-9)).max())


def read_back(w: QTensor, how: Layout, dtype: torch.dtype) -> Tensor:
    (n, k), found = w.shape, scales(w, how, dtype)
    assert fits(w, how) and found is not None
    codes = unpack(words(w, how).view(torch.uint8), how.bits, padded(k, how.group))
    assert codes.shape == (padded(n), padded(k, how.group))
    whole = w.spec.element.kind == "int"
    x = codes.float() if whole else elements.decode(codes, w.spec.element)
    if how.zeros == "values":
        zero = zeros(w, how, found)
        assert zero is not None and zero.dtype == dtype and zero.shape == found.plane.shape
        x -= zero.float().repeat_interleave(how.group, 1)
    elif how.zeros:
        packed = zeros(w, how, found)
        assert packed is not None
        zero = unpack(packed.mT.contiguous().view(torch.uint8), how.bits, padded(n)).mT.float()
        x -= zero.repeat_interleave(x.shape[1] // zero.shape[1], 1)
    elif whole:
        x -= 2 ** (how.bits - 1)
    plane = found.plane.float()
    if found.kind == "block":
        plane = plane.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    elif found.kind == "group":
        plane = plane.repeat_interleave(how.group, 1)
    x = (x * plane)[:n, :k]
    x = x if found.outer is None else x * found.outer
    return x if found.columns is None else x * found.columns[:, None]


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if len(form.weight.scales) == 2
                                  and isinstance(layout(form, torch.bfloat16, False), Layout)])  # fmt: skip
def test_outer_scales_of_several_tensors(name: str) -> None:
    """Weights that were joined have an outer scale for each row, of which one may be 0."""
    parts = [encode(torch.randn(n, 256) * size, FORMATS[name].weight) for n, size in ((128, 0.1), (8, 3.0), (64, 0.0))]
    whole = join([Quantized(FORMATS[name], part) for part in parts])
    assert whole.format.weight.scales[1].block == (1, 0)
    how, want = told(whole.format, torch.bfloat16), torch.cat([decode(part) for part in parts])
    torch.testing.assert_close(read_back(whole.weight, how, torch.bfloat16), want, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["q4_1", "q2_k", "q4_k", "q5_k"])
def test_groups_that_are_a_zero_alone(name: str, dtype: torch.dtype) -> None:
    """Their scale is 0, so that no zero in codes could be."""
    given = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    given[:, 32:64], given[:, 64:96] = -0.75, 0.0
    w = encode(given, FORMATS[name].weight)
    want, found = decode(w), read_back(w, told(name, dtype, True), dtype)
    assert bool((scale_values(w) == 0).any()) and bool(found.isfinite().all())
    torch.testing.assert_close(found[:, 32:96], want[:, 32:96], rtol=2.0**-7, atol=0)


@pytest.mark.parametrize("bits", range(2, 9))
def test_flipping_is_adding_half(bits: int) -> None:
    codes = torch.arange(64).view(2, 32) * 37 % 2**bits
    found = unpack(flipped(pack(codes.to(torch.uint8), bits), bits), bits, 32)
    assert torch.equal(found.long(), (codes + 2 ** (bits - 1)) % 2**bits)


def test_what_does_not_fit_is_left() -> None:
    how = told("int4-g128-asym", torch.float16)
    assert not fits(encode(torch.randn(12, 256), FORMATS["int4-g128-asym"].weight), how)
    assert not fits(encode(torch.randn(16, 192), FORMATS["int4-g128-asym"].weight), how)
    wide = torch.randn(16, 256) * torch.logspace(-20, 15, 256)
    assert scales(encode(wide, FORMATS["mxfp4-a16"].weight), told("mxfp4-a16", torch.float16), torch.float16) is None
    tiny = encode(torch.randn(16, 256) * 1e-9, FORMATS["fp8-1x128"].weight)
    assert scales(tiny, told("fp8-1x128", torch.float16, True), torch.float16) is None


def test_group_scales_are_not_rounded_unasked() -> None:
    reason = layout(FORMATS["int4-g128"], torch.bfloat16, False)
    assert reason == "scales in f16 would be rounded to bfloat16"
    assert told("int4-g128", torch.float16).scale == "float16"
    assert told("int4-g128-a8fp8", torch.bfloat16).scale == "float16"


LAID = {
    "int4-g128": (few.INTEGERS, 4, 128), "int4-g64-asym": (few.INTEGERS, 4, 64), "int8-channel": (few.INTEGERS, 8, 0),
    "int6-tensor": (few.INTEGERS, 6, 0), "q6_k": (few.INTEGERS, 6, 16), "q5_k": (few.INTEGERS, 5, 32),
    "nvfp4-a16": (few.NVFP4, 4, 16), "mxfp4-a16": (few.MXFP4, 4, 32), "int8-g64-asym": None, "int4-channel-asym": None,
    "int8-channel-a8": None, "fp8-block-a16": None, "int4-g128-a8fp8": None,
}  # fmt: skip


@pytest.mark.parametrize("name", LAID)
def test_what_few_reads_of_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of a GPU that this machine has not; and no scale is lost where groups have none."""
    monkeypatch.setattr(few, "lacking", lambda device: None)
    monkeypatch.setattr(few, "_processors", lambda device: 132)
    config = SimpleNamespace(sm_version=90, pad_shape_n=0, pad_shape_k=0)
    how, want = told(name, torch.bfloat16, True), LAID[name]
    for n, rows in ((256, 16), (17024, 8)):
        w = encode(torch.randn(n, 256), FORMATS[name].weight)
        found = humming_linear._few(w, config, how, torch.bfloat16)
        assert (found and (found.laid, found.rows)) == (want and (few.Laid(*want), rows))
        if found and want and not want[2]:
            assert found.whole is not None and torch.equal(found.whole, scale_values(w).view(-1))
    assert humming_linear._few(w, SimpleNamespace(**vars(config) | {"pad_shape_k": 64}), how, torch.bfloat16) is None
    assert humming_linear._few(w, SimpleNamespace(**vars(config) | {"sm_version": 80}), how, torch.bfloat16) is None


def test_order_and_reasons() -> None:
    names = [k.name for k in kernels() if k.op == "linear" and "cuda" in k.devices]
    assert names[:3] == ["scaled", "humming", "humming-rounded"]
    cuda = torch.device("cuda")
    assert "e4m3" in str(scaled_linear.supports(FORMATS["int4-g128"], cuda, torch.bfloat16))
    assert "inputs" in str(humming_linear.supports(FORMATS["nvfp4"], cuda, torch.bfloat16))


def tile(tall: int, block: int, **others: object) -> dict[str, object]:
    return {"block_shape": (tall, block, 64), "warp_shape": (tall, 32, 64), "raster_group_m": 5184 // tall, **others}


def test_tiles_are_shared() -> None:
    """Ranges as humming 0.1.20 has them for sm_90: powers of two keep theirs, others multiply a fourth more at most."""
    ranges: list[list[object]] = [[0, 8, tile(8, 128, mma="mma")], [8, 16, tile(16, 128, mma="mma")]]
    ranges += [[rows - 8, rows, tile(rows, 128)] for rows in range(24, 129, 8)]
    ranges += [[rows - 8, rows, tile(rows, 256)] for rows in range(136, 177, 8)]
    ranges += [[rows - 16, rows, tile(rows // 2, 256)] for rows in range(192, 353, 16)]
    ranges += [[352 + 264 * i + j * 44, 396 + 264 * i + j * 44, tile(136 + 8 * j, 256, multi_cast_size_a=2)]
               for i in range(9) for j in range(6)]  # fmt: skip
    ranges[-1][1] = 1 << 30
    found = humming_linear.shared(ranges)
    assert [span[0] for span in found] == [0, *(span[1] for span in found[:-1])] and found[-1][1] == 1 << 30

    def at(spans: object, rows: int) -> dict[str, tuple[int, ...]]:
        return next(t for low, high, t in spans if low < rows <= high)  # type: ignore[attr-defined]

    assert all(at(found, 1 << i) == at(ranges, 1 << i) for i in range(13))
    for rows in (*range(1, 353), *range(396, 3000, 44)):
        was, now = at(ranges, rows), at(found, rows)
        assert now["block_shape"][0] >= was["block_shape"][0] and now["block_shape"][1:] == was["block_shape"][1:]
        one, other = (-(-rows // t["block_shape"][0]) * t["block_shape"][0] for t in (was, now))
        assert other <= humming_linear.MORE * one and {*was} == {*now}
    once = humming_linear.begun(found, torch.device("cpu"))
    assert [len(humming_linear._distinct(spans)) for spans in (ranges, found, once)] == [33, 16, 16]
    assert all(not t["evict_weights_first"] or high <= t["block_shape"][0] for _, high, t in once)
    assert at(once, 64)["evict_weights_first"] and not at(once, 136)["evict_weights_first"]
