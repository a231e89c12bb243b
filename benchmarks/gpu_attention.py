"""Attention over a paged cache on a GPU: microseconds inside a CUDA graph, and what that is of the card.

    python benchmarks/gpu_attention.py [--heads 32,8,128] [--sweep]

Every call of a graph has its own cache, as layers have, so that the L2 holds none of them. --sweep tries other tiles.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fewbit.kernels import triton_attention, triton_attention_decode, triton_attention_prefill
from fewbit.kernels.cache import Cache
from fewbit.kernels.table import New, Table
from fewbit.kernels.triton_attention_prefill import Tile

PAGE = 16
COLD = 200 << 20  # bytes that calls of a graph read in turn
CACHES = {"bf16": None, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
DECODES = [(1, 200), (1, 2000), (1, 4000), (8, 200), (8, 2000), (64, 200), (64, 2000), (256, 200), (256, 2000)]
CUTS = [(tokens, stages, warps, 4) for tokens in (32, 64, 128) for stages in (2, 3, 5) for warps in (2, 4)]
CUTS += [(64, 3, 4, programs) for programs in (1, 2, 8)]
TILES = [Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 64, 8, 5), Tile(128, 64, 4, 3), Tile(128, 128, 8, 2),
         Tile(128, 128, 8, 3), Tile(128, 32, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3),
         Tile(64, 128, 4, 3)]  # fmt: skip


def graphed(calls: list[Callable[[], Any]], repeats: int = 10) -> float:
    """Microseconds of a call."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) * 1000 / repeats / len(calls)


