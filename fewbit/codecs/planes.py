"""Between the tensors of a checkpoint and the planes of a QTensor: what several dialects store the same way.

A stored scale says by its dtype what it is; the plan only says what it should be. Everything works on meta tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fewbit.codecs.codec import FLOATS
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.quant.elements import E4M3, E8M0, Element
from fewbit.quant.qtensor import Planes, QTensor, Quantized, grid, make
from fewbit.quant.spec import Format, QuantSpec, Scale

FP8 = torch.float8_e4m3fn
ELEMENT_OF = {**FLOATS, torch.float8_e8m0fnu: E8M0, FP8: E4M3}
Named = tuple[str, Tensor]  # the ending of a tensor's name, and the tensor


def need(tensors: Mapping[str, Tensor], ending: str, why: str) -> Tensor:
    """The tensor of this ending; where it is missing, an error that says why it should be there."""
    if ending in tensors:
        return tensors[ending]
    raise CheckpointError(f"{ending} is missing: {why}; found {', '.join(sorted(tensors)) or 'nothing'}")


def matrix(ending: str, tensor: Tensor, *dtypes: torch.dtype) -> Tensor:
    """The tensor, if it is a matrix of one of these types."""
    if tensor.dim() != 2 or tensor.dtype not in dtypes:
        types = " or ".join(_name(d) for d in dtypes)
        raise CheckpointError(f"{ending}: want a {types} matrix, found {list(tensor.shape)} {_name(tensor.dtype)}")
    return tensor


def raw(tensor: Tensor) -> Tensor:
    """One-byte types as the uint8 that codes travel in."""
    return tensor if tensor.dtype == torch.uint8 else tensor.view(torch.uint8)


def bound(spec: QuantSpec, shape: Sequence[int], codes: Tensor, *scales: Named, zero: Tensor | None = None) -> QTensor:
    """Codes and the stored scales, inner to outer -> a QTensor whose spec has the scales' true types."""
    planes = {"codes": codes} | ({} if zero is None else {"zero0": zero})
    for i, (ending, tensor) in enumerate(scales):
        scale, planes[f"scale{i}"] = placed(spec.scales[i], ending, tensor, shape)
        spec = replace(spec, scales=(*spec.scales[:i], scale, *spec.scales[i + 1 :]))
    return make(spec, shape, planes)


def placed(scale: Scale, ending: str, tensor: Tensor, shape: Sequence[int]) -> tuple[Scale, Tensor]:
    """A stored scale -> the Scale with its true element, and its plane [..., rows, cols]."""
    element = stored_element(scale.element, ending, tensor.dtype)
    rows, cols = grid(shape, scale.block)
    if tensor.numel() != rows * cols or not _lies_as(tensor.shape, rows, cols):
        over = " x ".join(str(b or "all") for b in scale.block)
        want = f"[{rows}, {cols}] scales (one for each {over} of [{shape[-2]}, {shape[-1]}])"
        raise CheckpointError(f"{ending}: want {want}, found {list(tensor.shape)}")
    plane = tensor if element.kind == "native" else raw(tensor)
    return replace(scale, element=element), plane.reshape(rows, cols)


def _lies_as(shape: Sequence[int], rows: int, cols: int) -> bool:
    """[], [N], [N, 1], [a, b], [a, 1, b, 1] are ways to write a grid; a transposed one is not."""
    if len(shape) < 2:
        return 1 in (rows, cols)
    return tuple(shape) in ((rows, cols), (rows, 1, cols, 1), (1, rows, cols))


def stored_element(declared: Element, ending: str, dtype: torch.dtype) -> Element:
    """What a scale of this dtype is, if it may stand where `declared` is expected."""
    if dtype == torch.uint8 and declared.kind != "native":
        return declared
    found = ELEMENT_OF.get(dtype)
    # a power of two is a scale like any other: DeepSeek's ue8m0 files keep them as F8_E8M0 or as F32
    if found == declared or (declared.kind == "native" and (found == E8M0 or dtype in FLOATS)):
        assert found is not None
        return found
    want = "F32, F16 or BF16" if declared.kind == "native" else f"{declared.name} in a byte"
    raise CheckpointError(f"{ending}: want {want} scales, found {_name(dtype)}")


def static_act(act: QuantSpec, scales: Mapping[int, Named], zero: Tensor | None = None) -> tuple[QuantSpec, Planes]:
    """The stored activation scales, by level -> the act spec with their true types, and its planes."""
    chain, planes = list(act.scales), {} if zero is None else {"zero0": zero.reshape(1, 1)}
    for level, (ending, tensor) in scales.items():
        chain[level], planes[f"scale{level}"] = placed(chain[level], ending, tensor, (1, 1))
    return replace(act, scales=tuple(chain)), planes


def stored_act(q: Quantized, codec: str, name: str) -> Tensor:
    """A static activation plane that the dialect must store, or a refusal that says how to get one."""
    if name in q.act:
        return q.act[name]
    reasons = ["its activation scale is static and none is known", "calibrate, or take a format without activations"]
    raise UnsupportedError(f"{codec} cannot hold this module", reasons)


def typed(scale: Scale, plane: Tensor) -> Tensor:
    """A scale plane in the dtype that files use for it."""
    return plane.view(FP8) if scale.element == E4M3 else plane


def weight_matrix(q: Quantized, codec: str) -> tuple[int, int]:
    """[N, K] of a weight, for a dialect that stores each expert apart."""
    if len(q.weight.shape) != 2:
        reasons = ["it stores each expert apart, as a matrix"]
        raise UnsupportedError(f"{codec} cannot hold a weight of {list(q.weight.shape)}", reasons)
    return q.weight.shape[0], q.weight.shape[1]


def with_rules(form: Format, weight: str, act: str) -> Format:
    """The format as this dialect's own tools choose its scales."""
    return replace(
        form,
        weight=replace(form.weight, rule=weight),
        act=replace(form.act, rule=act) if form.act else None,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
