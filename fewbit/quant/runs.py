"""Decoding of ggml's block codebooks (IQ1, IQ2, IQ3) and packed trits (TQ1_0): bytes in, float32 out.

A block of 256 weights is a scale, some small sub-scales, indices into a grid of 4- or 8-vectors, and signs. The
grids are numbers fixed by the format and lie in iq_grids.bin, 2 or 4 bits per entry. Products are taken in the order
of ggml's own code, so the floats agree bit for bit.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fewbit.quant.elements import Element

CHUNK = 1 << 18  # weights decoded at a time
# name -> (entries, values of an entry, first byte in iq_grids.bin, bits per value, what the codes mean)
_IQ2 = (8.0, 25.0, 43.0, 0.0)
GRIDS = {
    "iq2_xxs": (256, 8, 0, 2, _IQ2),
    "iq2_xs": (512, 8, 512, 2, _IQ2),
    "iq2_s": (1024, 8, 1536, 2, _IQ2),
    "iq3_xxs": (256, 4, 3584, 4, (4.0, 12.0, 20.0, 28.0, 36.0, 44.0, 52.0, 62.0)),
    "iq3_s": (512, 4, 4096, 4, (1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0)),
    "iq1": (2048, 8, 5120, 2, (-1.0, 0.0, 1.0, 0.0)),
}


@cache
def grid(name: str) -> Tensor:
    """-> [entries, values] float32."""
    entries, values, start, bits, meaning = GRIDS[name]
    count = entries * values * bits // 8
    raw = (Path(__file__).parent / "iq_grids.bin").read_bytes()[start : start + count]
    packed = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    codes = torch.stack([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1)
    return torch.tensor(meaning)[codes.int()].view(entries, values)


@cache
def sign_table() -> Tensor:
    """-> [256, 8] float32: the eight signs of a byte, lowest bit first, 1 = minus."""
    bits = torch.arange(256).unsqueeze(-1) >> torch.arange(8)
    return 1.0 - 2.0 * (bits & 1).float()


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """table: [entries, values], index: [..., n] -> [..., n * values]."""
    return table.to(index.device).index_select(0, index.reshape(-1).int()).view(*index.shape[:-1], -1)


def _half(blocks: Tensor, start: int) -> Tensor:
    return _words(blocks, start, start + 2, torch.float16).float()


def _words(blocks: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    return blocks[..., start:stop].contiguous().view(dtype)


def _fields(words: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """words: [..., n] integers -> [..., n * len(shifts)] of the masked fields."""
    return torch.stack([(words >> shift) & mask for shift in shifts], -1).flatten(-2)


def _signs7(index: Tensor) -> Tensor:
    """7 stored bits -> eight signs whose number of minuses is even."""
    parity = index ^ (index >> 4)
    parity = parity ^ (parity >> 2)
    parity = (parity ^ (parity >> 1)) & 1
    return _look_up(sign_table(), index | (parity << 7))


def _scaled(scale: Tensor, values: Tensor, signs: Tensor) -> Tensor:
    """scale: [..., n] each over an equal share of values [..., 256]."""
    return (scale.unsqueeze(-1) * torch.unflatten(values, -1, (scale.shape[-1], -1))).flatten(-2) * signs


def _iq2_xxs(blocks: Tensor) -> Tensor:
    words = _words(blocks, 2, 66, torch.int32)
    index = words[..., 0::2].contiguous().view(torch.uint8)
    high = words[..., 1::2]
    scale = _half(blocks, 0) * (0.5 + ((high >> 28) & 15).float()) * 0.25
    return _scaled(scale, _look_up(grid("iq2_xxs"), index), _signs7(_fields(high, (0, 7, 14, 21), 127)))


def _iq2_xs(blocks: Tensor) -> Tensor:
    words = _words(blocks, 2, 66, torch.int16).int()
    scale = _half(blocks, 0) * (0.5 + _fields(blocks[..., 66:74], (0, 4), 15).float()) * 0.25
    return _scaled(scale, _look_up(grid("iq2_xs"), words & 511), _signs7((words >> 9) & 127))


def _iq2_s(blocks: Tensor) -> Tensor:
    scale = _half(blocks, 0) * (0.5 + _fields(blocks[..., 74:82], (0, 4), 15).float()) * 0.25
    index = blocks[..., 2:34].int() | (_fields(blocks[..., 66:74], (0, 2, 4, 6), 3).int() << 8)
    return _scaled(scale, _look_up(grid("iq2_s"), index), _look_up(sign_table(), blocks[..., 34:66]))


def _iq3_xxs(blocks: Tensor) -> Tensor:
    words = _words(blocks, 66, 98, torch.int32)
    scale = _half(blocks, 0) * (0.5 + ((words >> 28) & 15).float()) * 0.5
    return _scaled(scale, _look_up(grid("iq3_xxs"), blocks[..., 2:66]), _signs7(_fields(words, (0, 7, 14, 21), 127)))


def _iq3_s(blocks: Tensor) -> Tensor:
    scale = _half(blocks, 0) * (1 + 2 * _fields(blocks[..., 106:110], (0, 4), 15).float())
    index = blocks[..., 2:66].int() | (_fields(blocks[..., 66:74], tuple(range(8)), 1).int() << 8)
    return _scaled(scale, _look_up(grid("iq3_s"), index), _look_up(sign_table(), blocks[..., 74:106]))


def _iq1_s(blocks: Tensor) -> Tensor:
    high = _words(blocks, 34, 50, torch.int16).int()
    scale = _half(blocks, 0) * (2 * ((high >> 12) & 7) + 1).float()
    index = blocks[..., 2:34].int() | (_fields(high, (0, 3, 6, 9), 7) << 8)
    delta = torch.where((high & 0x8000) == 0, 0.125, -0.125).unsqueeze(-1)
    values = torch.unflatten(_look_up(grid("iq1"), index), -1, (8, 32)) + delta
    return (scale.unsqueeze(-1) * values).flatten(-2)


def _iq1_m(blocks: Tensor) -> Tensor:
    """The only type whose scale lies in pieces: a quarter in the top of each of the four scale words."""
    words = _words(blocks, 48, 56, torch.int16).int()
    quarters = (words >> 12) & 15
    d = sum(quarters[..., i] << (4 * i) for i in range(4))
    d = torch.as_tensor(d).to(torch.int16).view(torch.float16).float().unsqueeze(-1)
    scale = d * (2 * _fields(words, (0, 3, 6, 9), 7) + 1).float()
    high = _fields(blocks[..., 32:48], (0, 4), 15).int()
    index = blocks[..., :32].int() | ((high & 7) << 8)
    delta = torch.where((high & 8) == 0, 0.125, -0.125).unsqueeze(-1)
    values = torch.unflatten(_look_up(grid("iq1"), index), -1, (32, 8)) + delta
    return (scale.unsqueeze(-1) * torch.unflatten(values.flatten(-2), -1, (16, 16))).flatten(-2)


def _tq1_0(blocks: Tensor) -> Tensor:
    """Five trits to a byte as a fraction of 243 / 256: multiply by 3**n mod 256, and the top trit is the n-th."""
    parts = []
    for start, stop, trits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        parts += [blocks[..., start:stop] * 3**n for n in range(trits)]
    trit = ((torch.cat(parts, -1).int() * 3) >> 8) - 1
    return _half(blocks, 52) * trit.float()


def _run(name: str, nbytes: int) -> Element:
    return Element(name, "run", 8 * nbytes / 256, run=256, note="ggml block codebook" if name != "tq1_0" else "trits")


DECODERS: dict[Element, Callable[[Tensor], Tensor]] = {
    _run("iq1_s", 50): _iq1_s,
    _run("iq1_m", 56): _iq1_m,
    _run("iq2_xxs", 66): _iq2_xxs,
    _run("iq2_xs", 74): _iq2_xs,
    _run("iq2_s", 82): _iq2_s,
    _run("iq3_xxs", 98): _iq3_xxs,
    _run("iq3_s", 110): _iq3_s,
    _run("tq1_0", 54): _tq1_0,
}
RUNS = tuple(DECODERS)


def decode_run(raw: Tensor, element: Element) -> Tensor:
    """raw: [..., row bytes] uint8 -> [..., K] float32."""
    nbytes = round(element.bits * element.run) // 8
    blocks = raw.reshape(-1, nbytes)
    out = torch.empty(blocks.shape[0], element.run, device=raw.device)
    step = CHUNK // element.run
    for start in range(0, blocks.shape[0], step):
        out[start : start + step] = DECODERS[element](blocks[start : start + step])
    return out.view(*raw.shape[:-1], -1)
