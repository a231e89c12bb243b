"""What a cache gives back, for every format: by quant.reference, and for bytes by ml_dtypes' casts and plain numpy."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit.errors import CheckpointError
from fewbit.kernels.cache import Cache, Rounding, held_as
from fewbit.kernels.cache_packed import PackedCache, room
from fewbit.modules.attention import rounded
from fewbit.quant.kv import by_row
from fewbit.quant.reference import fake_quant
from fewbit.quant.spec import spec
from tests.kernels.caches import FORMATS, WHOLE, rounding

CPU = torch.device("cpu")
SHAPES = [(1, 64, 64), (3, 40, 24), (2, 7, 7), (2, 192, 128)]  # heads, numbers of a key, of a value


def made(heads: int, size: int, value_size: int, tokens: int = 23) -> tuple[Tensor, Tensor]:
    """With a row of zeros, one large and one small."""
    draw = torch.Generator().manual_seed(size)
    key, value = (torch.randn(1, heads, tokens, d, generator=draw) for d in (size, value_size))
    key[:, :, 3], key[:, :, 4] = 0, key[:, :, 4] * 100
    value[:, :, 5] *= 1e-4
    return key, value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMATS)
def test_gives_back_what_the_spec_rounds_to(form: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """To the bit, at slots in no order, in two writes; bytes as the spec has them."""
    key, value = (t.to(dtype) for t in made(*shape))
    how = rounding(form, shape[0])
    cache = room(40, key, value, None, how)
    assert isinstance(cache, Cache if form in WHOLE else PackedCache) and cache.rounds
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:23]
    cache.write(slots[:9], key[:, :, :9], value[:, :, :9])
    cache.write(slots[9:], key[:, :, 9:], value[:, :, 9:])
    for got, want in zip(cache.read(slots, dtype), rounded(key, value, *how), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


def by_hand(x: Tensor, scale: Tensor, cast: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    wide = x.float().numpy() / scale.numpy()
    return torch.from_numpy(cast(wide).astype(np.float32) * scale.numpy())


def casts(form: str) -> Callable[[np.ndarray], np.ndarray]:
    if form.startswith("int8"):
        return lambda x: np.clip(np.rint(x), -128, 127)
    top = 240 if "inc" in form else 57344 if "e5m2" in form else 448
    kind = ml_dtypes.float8_e5m2 if "e5m2" in form else ml_dtypes.float8_e4m3fn
    return lambda x: np.clip(x, -top, top).astype(kind)


@pytest.mark.parametrize("form", WHOLE)
def test_codes_are_those_of_another_library(form: str) -> None:
    key, value = made(3, 40, 24)
    spec, *planes = how = rounding(form, 3)
    cache = room(23, key, value, None, how)
    cache.write(torch.arange(23), key, value)
    top = float(casts(form)(np.array([1e9], np.float32)).astype(np.float32)[0])
    for x, given, got in zip((key, value), planes, cache.read(torch.arange(23), torch.float32), strict=True):
        if spec.dynamic:
            scale = x.abs().amax(-1, keepdim=True) / top
            scale = scale.where(scale > 0, 1.0)
        else:
            scale = given["scale0"].reshape(1, -1, 1, 1)
        assert torch.equal(got, by_hand(x, scale, casts(form)))


def test_other_formats_than_those_with_a_name() -> None:
    """What a checkpoint may declare besides: a scale of a whole call becomes one of each row."""
    nvfp4 = FORMATS["nvfp4"]
    outer = nvfp4.scales[1]
    call = spec(nvfp4.element, (nvfp4.scales[0].element, 1, 16), (outer.element, 0, 0), dynamic=2)
    assert by_row(call) == nvfp4 and held_as(by_row(call), CPU) == "packed"
    measured = spec(nvfp4.element, (nvfp4.scales[0].element, 1, 16), (outer.element, 0, 0), dynamic=1)
    assert by_row(measured) == measured and held_as(measured, CPU) == "emulated"
    key, value = made(2, 32, 32)
    how: Rounding = (measured, {"scale1": torch.tensor([[0.01]])}, {"scale1": torch.tensor([[0.01]])})
    cache = room(3, key, value, torch.bfloat16, how)
    assert not cache.rounds and isinstance(cache, Cache) and cache.key.dtype == torch.bfloat16
    assert torch.equal(rounded(key, value, *how)[0], fake_quant(key, measured, how[1]))


def test_as_many_scales_as_heads() -> None:
    key, value = made(3, 8, 8)
    with pytest.raises(CheckpointError, match="2 scales of the KV cache, and a layer with 3 heads"):
        room(1, key, value, None, rounding("fp8-head measured", 2))
