"""few.cu as it is, run on a CPU: what its kernels add up, without the GPU that times them."""

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewbit import env
from fewbit.kernels import few
from fewbit.kernels.compiled import library
from fewbit.quant import elements

HERE = Path(__file__).parent
CXX = shutil.which(env.compiler()) or shutil.which("g++") or shutil.which("clang++")
N, K = 128, 640
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

pytestmark = pytest.mark.skipif(isinstance(library("packed"), str), reason=str(library("packed")))  # has float16 too


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> "Built":
    return Built(tmp_path_factory.mktemp("few"))


class Built:
    """Kernels, compiled once for every set of definitions."""

    def __init__(self, folder: Path):
        self.folder, self.library = folder, cache(self._library)

    def _library(self, defines: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
        made = self.folder / ("_".join(f"{name}{value}" for name, value in defines) + ".so")
        flags = ["-O1", "-w", "-std=c++17", "-shared", "-fPIC", *(f"-D{name}={value}" for name, value in defines)]
        places = ["-I", str(Path(few.__file__).parent), "-I", str(HERE), str(HERE / "few_cpu.cpp")]
        subprocess.run([str(CXX), *flags, *places, "-o", str(made)], check=True, timeout=120)
        return ctypes.CDLL(str(made))

    def run(
        self, x: Tensor, w: Tensor, n: int, out: torch.dtype, length: int, blocks: int,
        scales: Tensor | None = None, zeros: Tensor | None = None, **defines: int,
    ) -> Tensor:  # fmt: skip
        y = torch.full((len(x), n), torch.nan, dtype=out)
        kind = {"TYPE": few.TYPES[x.dtype], "OUT": few.TYPES[out], "TILES": -(-len(x) // few.TILE), "WARPS": 2}
        at = [ctypes.c_void_p(0 if t is None else t.data_ptr()) for t in (w, x, y, scales, zeros)]
        self.library(tuple((kind | defines).items())).run(*at, len(x), n, length, blocks)
        return y


def near(y: Tensor, want: Tensor, size: Tensor) -> None:
    """One rounding of the result, and sums in float32."""
    assert bool(((y.double() - want).abs() <= UNIT[y.dtype] * want.abs() + K * 2.0**-24 * size).all())


@pytest.mark.parametrize("kind", few.TYPES, ids=str)
@pytest.mark.parametrize("high", [1, 2])
def test_rows(built: Built, kind: torch.dtype, high: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randn(size, K, generator=draw).to(kind) for size in (16, 64))
    out = kind if kind in few.HALVES else torch.bfloat16
    given = {"DEPTH": 3, "HIGH": high, "SPLIT": 0}
    for m in (1, 7, 16):
        y = built.run(x[:m], w, 64, out, K * x.element_size(), 64 // (few.ROWS * high), **given)
        near(y, x[:m].double() @ w.double().T, x[:m].double().abs() @ w.double().abs().T)


def fragments(codes: Tensor, bits: int = 4) -> Tensor:
    """[N, K] -> [K / 16, N / 64, 32, bits] words: lane 4 g + t has rows g and g + 8, columns 2 t and 2 t + 8.

    As humming packs: each code in a slot, pairs 16 bits apart; what slots leave empty is filled from the next word.
    """
    n, k = codes.shape
    c = codes.long().view(n // 64, 4, 2, 8, k // 16, 2, 4, 2)  # tile, r, below, g, piece, late, t, odd
    slot = 1 << (bits - 1).bit_length()
    c = c.permute(4, 0, 3, 6, 1, 2, 5, 7).reshape(k // 16, n // 64, 32, slot, 16 // slot, 2)  # words, pairs, odd
    place = torch.arange(16 // slot)[:, None] * slot + torch.arange(2) * 16
    every, top = sum(1 << at for at in range(0, 32, slot)), (1 << bits) - 1
    wide, out = (c << place).sum((-1, -2)), torch.zeros(k // 16, n // 64, 32, bits, dtype=torch.long)
    for i in range(slot):
        at, off = divmod(i * bits, slot)
        if (low := off + bits - slot) <= 0:
            out[..., at] |= wide[..., i] << off
        else:
            out[..., at] |= (wide[..., i] & (top >> low << low) * every) << (slot - bits)
            out[..., at + 1] |= wide[..., i] & ((1 << low) - 1) * every
    return out.to(torch.uint32).contiguous()


def by_rows(of_groups: Tensor) -> Tensor:
    """[N, groups] -> [groups, N / 64, 8, 8], of row g + 8 j at [g, j]."""
    n, groups = of_groups.shape
    return of_groups.T.reshape(groups, n // 64, 8, 8).transpose(2, 3).contiguous()


def laid(
    built: Built, x: Tensor, values: Tensor, codes: Tensor, scales: Tensor | None, group: int,
    zeros: Tensor | None = None, bits: int = 4, **defines: int,
) -> None:  # fmt: skip
    """In any company, and with two columns to a row where there may be: the same bits."""
    words, found = fragments(codes, bits), []
    held = None if scales is None else by_rows(scales)
    defines = {"BITS": bits, "GROUP": group, "ZEROS": 0, "SPLIT": 1, **defines}
    for m, spread in ((1, 2), (4, 2), (4, 1), (8, 1), (16, 1)):
        if spread == 1 or 0 < group < 128:
            given = defines | {"SPREAD": spread}
            found.append(built.run(x[:m], words, N, x.dtype, K, N // 64, held, zeros, **given))
            size = x[:m].double().abs() @ values.abs().double().T
            near(found[-1], x[:m].double() @ values.double().T, size + size.amax())
    assert all(torch.equal(y, found[-1][: len(y)]) for y in found)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("dtype", few.HALVES, ids=str)
def test_whole_numbers(built: Built, dtype: torch.dtype, zeros: bool, group: int) -> None:
    draw = torch.Generator().manual_seed(group)
    codes, zero = (torch.randint(0, 16, (N, k), generator=draw) for k in (K, K // group))
    scales = (torch.rand(N, K // group, generator=draw) + 0.1).to(dtype)
    x, zero = torch.randn(16, K, generator=draw).to(dtype), zero if zeros else torch.full_like(zero, 8)
    values = (codes - zero.repeat_interleave(group, 1)) * scales.double().repeat_interleave(group, 1)
    packed = (by_rows(zero) << torch.arange(8) * 4).sum(-1).to(torch.uint32)
    laid(built, x, values, codes, scales, group, packed, CODES=few.INTEGERS, ZEROS=int(zeros))


def held(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Codes as humming has them beside that type: of 8 bits beside bfloat16 a sign, and how far from -1/2 it is."""
    signed = bits == 8 and dtype == torch.bfloat16
    return torch.where(codes >= 128, codes - 128, 255 - codes) if signed else codes


@pytest.mark.parametrize(("bits", "group"), [(2, 64), (3, 16), (5, 32), (6, 16), (7, 128), (8, 32), (8, 0), (4, 0)])
@pytest.mark.parametrize("dtype", few.HALVES, ids=str)
def test_whole_numbers_of_any_width(built: Built, dtype: torch.dtype, bits: int, group: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (N, K), generator=draw)
    codes[:, :8] = torch.arange(8) % 2 * (2**bits - 1)
    scales = (torch.rand(N, K // group, generator=draw) + 0.1).to(dtype) if group else None
    values = (codes - 2 ** (bits - 1)).double()
    values = values if scales is None else values * scales.double().repeat_interleave(group, 1)
    x = torch.randn(16, K, generator=draw).to(dtype)
    laid(built, x, values, held(codes, bits, dtype), scales, group, bits=bits, CODES=few.INTEGERS)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (2, 16), (5, 32)])
@pytest.mark.parametrize("dtype", few.HALVES, ids=str)
def test_zeros_between_codes(built: Built, dtype: torch.dtype, bits: int, group: int) -> None:
    draw = torch.Generator().manual_seed(group)
    codes = torch.randint(0, 2**bits, (N, K), generator=draw)
    scales = (torch.rand(N, K // group, generator=draw) + 0.1).to(dtype)
    zeros = (torch.rand(N, K // group, generator=draw) * 40 - 12).to(dtype)
    values = (codes - zeros.double().repeat_interleave(group, 1)) * scales.double().repeat_interleave(group, 1)
    x = torch.randn(16, K, generator=draw).to(dtype)
    laid(built, x, values, codes, scales, group, by_rows(zeros), bits, CODES=few.INTEGERS, ZEROS=2)


@pytest.mark.parametrize(("kind", "dtype"), [(few.NVFP4, torch.bfloat16), (few.NVFP4, torch.float16),
                                             (few.MXFP4, torch.bfloat16)], ids=str)  # fmt: skip
def test_floats_of_4_bits(built: Built, kind: int, dtype: torch.dtype) -> None:
    (group,), draw = few.GROUPS[kind], torch.Generator().manual_seed(kind)
    element, span = (elements.E4M3, (0x20, 0x50)) if kind == few.NVFP4 else (elements.E8M0, (120, 132))
    codes = torch.randint(0, 16, (N, K), generator=draw)
    scales = torch.randint(*span, (N, K // group), generator=draw).to(torch.uint8)
    times = elements.decode(scales, element).double().repeat_interleave(group, 1)
    values = elements.decode(codes.to(torch.uint8), elements.E2M1).double() * times
    laid(built, torch.randn(16, K, generator=draw).to(dtype), values, codes, scales, group, CODES=kind)
