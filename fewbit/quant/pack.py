"""Bits to bytes and back: one dense little-endian bit stream per row, first value in the lowest bits.

This is the canonical layout of every plane with fewer than 8 bits. Eight values of b bits fill exactly b bytes, so a
group of eight is one 64-bit word, taken apart in three halvings; 1, 2 and 4 bits have a shorter way.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewbit.errors import SpecError


def packed_size(count: int, bits: int) -> int:
    """Bytes of a row of `count` values."""
    return -(-count * bits // 8)


@cache
def _halvings(bits: int) -> tuple[tuple[int, int, int], ...]:
    """(lane, field, mask): two fields side by side, low in a lane of twice the size, become one field to each lane."""
    steps = []
    for lane, field in ((32, 4 * bits), (16, 2 * bits), (8, bits)):
        mask = sum((2**field - 1) << start for start in range(0, 64, 2 * lane))
        steps.append((lane, field, mask))
    return tuple(steps)


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes: [..., n] uint8, each below 2**bits -> [..., ceil(n * bits / 8)] uint8."""
    if bits == 8:
        return codes
    *leading, n = codes.shape
    size = packed_size(n, bits)
    whole = codes.new_zeros(*leading, n + -n % 8)
    whole[..., :n] = codes
    if bits in (1, 2, 4):
        lanes = _groups(whole, 8 // bits)
        out = lanes[..., 0].clone()
        for i in range(1, 8 // bits):
            out |= lanes[..., i] << (i * bits)
        return out[..., :size].contiguous()
    wide = whole.view(-1).view(torch.int64)
    for lane, field, mask in reversed(_halvings(bits)):
        wide = (wide & mask) | ((wide >> lane & mask) << field)
    return _groups(wide.view(torch.uint8).view(whole.shape), 8)[..., :bits].flatten(-2)[..., :size].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """packed: [..., ceil(count * bits / 8)] uint8 -> [..., count] uint8."""
    size = packed_size(count, bits)
    if packed.shape[-1] != size:
        raise SpecError(f"{count} values of {bits} bits fill {size} bytes, got {packed.shape[-1]}")
    if bits == 8:
        return packed
    if bits in (1, 2, 4):
        lanes = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        return torch.stack(lanes, -1).flatten(-2)[..., :count]
    groups = _groups(pad(packed, (0, -size % bits)), bits)
    wide = pad(groups, (0, 8 - bits)).reshape(-1).view(torch.int64)
    for lane, field, mask in _halvings(bits):
        wide = (wide & mask) | ((wide >> field & mask) << lane)
    return wide.view(torch.uint8).view(*groups.shape[:-2], groups.shape[-2] * 8)[..., :count]


def _groups(x: Tensor, size: int) -> Tensor:
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
