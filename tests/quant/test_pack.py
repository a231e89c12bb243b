"""pack and unpack against one long Python number, and the golden words of the dialects."""

import numpy as np
import pytest
import torch

from fewbit.errors import SpecError
from fewbit.quant import elements
from fewbit.quant.pack import pack, packed_size, unpack
from tests.quant.plain import bit_stream

LENGTHS = (0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 100)


def codes(bits: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(bits).integers(0, 2**bits, shape, np.uint8))


def word(values: list[int], bits: int) -> str:
    """Codes -> the little-endian 32-bit words they fill."""
    packed = pack(torch.tensor(values, dtype=torch.uint8), bits).numpy()
    return " ".join(f"{w:08X}" for w in packed.view("<u4"))


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_is_a_bit_stream(bits: int) -> None:
    for n in LENGTHS:
        for shape in ((n,), (3, n), (2, 2, n), (0, n)):
            c = codes(bits, *shape)
            packed = pack(c, bits)
            assert packed.shape == (*shape[:-1], packed_size(n, bits))
            assert torch.equal(unpack(packed, bits, n), c)
            if c.numel():
                for row, got in zip(c.view(-1, n).tolist(), packed.reshape(-1, packed_size(n, bits)), strict=True):
                    assert bytes(got.tolist()) == bit_stream(row, bits)


@pytest.mark.parametrize("bits", range(1, 9))
def test_strided_views_pack_like_their_copies(bits: int) -> None:
    c = codes(bits, 6, 40)
    for view in (c.t(), c[::2], c[:, ::5], c[:, 3:29], c[0].expand(4, 40), c[:1].as_strided((1, 8), (1, 1))):
        packed = pack(view, bits)
        assert torch.equal(packed, pack(view.clone(), bits))
        assert torch.equal(unpack(packed.t().contiguous().t(), bits, view.shape[-1]), view)


@pytest.mark.parametrize("bits", range(1, 9))
def test_shapes_are_known_without_data(bits: int) -> None:
    meta = torch.empty(4, 33, dtype=torch.uint8, device="meta")
    packed = pack(meta, bits)
    assert packed.shape == (4, packed_size(33, bits))
    assert unpack(packed, bits, 33).shape == (4, 33)


def test_a_wrong_length_is_an_error() -> None:
    with pytest.raises(SpecError, match="33 values of 3 bits fill 13 bytes, got 12"):
        unpack(torch.zeros(2, 12, dtype=torch.uint8), 3, 33)


def test_golden_words() -> None:
    """What real files hold: GPTQ's symmetric zeros, the order of nibbles in GPTQ, compressed-tensors and AWQ."""
    assert word(list(range(8)), 4) == "76543210"
    assert word([0, 2, 4, 6, 1, 3, 5, 7], 4) == "75316420"  # AWQ: the columns in its order
    assert (word([7] * 8, 4), word([8] * 8, 4)) == ("77777777", "88888888")
    assert (word([127] * 4, 8), word([128] * 4, 8)) == ("7F7F7F7F", "80808080")
    assert (word([1] * 16, 2), word([2] * 16, 2)) == ("55555555", "AAAAAAAA")


def test_golden_three_bits() -> None:
    """GPTQ's 3-bit stream: 32 values in 3 words; values 10 and 21 lie across two."""
    values = [0] * 32
    values[10], values[21] = 7, 7
    assert word(values, 3) == "C0000000 80000001 00000003"


def test_golden_e2m1_pair() -> None:
    pair = elements.encode(torch.tensor([1.0, -6.0]), elements.E2M1)
    assert pair.tolist() == [0x2, 0xF]
    assert pack(pair, 4).tolist() == [0xF2]
    assert pack(pair.flip(0), 4).tolist() == [0x2F]  # bitsandbytes: the first of a pair is the high nibble
