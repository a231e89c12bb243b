"""NVIDIA ModelOpt's unified checkpoints: FP8, NVFP4, MX, INT4 and INT8, with what smoothing leaves beside the weights.

NVFP4 multiplies by its outer scale. INT4 packs pairs of rows, low nibble first, in two's complement. The weight_scale_2
of W4A8_AWQ belongs to a kernel's second stage and is not part of the weight.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fewbit.codecs.codec import FLOATS, Codec, Tensors, by_header, refuse
from fewbit.codecs.modelopt_config import (
    ALGORITHMS,
    NVFP4_ACT,
    algorithm_of,
    claims,
    config,
    has_groups,
    plan,
    with_group,
)  # fmt: skip
from fewbit.codecs.planes import FP8, bound, matrix, need, raw, static_act, stored_act, typed, weight_matrix
from fewbit.errors import CheckpointError
from fewbit.quant.elements import E2M1, E4M3, E8M0, F32, INT4, INT8
from fewbit.quant.pack import unpack
from fewbit.quant.qtensor import Planes, QTensor, Quantized, Transform, store
from fewbit.quant.reference import decode
from fewbit.quant.spec import Format, QuantSpec, describe

NAME = "modelopt"
WEIGHT, SCALE, OUTER, INPUT = ".weight", ".weight_scale", ".weight_scale_2", ".input_scale"
SMOOTH = ".pre_quant_scale"
# exports differ in whose buffers the low-rank pair are
LOWS = (".svdquant_lora_a", ".weight_quantizer._svdquant_lora_a", ".weight_quantizer.svdquant_lora_a")
HIGHS = tuple(name[:-1] + "b" for name in LOWS)


def _read(form: Format, tensors: Mapping[str, Tensor]) -> Quantized:
    spec = form.weight
    weight, shape = _codes(spec, need(tensors, WEIGHT, "every module has one"))
    if has_groups(spec) and not spec.scales[0].block[1]:
        spec = with_group(spec, _group_size(need(tensors, SCALE, "every module has one"), shape))
    scales = [(SCALE, need(tensors, SCALE, "every module has one"))]
    if len(spec.scales) == 2:
        scales.append((OUTER, need(tensors, OUTER, "NVFP4 has two levels of scales")))
    held = bound(spec, shape, weight, *scales)
    act, planes = _act(form, tensors)
    transforms = tuple(_transforms(form, tensors, shape))
    return Quantized(Format(held.spec, act, tuple(t.kind for t in transforms)), held, planes, transforms)


def _codes(spec: QuantSpec, weight: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """-> the plane of codes, and [N, K]."""
    if spec.element == E4M3:
        return raw(matrix(WEIGHT, weight, FP8)), (weight.shape[0], weight.shape[1])
    if spec.element == INT8:
        return raw(matrix(WEIGHT, weight, torch.int8)), (weight.shape[0], weight.shape[1])
    n, k = matrix(WEIGHT, weight, torch.uint8).shape
    if spec.element == E2M1:
        return weight, (n, 2 * k)
    rows = torch.stack([weight & 15, weight >> 4], 1).flatten(0, 1)  # the low nibble is the even row
    return store(rows, INT4), (2 * n, k)


def _group_size(scale: Tensor, shape: tuple[int, int]) -> int:
    """What a flat config does not say."""
    columns = scale.shape[-1] if scale.dim() == 2 else 0
    if not columns or shape[1] % columns:
        raise CheckpointError(f"{SCALE}: want [{shape[0]}, groups of {shape[1]} columns], found {list(scale.shape)}")
    return shape[1] // columns


def _act(form: Format, tensors: Mapping[str, Tensor]) -> tuple[QuantSpec | None, Planes]:
    act = form.act
    if act is None or act.scales[-1].dynamic:
        return act, {}
    if INPUT not in tensors and form.weight.element == E2M1 and act.element == E4M3:
        # W4A8 recipes are not calibrated: the tool then rounds the whole input by its largest value
        return replace(act, scales=(replace(act.scales[0], dynamic=True),)), {}
    scale = need(tensors, INPUT, "the algorithm rounds inputs with a static scale")
    return static_act(act, {len(act.scales) - 1: (INPUT, scale)})


def _transforms(form: Format, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> list[Transform]:
    out = []
    if SMOOTH in tensors:
        scale = _floats(SMOOTH, tensors[SMOOTH], shape[1])
        out.append(Transform("input_scale", {"scale": scale}))
    if "low_rank" in form.transforms:
        why = "NVFP4_SVD adds a low-rank product"
        low, high = (need(tensors, next((e for e in ends if e in tensors), ends[0]), why) for ends in (LOWS, HIGHS))
        low, high = _floats(LOWS[0], low, low.shape[0], shape[1]), _floats(HIGHS[0], high, shape[0], low.shape[0])
        out.append(Transform("low_rank", {"a": low, "b": high}))
    return out


def _floats(ending: str, tensor: Tensor, *shape: int) -> Tensor:
    if tensor.dtype not in FLOATS or tuple(tensor.shape) != shape:
        raise CheckpointError(f"{ending}: want floats of {list(shape)}, found {list(tensor.shape)} {tensor.dtype}")
    return tensor


def _fit(form: Format) -> Format:
    """The same algorithm with F32 scales that multiply; None of the names fits: every one of them is listed."""
    if not form.weight.scales or form.weight.zeros:
        raise refuse(NAME, describe(form.weight), "it has scales and no zero points")
    weight, act = _multiplying(form.weight), form.act
    if act is not None:
        outer_static = act.element == E2M1 and len(act.scales) == 2
        act = NVFP4_ACT if outer_static else replace(_multiplying(act), rule=_rule(act))
    fitted = Format(replace(weight, rule=_rule(weight)), act, form.transforms)
    if algorithm_of(fitted) is None:
        inputs = describe(form.act) if form.act else "as they are"
        beside = f", with {', '.join(form.transforms)}" if form.transforms else ""
        reasons = [f"no algorithm has these weights with inputs {inputs}{beside}", f"known: {', '.join(ALGORITHMS)}"]
        raise refuse(NAME, describe(form.weight), *reasons)
    return fitted


def _multiplying(s: QuantSpec) -> QuantSpec:
    kept = (replace(c, op="mul", element=F32 if c.element.kind == "native" else c.element) for c in s.scales)
    return replace(s, scales=tuple(kept))


def _rule(s: QuantSpec) -> str:
    if s.scales[0].element == E8M0:
        return "mx-ceil"
    return s.rule if s.rule == "four-over-six" else "amax"


def _write(q: Quantized) -> Tensors:
    n, k = weight_matrix(q, NAME)
    w, scale = q.weight, q.weight.spec.scales[0]
    plane = typed(scale, w.planes["scale0"])
    shapes = {(0, 0): (), (1, 0): (n,), (128, 128): (plane.shape[0], 1, plane.shape[1], 1)}
    out = {WEIGHT: _codes_out(w, k), SCALE: plane.reshape(shapes.get(scale.block, plane.shape))}
    if len(w.spec.scales) == 2:
        out[OUTER] = w.planes["scale1"].reshape(())
    elif w.spec.element == INT4 and q.format.act:
        out[OUTER] = decode(w).abs().amax() / E4M3.max
    act = q.format.act
    if act and not act.scales[-1].dynamic:
        out[INPUT] = stored_act(q, NAME, f"scale{len(act.scales) - 1}").reshape(())
    for transform in q.transforms:
        names = {"input_scale": {"scale": SMOOTH}, "low_rank": {"a": LOWS[0], "b": HIGHS[0]}}[transform.kind]
        out |= {ending: transform.tensors[name] for name, ending in names.items()}
    return out


def _codes_out(w: QTensor, k: int) -> Tensor:
    codes = w.planes["codes"]
    if w.spec.element == E4M3:
        return codes.view(FP8)
    if w.spec.element == INT8:
        return codes.view(torch.int8)
    if w.spec.element == E2M1:
        return codes
    if w.shape[-2] % 2:
        raise refuse(NAME, f"int4 of {list(w.shape)}", "it packs pairs of rows: N must be even")
    pairs = unpack(codes, 4, k)
    return pairs[0::2] | (pairs[1::2] << 4)


CODECS = (
    Codec(
        NAME,
        claims,
        plan,
        (WEIGHT, SCALE, OUTER, INPUT, SMOOTH, *LOWS, *HIGHS),
        (SCALE, OUTER, SMOOTH, *LOWS),
        by_header(_read),
        _read,
        _fit,
        _write,
        config,
        kv_endings={"k": ".k_proj.k_scale", "v": ".v_proj.v_scale"},
        summary="NVIDIA ModelOpt: FP8, NVFP4, MXFP4, MXFP8, INT4 AWQ, INT8",
    ),
)