class Texts:
    """So many of one length, on pages in random order; rows: of each, new in this step."""

    def __init__(self, heads: tuple[int, int, int], count: int, length: int, rows: int, held: torch.dtype | None):
        (self.h, g, self.d), self.count, self.length, self.rows = heads, count, length, rows
        each = -(-length // PAGE)
        draw = torch.Generator("cuda").manual_seed(0)
        pages = torch.randperm(count * each, device="cuda", generator=draw).view(count, each).to(torch.int32)
        total = count * rows
        self.q, self.k, self.v = (torch.randn(1, total, n, self.d, device="cuda", dtype=torch.bfloat16,
                                              generator=draw).transpose(1, 2) for n in (self.h, g, g))  # fmt: skip
        full = (pages.long()[:, :, None] * PAGE + torch.arange(PAGE, device="cuda")).view(count, -1)[:, :length]
        self.slots = full[:, length - rows :].flatten()
        self.table = Table(pages, torch.full((count,), length, device="cuda", dtype=torch.int32),
                           torch.arange(0, total + 1, rows, device="cuda", dtype=torch.int32),
                           count if rows == 1 else 0, rows, length, PAGE)  # fmt: skip
        first = self.cache(pages.numel() * PAGE, held)
        self.read = count * length * first.slot_bytes
        more = min(256, COLD // self.read) if rows == 1 else 0
        self.caches = [first, *(self.cache(pages.numel() * PAGE, held) for _ in range(more))]
        self.out = torch.empty(total, self.h, self.d, device="cuda", dtype=torch.bfloat16)

    def cache(self, slots: int, held: torch.dtype | None) -> Cache:
        made = Cache.like(slots, self.k, self.v, held)
        for plane in (made.key, made.value, made.key_scale, made.value_scale):
            if plane is not None:
                plane.copy_(torch.randint(-100, 100, plane.shape, device="cuda") if plane.dtype == torch.int8
                            else torch.randn(plane.shape, device="cuda", dtype=torch.float16) / 100)  # fmt: skip
        return made

    def attend(self, new: New | None = None) -> float:
        return graphed([lambda c=c: triton_attention.attend(self.q, c, self.out, self.table, self.d**-0.5, None, None,
                                                            None, new=new) for c in self.caches])  # fmt: skip

    @property
    def new(self) -> New:
        return New(self.k, self.v, self.slots)

    def write(self) -> float:
        return graphed([lambda c=c: triton_attention.write(c, self.new, self.q) for c in self.caches])

    def sdpa(self) -> float:
        def dense(x: Tensor) -> Tensor:
            rows = x[0].unflatten(1, (self.count, self.rows)).transpose(0, 1)
            return rows.repeat_interleave(self.h // rows.shape[1], 1).contiguous()

        q, k, v = dense(self.q), dense(self.k), dense(self.v)
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            return graphed([lambda: scaled_dot_product_attention(q, k, v, is_causal=True)])


def attempt(what: Callable[[], str]) -> str:
    try:
        return what()
    except Exception as error:  # one variant that does not run must not end the table
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"


def decodes(heads: tuple[int, int, int]) -> None:
    print(f"{'decode':>14} {'cache':>6} {'parts':>6} {'us':>8} {'GB/s':>7} {'write us':>9}")
    for count, length in DECODES:
        for name, held in CACHES.items():

            def row(count: int = count, length: int = length, held: torch.dtype | None = held) -> str:
                t = Texts(heads, count, length, 1, held)
                us, parts = t.attend(), triton_attention_decode.shape(t.q, t.caches[0], t.table, None).parts
                return f"{parts:6} {us:8.1f} {t.read / us / 1e3:7.0f} {t.write():9.1f}"

            print(f"{f'{count} x {length}':>14} {name:>6} {attempt(row)}", flush=True)


def prefills(heads: tuple[int, int, int]) -> None:
    print(f"{'prefill':>14} {'cache':>6} {'us':>8} {'TFLOP/s':>8} {'write us':>9} {'torch us':>9} {'TFLOP/s':>8}")
    for count, length in ((16, 2048), (128, 128), (1, 8192)):
        flops = 2.0 * heads[0] * heads[2] * count * length * (length + 1)
        for name, held in CACHES.items():

            def row(
                count: int = count, length: int = length, held: torch.dtype | None = held, flops: float = flops
            ) -> str:
                t = Texts(heads, count, length, length, held)
                us, theirs = t.attend(), t.sdpa()
                return f"{us:8.1f} {flops / us / 1e6:8.0f} {t.write():9.1f} {theirs:9.1f} {flops / theirs / 1e6:8.0f}"

            print(f"{f'{count} x {length}':>14} {name:>6} {attempt(row)}", flush=True)


def sweep(heads: tuple[int, int, int]) -> None:
    decode, prefill = triton_attention_decode, triton_attention_prefill
    texts = [Texts(heads, count, length, 1, held) for count, length in ((1, 2000), (8, 2000), (64, 2000), (256, 200))
             for held in CACHES.values()]  # fmt: skip
    splits = decode.SPLITS
    print("decode us: 1, 8, 64 x 2000, 256 x 200, each bf16, fp8, int8; (tokens, stages, warps, programs)")
    for cut in CUTS:
        tokens, stages, decode.WARPS, decode.PROGRAMS = cut
        tile = decode.KeyTile(tokens * heads[2], tokens, stages, 1)
        decode.SPLITS = tuple((room, least, tile) for room, least, _ in splits)
        print(f"{cut!s:>20}", attempt(lambda: "".join(f"{t.attend():8.1f}" for t in texts)), flush=True)
    whole = [Texts(heads, 16, 2048, 2048, held) for held in (None, torch.float8_e4m3fn, torch.int8)]
    print("prefill us: 16 x 2048, bf16, fp8, int8")
    for tile in TILES:
        prefill.LADDER = (tile,)
        print(f"{tile!s:>50}", attempt(lambda: "".join(f"{t.attend():9.1f}" for t in whole)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--heads", default="32,8,128", help="queries, keys, size")
    parser.add_argument("--sweep", action="store_true")
    asked = parser.parse_args()
    h, g, d = map(int, asked.heads.split(","))
    print(torch.cuda.get_device_name(), f"H={h} G={g} D={d}")
    decodes((h, g, d))
    prefills((h, g, d))
    if asked.sweep:
        sweep((h, g, d))


if __name__ == "__main__":
    main()
