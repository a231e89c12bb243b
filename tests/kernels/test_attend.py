"""The kernel of single queries against plain attention over the same slots, gathered."""

import pytest
import torch

from fewbit.kernels import attend
from fewbit.kernels.compiled import library
from fewbit.modules.attention import explicit

pytestmark = pytest.mark.skipif(isinstance(library("attend"), str), reason=str(library("attend")))
SHAPES = [(4, 4, 64, 64), (8, 2, 64, 64), (6, 2, 128, 128), (4, 1, 256, 256), (4, 2, 40, 24), (3, 3, 7, 7)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "softcap", "sink"), [(None, None, False), (5, None, False), (None, 3.0, False),
                                                        (None, None, True), (9, 2.0, True)])  # fmt: skip
def test_equals_plain_attention(
    shape: tuple[int, int, int, int], dtype: torch.dtype, window: int | None, softcap: float | None, sink: bool
) -> None:
    heads, key_heads, size, value_size = shape
    draw = torch.Generator().manual_seed(1)
    key = torch.randn(100, key_heads, size, generator=draw).to(dtype)
    value = torch.randn(100, key_heads, value_size, generator=draw).to(dtype)
    query = torch.randn(6, heads, size, generator=draw).to(dtype)
    sinks = torch.randn(heads, generator=draw) if sink else None
    order = torch.randperm(100, generator=draw)
    spans = [(0, 1, 1, order[:1]), (1, 2, 37, order[3:40]), (2, 5, 30, order[40:70])]  # token 5 belongs to nobody
    out = torch.full((6, heads, value_size), torch.nan, dtype=dtype)
    attend.attend(query, key, value, out, attend.Queries.of(spans), size**-0.5, window, softcap, sinks)
    for start, stop, length, slots in spans:
        for row in range(start, stop):
            seen = slots[: length - stop + row + 1]
            seen = seen if window is None else seen[-window:]
            k, v = (t[seen].transpose(0, 1)[None].float() for t in (key, value))
            want = explicit(query[row].float()[None, :, None], k, v, None, size**-0.5, softcap, sinks)[0, :, 0]
            bound = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2.0**-8, "atol": 1e-6}
            torch.testing.assert_close(out[row].float(), want, **bound)
    assert bool(out[5].isnan().all())


def test_says_why_not() -> None:
    half = torch.zeros(1, 1, 8, dtype=torch.float16)
    assert "float32 or bfloat16" in (attend.refusal(half, half, half) or "")
    full = torch.zeros(1, 1, 8)
    assert attend.refusal(full, full.bfloat16(), full) is not None and attend.refusal(full, full, full) is None
