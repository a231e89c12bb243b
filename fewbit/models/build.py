"""load: any checkpoint -> a transformers-style module, its weights streamed in one tensor at a time.

Peak memory is the final model plus the largest tensor: each tensor goes to its place as it is read, and is quantized on
the way when `format` asks for it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbit import codecs
from fewbit.errors import SpecError, UnsupportedError
from fewbit.kernels.select import known_or_raise
from fewbit.models import fuse as fusing
from fewbit.models import hf, kv, twin
from fewbit.models.account import finish
from fewbit.models.fill import Filler, is_stack, prepare, settle
from fewbit.models.finding import refuse_on_errors
from fewbit.models.shard_source import sharded
from fewbit.models.shard_values import Ranks
from fewbit.models.values import Watch
from fewbit.models.verify import building, plausible, verify_source
from fewbit.modules.linear import Linear, Options
from fewbit.quant.formats import FORMATS
from fewbit.quant.plan import Plan, Rule
from fewbit.quant.spec import Format

ACTIVATIONS = ("declared", "hardware", "fast", "off")
ROUTERS = ("gate", "router", "shared_expert_gate", "classifier", "wg")  # small, and their choices are discrete


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    kernels: str = "auto",
    activations: str = "declared",
    format: str | Format | Plan | None = None,
    trust_remote_code: bool = False,
    unsafe_skip_verify: Sequence[str] = (),
    attend: Callable[[Any], str] = twin.require,
    ranks: Ranks | None = None,
    fuse: bool = False,
    cached: kv.Asked | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> nn.Module:
    """A folder or a .gguf file -> the model in eval mode: model(input_ids).logits, model.generate(...).

    dtype: of everything that is not quantized; None = as the config says. kernels: "auto" or a kernel's name.
    activations: "declared", "hardware" to leave them in dtype where the device lacks theirs, "fast" to round them to
    int8 besides where weights alone are quantized and that is faster, "off" to leave all.
    format: quantize every linear and expert on arrival.
    attend: config -> the attention that the architecture is built with, or an error. ranks: hold one rank's part only.
    fuse: with fused modules where the twin agrees; what became of each is model.fewbit_fused.
    cached: what keys and values are rounded to; None: as the checkpoint declares.
    tell: called with how many tensors are in their places, of how many.
    """
    if activations not in ACTIVATIONS:
        raise SpecError(f"activations={activations!r}: known are {', '.join(ACTIVATIONS)}")
    known_or_raise(kernels)
    unsafe_skip_verify = (*unsafe_skip_verify, *(cached.skipped if cached is not None else ()))
    with codecs.open(path) as source:
        if format is not None and source.modules:
            raise UnsupportedError(
                f"{path}: already quantized ({source.dialect}); format={format!r} needs float weights"
            )
        with building(source):
            config = hf.read_config(path if trust_remote_code else source.config, trust_remote_code)
            plausible(source, config)
            options = Options(kernels, activations, resolve_dtype(dtype, config))
            model = hf.build(config, options.dtype, attend(config))
        refuse_on_errors(source.path, verify_source(source, model), unsafe_skip_verify)
        prepare(model)
        formats = online(model, format)
        shards = sharded(model, config, source, formats, options, ranks) if ranks is not None else None
        make = shards.filler if shards is not None else Filler
        filler = make(model, hf.rules(model), options, torch.device(device), formats)
        watch = Watch(source)
        filler.watch, filler.tell = watch.see, tell
        places = filler.fill(source)
        refuse_on_errors(source.path, watch.finish(), unsafe_skip_verify)
        finish(filler, places, source, unsafe_skip_verify)
        kv.apply(model, source, filler, cached)
        if shards is not None:
            shards.finish()
    model.to(device)
    if fuse:
        setattr(model, fusing.ATTRIBUTE, fusing.apply(model, fusing.plan(config)))
    settle(model)
    if (generation := hf.generation_config(path)) is not None:
        model.generation_config = generation
    return model


def resolve_dtype(dtype: torch.dtype | str | None, config: Any) -> torch.dtype:
    """What was asked, else what the config declares, else float32."""
    if dtype is None:
        text = config.get_text_config()
        dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise SpecError(f"dtype={dtype!r}: a model computes in float32, bfloat16 or float16")
    return found


def online(model: Any, format: str | Format | Plan | None) -> Any:
    """Which format a parameter takes as it arrives."""
    if format is None:
        return lambda path, module: None
    plan = format if isinstance(format, Plan) else default_plan(model, named(format))

    def chosen(path: str, module: nn.Module) -> Format | None:
        if not is_stack(module) and not (isinstance(module, Linear) and path.endswith(".weight")):
            return None
        if is_stack(module) and path.endswith("_bias"):
            return None
        found, _ = plan.for_module(path if is_stack(module) else path.removesuffix(".weight"))
        if found is not None and found.act is not None and not all(scale.dynamic for scale in found.act.scales):
            raise UnsupportedError(f"{path}: static activation scales need calibration, and load has none")
        return found

    return chosen


def named(format: str | Format) -> Format:
    if isinstance(format, Format):
        return format
    if format not in FORMATS:
        raise SpecError(f"format={format!r} is not known; known: {', '.join(FORMATS)}")
    return FORMATS[format]


def default_plan(model: Any, format: Format) -> Plan:
    """Every linear but the output head and the routers."""
    head = hf.output_head(model)
    dense = [name for name, module in model.named_modules() if module is head and head is not None]
    routers = [rf"(.*\.)?{name}$" for name in ROUTERS]
    rules = [Rule(name, "exact", None, "the output head") for name in dense]
    rules += [Rule(pattern, "regex", None, "routers") for pattern in routers]
    return Plan((*rules, Rule("", "any", format, "format=")))
