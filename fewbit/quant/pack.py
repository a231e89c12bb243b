"""Bits to bytes and back: one dense little-endian bit stream per row, first value in the lowest bits.

This is the canonical layout of every plane with fewer than 8 bits. Eight values of b bits fill exactly b bytes, so
every width goes through the same eight shifts; 4 and 2 bits have a shorter way.
"""

import torch
from torch import Tensor

from fewbit.errors import SpecError


def packed_size(count: int, bits: int) -> int:
    """Bytes of a row of `count` values."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes: [..., n] uint8, each below 2**bits -> [..., ceil(n * bits / 8)] uint8."""
    if bits == 8:
        return codes
    n = codes.shape[-1]
    groups = torch.nn.functional.pad(codes, (0, -n % 8)).unflatten(-1, (-1, 8))
    if bits in (1, 2, 4):
        per = 8 // bits
        lanes = groups.reshape(*codes.shape[:-1], -1, per)
        out = lanes[..., 0].clone()
        for i in range(1, per):
            out |= lanes[..., i] << (i * bits)
        return out[..., : packed_size(n, bits)]
    out = torch.zeros(*groups.shape[:-1], bits, dtype=torch.uint8, device=codes.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        out[..., byte] |= groups[..., i] << shift
        if shift + bits > 8:
            out[..., byte + 1] |= groups[..., i] >> (8 - shift)
    return out.flatten(-2)[..., : packed_size(n, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """packed: [..., ceil(count * bits / 8)] uint8 -> [..., count] uint8."""
    if packed.shape[-1] != packed_size(count, bits):
        raise SpecError(f"{count} values of {bits} bits fill {packed_size(count, bits)} bytes, got {packed.shape[-1]}")
    if bits == 8:
        return packed
    mask = 2**bits - 1
    if bits in (1, 2, 4):
        lanes = [(packed >> shift) & mask for shift in range(0, 8, bits)]
        return torch.stack(lanes, -1).flatten(-2)[..., :count]
    groups = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    values = []
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        value = groups[..., byte] >> shift
        if shift + bits > 8:
            value = value | (groups[..., byte + 1] << (8 - shift))
        values.append(value & mask)
    return torch.stack(values, -1).flatten(-2)[..., :count]
