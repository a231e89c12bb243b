"""MXFP4 as gpt-oss stores it, and MiniMax's MXFP8.

gpt-oss quantizes its experts alone, stacked: `gate_up_proj_blocks` [E, N, K / 32, 16] bytes, two codes each, the even
column low, beside `gate_up_proj_scales` [E, N, K / 32]; inputs stay as they are. MiniMax keeps a matrix of E4M3 and a
byte for every 32 columns, and rounds inputs the same way.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fewbit.codecs.codec import Codec, Config, Tensors, by_header, by_method, refuse
from fewbit.codecs.planes import FP8, bound, matrix, need, raw, weight_matrix
from fewbit.errors import CheckpointError
from fewbit.quant.elements import E2M1, E4M3, E8M0
from fewbit.quant.plan import Plan, Rule
from fewbit.quant.qtensor import Quantized, make
from fewbit.quant.spec import Format, QuantSpec, describe, spec

WHERE = "config.json: quantization_config"
BLOCKS, STACKED, WEIGHT, SCALE = "_blocks", "_scales", ".weight", ".weight_scale"
EXPERTS = r".*\.experts\.(?:gate_up_proj|down_proj)$"
MXFP4 = Format(spec(E2M1, (E8M0, 1, 32), rule="mx-ceil"))
MXFP8 = Format(spec(E4M3, (E8M0, 1, 32), rule="mx-ceil"), spec(E4M3, (E8M0, 1, 32), rule="mx-ceil", dynamic=1))
KEYS = ("modules_to_not_convert", "ignored_layers")


def _kept(config: Config) -> Iterable[Rule]:
    """Names and parents of modules left dense, `*` for any part."""
    for key in KEYS:
        for i, name in enumerate(config.get(key) or []):
            if not isinstance(name, str):
                raise CheckpointError(f"{WHERE}.{key}[{i}] must be a string, found {name!r}")
            pattern = re.escape(name).replace(r"\*", ".*")
            yield Rule(rf"(?:.*\.)?{pattern}(?:\..*)?$", "regex", None, f"{WHERE}.{key}[{i}]")


def _plan(config: Config) -> Plan:
    rules = (*_kept(config), Rule(EXPERTS, "regex", MXFP4, f"{WHERE}.quant_method"))
    return Plan(rules, None, "mxfp4")


def _plan8(config: Config) -> Plan:
    return Plan((*_kept(config), Rule("Linear", "class", MXFP8, f"{WHERE}.quant_method")), None, "mxfp8")


def _read(form: Format, tensors: Mapping[str, Tensor]) -> Quantized:
    blocks = need(tensors, BLOCKS, "the codes of the experts")
    scales = need(tensors, STACKED, "the scales of the experts")
    if blocks.dtype != torch.uint8 or blocks.dim() < 3 or blocks.shape[-1] != 16:
        raise CheckpointError(f"{BLOCKS}: want uint8 [E, N, K / 32, 16], found {list(blocks.shape)} {blocks.dtype}")
    if scales.element_size() != 1 or scales.shape != blocks.shape[:-1]:
        want = f"{list(blocks.shape[:-1])} bytes, one for each block"
        raise CheckpointError(f"{STACKED}: want {want}, found {list(scales.shape)} {scales.dtype}")
    shape = (*blocks.shape[:-2], blocks.shape[-2] * 32)
    return Quantized(form, make(form.weight, shape, {"codes": blocks.flatten(-2), "scale0": raw(scales)}))


def _read8(form: Format, tensors: Mapping[str, Tensor]) -> Quantized:
    weight = matrix(WEIGHT, need(tensors, WEIGHT, "every module has one"), FP8)
    scale = (SCALE, need(tensors, SCALE, "every module has one"))
    return Quantized(form, bound(form.weight, weight.shape, raw(weight), scale))


def _fits(form: Format, held: Format, name: str) -> Format:
    reasons = [f"it has no place for {kind}" for kind in form.transforms]
    if form.weight.stored != held.weight.stored:
        reasons.append(f"it holds {describe(held.weight)}")
    if (form.act and form.act.stored) != (held.act and held.act.stored):
        reasons.append(f"its inputs are {describe(held.act) if held.act else 'as they are'}")
    if reasons:
        raise refuse(name, describe(form.weight), *reasons)
    return held


def _write(q: Quantized) -> Tensors:
    if len(q.weight.shape) != 3:
        raise refuse("mxfp4", f"a weight of {list(q.weight.shape)}", "it holds stacked experts [E, N, K] alone")
    return {BLOCKS: torch.unflatten(q.weight.planes["codes"], -1, (-1, 16)), STACKED: q.weight.planes["scale0"]}


def _write8(q: Quantized) -> Tensors:
    weight_matrix(q, "mxfp8")
    return {WEIGHT: q.weight.planes["codes"].view(FP8), SCALE: q.weight.planes["scale0"]}


def _config(formats: Mapping[str, Format], ignored: list[str], kv: QuantSpec | None) -> dict[str, Config]:
    others = [name for name in formats if not re.match(EXPERTS, name)]
    if others or kv:
        raise refuse("mxfp4", others[0] if others else "a quantized cache", "it holds experts alone")
    layers = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": layers}}


def _config8(formats: Mapping[str, Format], ignored: list[str], kv: QuantSpec | None) -> dict[str, Config]:
    if kv:
        raise refuse("mxfp8", "a quantized cache", "its config does not speak of one")
    return {"quantization_config": {"quant_method": "mxfp8", "ignored_layers": ignored}}


CODECS = (
    Codec(
        "mxfp4",
        by_method("mxfp4"),
        _plan,
        (BLOCKS, STACKED),
        (BLOCKS,),
        by_header(_read),
        _read,
        lambda form: _fits(form, MXFP4, "mxfp4"),
        _write,
        _config,
        summary="gpt-oss: MXFP4 experts",
    ),
    Codec(
        "mxfp8",
        by_method("mxfp8"),
        _plan8,
        (WEIGHT, SCALE),
        (SCALE,),
        by_header(_read8),
        _read8,
        lambda form: _fits(form, MXFP8, "mxfp8"),
        _write8,
        _config8,
        explicit=False,
        summary="MiniMax: MXFP8",
    ),
)
