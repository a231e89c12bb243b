"""QTensor: planes checked against the spec, cuts equal to cuts of the decoded tensor, stacks and orders of rows."""

from math import gcd

import pytest
import torch

from fewbit.errors import SpecError
from fewbit.quant import qtensor
from fewbit.quant.elements import F16, INT4
from fewbit.quant.formats import FORMATS, ROWS
from fewbit.quant.qtensor import QTensor, bits_per_weight, grid, make, stack
from fewbit.quant.reference import decode, encode
from fewbit.quant.spec import FLAT, QuantSpec, spec

WRITABLE = [name for name, row in ROWS.items() if row.weight.element.kind != "run"]
N, K = 260, 512


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def unit(weight: QuantSpec, axis: int, size: int) -> int:
    """The least cut along an axis that ends on a block edge; 0 = none does."""
    steps = [1]
    for scale in (*weight.scales, *weight.zeros):
        rows, cols = scale.block
        if rows == FLAT:
            steps.append(cols // gcd(cols, K) if axis == -2 else 0)
        else:
            steps.append((rows if axis == -2 else cols) or 1)
    return 0 if 0 in steps else max(steps)


@pytest.mark.parametrize("name", WRITABLE)
def test_cuts_are_cuts_of_the_decoded_tensor(name: str) -> None:
    weight = FORMATS[name].weight
    q = encode(normal(2, N, K), weight)
    whole = decode(q)
    assert torch.equal(decode(qtensor.slice(q, 0, 1, 2)), whole[1:])
    for axis, size in ((-2, N), (-1, K)):
        step = unit(weight, axis, size)
        for start, stop in ((0, step), (step, 2 * step), (step, size), (0, size)) if 0 < step < size else ():
            cut = qtensor.slice(q, axis, start, stop)
            assert make(cut.spec, cut.shape, cut.planes) == cut
            assert torch.equal(decode(cut), whole.narrow(axis, start, stop - start))
            same = qtensor.slice(q, axis + 3, start, stop)
            assert torch.equal(decode(same), decode(cut))


@pytest.mark.parametrize("name", WRITABLE)
def test_cuts_inside_a_block_are_refused(name: str) -> None:
    weight = FORMATS[name].weight
    q = encode(normal(N, K), weight)
    for axis, size in ((-2, N), (-1, K)):
        step = unit(weight, axis, size)
        if step == 0:
            with pytest.raises(SpecError, match="its columns cannot be cut"):
                qtensor.slice(q, axis, 0, size // 2)
        if step > 1:
            for start, stop in ((0, 1), (1, step), (step // 2, step), (step, step + 1)):
                with pytest.raises(SpecError, match=rf"cannot cut an axis of \d+ at {start}|at \d+:\d+$"):
                    qtensor.slice(q, axis, start, stop)


def test_a_ragged_last_block_can_be_cut_off() -> None:
    q = encode(normal(130, 300), FORMATS["fp8-block"].weight)
    last = qtensor.slice(qtensor.slice(q, -2, 128, 130), -1, 256, 300)
    assert last.shape == (2, 44)
    assert torch.equal(decode(last), decode(q)[128:, 256:])


@pytest.mark.parametrize(("axis", "start", "stop"), [(0, 3, 3), (0, 4, 2), (0, -1, 2), (0, 0, 9), (1, 0, 65)])
def test_cuts_outside_the_tensor_are_refused(axis: int, start: int, stop: int) -> None:
    with pytest.raises(SpecError, match=f"cannot cut {start}:{stop} from an axis of"):
        qtensor.slice(encode(normal(8, 64), FORMATS["mxfp4"].weight), axis, start, stop)


@pytest.mark.parametrize("name", ["int4-g128-asym", "int8-tensor", "nvfp4", "mxfp6-e3m2", "fp8-channel", "q4_k"])
def test_rows_in_another_order(name: str) -> None:
    q = encode(normal(2, 96, 512), FORMATS[name].weight)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    assert torch.equal(decode(qtensor.rows(q, order)), decode(q)[:, order])


@pytest.mark.parametrize("name", ["fp8-block", "nf4", "nf4-dq"])
def test_rows_that_share_a_scale_keep_their_order(name: str) -> None:
    q = encode(normal(256, 256), FORMATS[name].weight)
    with pytest.raises(SpecError, match="the rows cannot be reordered"):
        qtensor.rows(q, torch.arange(256))


@pytest.mark.parametrize("name", WRITABLE)
def test_stack(name: str) -> None:
    parts = [encode(normal(4, 512) + i, FORMATS[name].weight) for i in range(3)]
    whole = stack(parts)
    assert whole.shape == (3, 4, 512)
    assert make(whole.spec, whole.shape, whole.planes) == whole
    assert torch.equal(decode(whole), torch.stack([decode(part) for part in parts]))


def test_stack_wants_equal_parts() -> None:
    q = encode(normal(4, 256), FORMATS["int4-g128"].weight)
    for other in (encode(normal(5, 256), q.spec), encode(normal(4, 256), FORMATS["int4-g64"].weight)):
        with pytest.raises(SpecError, match="cannot stack"):
            stack([q, other])


def test_make_checks_every_plane() -> None:
    q = encode(normal(4, 256), FORMATS["int4-g128"].weight)
    good = q.planes
    bad: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "missing": ({"codes": good["codes"]}, r"holds planes \['codes', 'scale0'\], got \['codes'\]"),
        "extra": ({**good, "zero0": good["scale0"]}, r"got \['codes', 'scale0', 'zero0'\]"),
        "shape": ({**good, "scale0": good["scale0"].t()}, r"plane scale0 .* want \[4, 2\] .* got \[2, 4\]"),
        "dtype": ({**good, "scale0": good["scale0"].float()}, "torch.float16, got .* torch.float32"),
        "codes": ({**good, "codes": good["codes"][:, :-1]}, r"plane codes .* want \[4, 128\]"),
    }
    for planes, message in bad.values():
        with pytest.raises(SpecError, match=message):
            make(q.spec, q.shape, planes)
    with pytest.raises(SpecError, match="a row of 100 does not divide"):
        make(FORMATS["iq2_s"].weight, (4, 100), {})


def test_shapes_need_no_data() -> None:
    for row in ROWS.values():
        q = qtensor.empty(row.weight, (2, 128, 512), "meta")
        assert q.device.type == "meta"
        assert q.planes.keys() == qtensor.planes_of(row.weight, (2, 128, 512)).keys()


def test_bits_per_weight_counts_whole_axes_when_the_shape_is_known() -> None:
    channel = FORMATS["int8-channel"].weight
    assert bits_per_weight(channel) == 8
    assert bits_per_weight(channel, (64, 32)) == 8 + 16 / 32
    assert bits_per_weight(FORMATS["fp8-tensor"].weight, (64, 32)) == 8 + 32 / 2048
    assert (
        bits_per_weight(spec(INT4, (F16, 1, 128)), (8, 200)) == 4 + 16 * 2 / 200
    )  # a ragged block costs a whole scale


def test_grid() -> None:
    assert grid((5, 300), (1, 128)) == (5, 3)
    assert grid((5, 300), (128, 128)) == (1, 3)
    assert grid((5, 300), (0, 0)) == (1, 1)
    assert grid((7, 5, 300), (1, 0)) == (5, 1)
    assert grid((5, 300), (FLAT, 64)) == (1, 24)


def test_scale_codes_are_unpacked() -> None:
    q = encode(normal(4, 512), FORMATS["q4_k"].weight)
    assert qtensor.codes(q).shape == (4, 512)
    assert qtensor.scale_codes(q, "scale0").shape == (4, 16)
    assert qtensor.scale_codes(q, "zero1").shape == (4, 2)
    order = torch.arange(511, -1, -1)
    assert torch.equal(qtensor.columns(q, order), qtensor.codes(q).flip(-1))


def test_to_moves_every_plane() -> None:
    q = encode(normal(4, 512), FORMATS["nvfp4"].weight)
    moved = q.to("meta")
    assert isinstance(moved, QTensor)
    assert {plane.device.type for plane in moved.planes.values()} == {"meta"}
