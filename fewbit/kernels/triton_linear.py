"""Linears on a GPU that read every format of single codes as it is stored; the work is in triton_tiles.

Few rows: codes become values in registers and meet x there, K cut in shares so that every multiprocessor has work.
Many rows: runs of rows are decoded into a buffer of bounded size and multiplied by torch. A row of y depends on no
other row of x among the counts of rows that share a tile height (TILES); K is cut by the weight's shape alone.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fewbit.kernels import torch_dequant, triton_runtime
from fewbit.kernels.coded import Coded, lacking
from fewbit.kernels.rounded import rounded
from fewbit.kernels.torch_dequant import low_rank
from fewbit.quant.reference import transformed
from fewbit.quant.spec import Format

FEW = 128  # rows up to which codes are decoded in registers
DECODED = 32 << 20  # bytes of values decoded at a time for many rows: they stay in the L2 cache of a H100
WAVES = 4  # programs to a multiprocessor that a call of few rows is cut into
LONGEST = 16  # shares of K at most


@dataclass(frozen=True, slots=True)
class Tiling:
    """Rows of x, rows of W and columns of a program's tile; 64 rows of W to every 4 warps suit Hopper's units."""

    m: int
    n: int
    k: int
    warps: int
    stages: int = 2


TILES = (Tiling(16, 64, 128, 4), Tiling(32, 64, 128, 4), Tiling(64, 64, 128, 4), Tiling(128, 128, 64, 8))
EXACT = (Tiling(16, 32, 32, 4), Tiling(64, 32, 32, 4))  # float32, without matrix units
DECODE = Tiling(0, 32, 128, 4)


def supports(format: Format, device: torch.device, dtype: torch.dtype) -> str | None:
    return lacking(format.weight) or triton_runtime.lacking(device)


def run_linear(x: Tensor, packed: Coded, bias: Tensor | None = None) -> Tensor:
    """x: [..., K] -> [..., N]."""
    q = packed.source
    assert q is not None
    if torch.is_grad_enabled() and x.requires_grad:
        return torch_dequant.run_linear(x, torch_dequant.prepack_linear(q), bias)  # which can be gone back through
    x = transformed(x, q.transforms)
    seen = rounded(x, q.format.act, q.act) if q.format.act else x
    flat = seen.reshape(-1, packed.k).contiguous()
    y = few(flat, packed, bias) if len(flat) <= FEW else many(flat, packed, bias)
    return low_rank(x, q.transforms, y.view(*x.shape[:-1], packed.n))


def few(x: Tensor, w: Coded, bias: Tensor | None) -> Tensor:
    """x: [M, K] -> [M, N]."""
    m = len(x)
    y = x.new_empty(m, w.n)
    if not m:
        return y
    tiling = tiling_for(m, x.dtype)
    shares, steps = cut(w.n, w.k, tiling, x.device)
    if shares == 1:
        launch(x, y, w, bias, None, tiling, (-(-m // tiling.m), shares, steps))
        return y
    parts = torch.empty(shares, m, w.n, device=x.device)
    launch(x, parts, w, None, None, tiling, (-(-m // tiling.m), shares, steps))
    grid = (-(-y.numel() // 512),)
    tiles().gathered[grid](parts, y, y if bias is None else bias, y.numel(), w.n, shares, bias is not None, 512)
    return y


def many(x: Tensor, w: Coded, bias: Tensor | None) -> Tensor:
    """x: [M, K] -> [M, N]."""
    y = x.new_empty(len(x), w.n)
    step = max(DECODE.n, DECODED // (w.k * x.element_size()) // DECODE.n * DECODE.n)
    buffer = x.new_empty(min(step, w.n), w.k)
    for start in range(0, w.n, step):
        stop = min(start + step, w.n)
        decoded = decode_rows(w, buffer[: stop - start], start)
        torch.mm(x, decoded.mT, out=y[:, start:stop])
    return y if bias is None else y.add_(bias)


def decode_rows(w: Coded, out: Tensor, start: int = 0, index: Tensor | None = None) -> Tensor:
    """out: [n, K], filled with the rows of W from `start` on, or with those of index [n]."""
    size, (n, k) = len(out), (DECODE.n, DECODE.k)
    if size:
        grid = (-(-size // n), -(-w.k // k))
        tiles().values[grid](
            out, out if index is None else index, w.codes, w.scales, w.zeros, start, w.n, w.k, size, index is not None,
            w.form, w.k % k == 0, n, k, num_warps=DECODE.warps,
        )  # fmt: skip
    return out


def tiling_for(m: int, dtype: torch.dtype) -> Tiling:
    """The lowest tile that holds m rows, else the highest."""
    table = EXACT if dtype == torch.float32 else TILES
    return next((tiling for tiling in table if m <= tiling.m), table[-1])


@cache
def cut(n: int, k: int, tiling: Tiling, device: torch.device) -> tuple[int, int]:
    """-> shares of K, and steps of each: enough programs for the device, whatever the number of rows."""
    wanted = max(1, WAVES * processors(device) // -(-n // tiling.n))
    blocks = -(-k // tiling.k)
    each = max(1, -(-blocks // min(wanted, LONGEST, blocks)))
    return -(-blocks // each), each


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def launch(
    x: Tensor,
    y: Tensor,
    w: Coded,
    bias: Tensor | None,
    counts: Tensor | None,
    tiling: Tiling,
    grid: tuple[int, int, int],
    token: Tensor | None = None,
) -> None:
    """y = x W^T, or x[token] W^T; counts: rows of each expert.

    grid: tiles along the rows of y, shares of K, steps of a share.
    """
    experts = 0 if counts is None else len(counts)
    high, shares, steps = grid
    tiles().times[-(-w.n // tiling.n), high, shares](
        x, x if token is None else token, y, x if bias is None else bias, x if counts is None else counts, w.codes,
        w.scales, w.zeros, y.shape[-2], w.n, w.k, experts, token is not None, bias is not None,
        triton_runtime.power(experts), w.form, w.k == shares * steps * tiling.k, x.dtype == torch.float32, steps,
        tiling.m, tiling.n, tiling.k, num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip


@cache
def tiles() -> Any:
    from fewbit.kernels import triton_tiles

    return triton_tiles
