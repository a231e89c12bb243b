"""smooth: outliers of the activations move into the weights, where both are rounded."""

import pytest
import torch
from torch import Tensor

from fewbit.algos import smooth
from fewbit.algos.algo import Stats
from fewbit.errors import SpecError
from fewbit.quant.formats import FORMATS
from fewbit.quant.reference import decode, encode, fake_quant
from fewbit.quant.spec import Format

ROWS = [
    "int8-channel-a8",
    "int8-tensor-a8",
    "fp8-channel",
    "fp8-tensor-static",
    "fp8-block",
    "nvfp4",
    "mxfp4",
    "int4-g64",
]
SHAPES = [(7, 100), (33, 192)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stats(k: int, outliers: float) -> Stats:
    x = noise(200, k, seed=k)
    x[:, ::29] *= outliers
    return Stats(len(x), x.abs().amax(0), x.abs().mean(0), x.square().mean(0), None, x)


def output_error(w: Tensor, s: Tensor, format: Format, x: Tensor) -> float:
    rounded = fake_quant(x / s, format.act) if format.act else x / s
    back = decode(encode(w * s, format.weight))
    return float(((rounded.double() @ back.double().T) - x.double() @ w.double().T).square().mean())


@pytest.mark.parametrize("name", ROWS)
def test_never_worse_than_none(name: str) -> None:
    format = FORMATS[name]
    for n, k in SHAPES:
        for outliers in (1, 40):
            w, st = noise(n, k), stats(k, outliers)
            assert st.sample is not None
            s = smooth.ALGO.scale([w], [format.weight], format.act, st, smooth.Options())  # type: ignore[misc]
            assert torch.equal(s, smooth.scale([w], [format.weight], format.act, st, smooth.Options()))
            ones = torch.ones(k)
            assert output_error(w, s, format, st.sample) <= output_error(w, ones, format, st.sample) * (1 + 1e-5)


@pytest.mark.parametrize(("name", "factor"), [("int8-channel-a8", 0.2), ("int8-tensor-a8", 0.2)])
def test_outlier_channels(name: str, factor: float) -> None:
    format, w, st = FORMATS[name], noise(64, 256), stats(256, 50)
    assert st.sample is not None
    s = smooth.scale([w], [format.weight], format.act, st, smooth.Options())
    plain = output_error(w, torch.ones(256), format, st.sample)
    assert output_error(w, s, format, st.sample) < factor * plain


def test_the_strength_given_is_the_strength_used() -> None:
    w, st, format = noise(16, 64), stats(64, 10), FORMATS["int8-channel-a8"]
    want = st.amax.sqrt() / w.abs().amax(0).sqrt()
    torch.testing.assert_close(smooth.scale([w], [format.weight], format.act, st, smooth.Options(alpha=0.5)), want)


def test_identity_where_nothing_is_gained() -> None:
    w, st = torch.eye(16, 64), stats(64, 10)
    st.sample = torch.eye(64)
    format = FORMATS["int8-channel-a8"]
    ones = torch.ones(64)
    if output_error(w, ones, format, st.sample) == 0:
        assert torch.equal(smooth.scale([w], [format.weight], format.act, st, smooth.Options()), ones)


def test_channels_never_active() -> None:
    w, st, format = noise(16, 64), stats(64, 10), FORMATS["int8-channel-a8"]
    assert st.sample is not None
    st.amax[3], st.sample[:, 3] = 0, 0
    for options in (smooth.Options(), smooth.Options(alpha=1)):
        s = smooth.scale([w], [format.weight], format.act, st, options)
        assert bool(s.isfinite().all()) and bool((s > 0).all())
    st.amax.zero_(), st.sample.zero_()
    assert bool(smooth.scale([w], [format.weight], format.act, st, smooth.Options()).isfinite().all())


def test_encode_is_the_specs_own_rule() -> None:
    group, format = [noise(8, 64), 5 * noise(4, 64)], FORMATS["nvfp4"]
    a, b = smooth.ALGO.encode(group, [format.weight] * 2, None, smooth.Options())
    assert torch.equal(a.weight.planes["scale1"], b.weight.planes["scale1"])
    assert torch.equal(decode(b.weight), decode(encode(group[1], format.weight)))


def test_what_is_refused() -> None:
    with pytest.raises(SpecError, match="alpha"):
        smooth.Options(alpha=2.0)
