"""load: any checkpoint -> a transformers-style module, its weights streamed in one tensor at a time.

Peak memory is the final model plus the largest tensor: each tensor goes to its place as it is read, and is quantized on
the way when `format` asks for it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbit import codecs
from fewbit.errors import SpecError, UnsupportedError
from fewbit.kernels.select import known_or_raise
from fewbit.models import fuse as fusing
from fewbit.models import hf, twin
from fewbit.models import kv as caching
from fewbit.models.account import finish
from fewbit.models.arrival import Arrival, Online
from fewbit.models.fill import Filler, is_stack, prepare, settle
from fewbit.models.finding import refuse_on_errors
from fewbit.models.shard_source import sharded
from fewbit.models.values import Watch
from fewbit.models.verify import building, model_config, verify_source
from fewbit.modules import attention, paged
from fewbit.modules.attention_sides import SIDES, Sides, mapped
from fewbit.modules.linear import Linear, Options
from fewbit.modules.parted import Ranks
from fewbit.quant.formats import FORMATS
from fewbit.quant.plan import Plan, Rule
from fewbit.quant.qtensor import Planes
from fewbit.quant.spec import Format, QuantSpec

Asked = str | Format | Plan | Mapping[str, Arrival] | Online | None
Cached = tuple[QuantSpec, Planes, Planes] | Sides  # keys and values, static planes of k, of v; or each for itself
ACTIVATIONS = ("declared", "hardware", "fast", "off")
ROUTERS = ("gate", "router", "shared_expert_gate", "classifier", "wg")  # small, and their choices are discrete


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    kernels: str = "auto",
    activations: str = "declared",
    format: Asked = None,
    kv: Mapping[str, Cached] | None = None,
    trust_remote_code: bool = False,
    unsafe_skip_verify: Sequence[str] = (),
    attend: Callable[[Any], str] = twin.require,
    ranks: Ranks | None = None,
    fuse: bool = False,
    cached: caching.Asked | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> nn.Module:
    """A folder or a .gguf file -> the model in eval mode: model(input_ids).logits, model.generate(...).

    dtype: of everything that is not quantized; None = as the config says. kernels: "auto" or a kernel's name.
    activations: "declared", "hardware" to leave them in dtype where the device lacks theirs, "fast" to round them to
    int8 besides where weights alone are quantized and that is faster, "off" to leave all.
    format: quantize every linear and expert on arrival; or what each becomes: Arrivals by the path of its module (of a
    stack of experts with the projection), or a function of a parameter's path and its module.
    kv: attention module -> how its keys and values are rounded, and the static planes of both; or its Sides.
    attend: config -> the attention that the architecture is built with, or an error. ranks: hold one rank's part only.
    fuse: with fused modules where the twin agrees; what became of each is model.fewbit_fused.
    cached: what keys and values are rounded to; None: as the checkpoint declares.
    tell: called with how many tensors are in their places, of how many.
    """
    if activations not in ACTIVATIONS:
        raise SpecError(f"activations={activations!r}: known are {', '.join(ACTIVATIONS)}")
    known_or_raise(kernels)
    unsafe_skip_verify = (*unsafe_skip_verify, *(cached.skipped if cached is not None else ()))
    with codecs.open(path, trust_remote_code) as source:
        if format is not None and source.modules:
            told = f"format={format!r}" if isinstance(format, str | Format | Plan) else "to quantize it on arrival"
            raise UnsupportedError(f"{path}: already quantized ({source.dialect}); {told} needs float weights")
        with building(source):
            config = model_config(source)
            options = Options(kernels, activations, resolve_dtype(dtype, config))
            model = hf.build(config, options.dtype, attend(config))
        refuse_on_errors(source.path, verify_source(source, model), unsafe_skip_verify)
        prepare(model)
        arrivals = online(model, format)
        shards = sharded(model, config, source, arrivals, options, ranks) if ranks is not None else None
        make = shards.filler if shards is not None else Filler
        filler = make(model, hf.rules(model), options, torch.device(device), arrivals)
        watch = Watch(source)
        filler.watch, filler.tell = watch.see, tell
        places = filler.fill(source)
        refuse_on_errors(source.path, watch.finish(), unsafe_skip_verify)
        if isinstance(format, Mapping):
            all_came(format, filler.filled)
        finish(filler, places, source, unsafe_skip_verify)
        caching.apply(model, source, filler, cached)
        if kv and activations != "off":
            round_caches(model, kv, cached is not None and cached.format != "auto")
        if shards is not None:
            shards.finish()
    model.to(device)
    move_caches(model, device)
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


def online(model: Any, format: Asked) -> Online:
    """What a parameter becomes as it arrives."""
    if format is None:
        return lambda path, module: None
    if isinstance(format, Mapping):
        return by_path(model, format)
    if callable(format):
        return format
    plan = format if isinstance(format, Plan) else default_plan(model, named(format))

    def chosen(path: str, module: nn.Module) -> Arrival | None:
        if not quantizable(path, module):
            return None
        found, _ = plan.for_module(module_path(path, module))
        try:
            return None if found is None else Arrival(found)
        except SpecError as error:
            raise UnsupportedError(f"{path}: {error}") from error

    return chosen


def quantizable(path: str, module: nn.Module) -> bool:
    return not path.endswith("_bias") if is_stack(module) else isinstance(module, Linear) and path.endswith(".weight")


def module_path(path: str, module: nn.Module) -> str:
    """What arrivals are called by: a linear, or a projection of a stack."""
    return path if is_stack(module) else path.removesuffix(".weight")


def by_path(model: nn.Module, arrivals: Mapping[str, Arrival]) -> Online:
    """A name that the model lacks is an error."""
    held = ((f"{path}.{leaf}", module) for path, module in model.named_modules() for leaf in module._parameters)
    known = [module_path(path, module) for path, module in held if quantizable(path, module)]
    if unknown := sorted(arrivals.keys() - set(known)):
        raise SpecError(f"format=: the model has no {', '.join(unknown[:3])}; it has {', '.join(known[:3])} ...")
    return lambda path, module: arrivals.get(module_path(path, module)) if quantizable(path, module) else None


def all_came(arrivals: Mapping[str, Arrival], filled: Mapping[str, int]) -> None:
    if left := [name for name in arrivals if not filled.get(name) and not filled.get(f"{name}.weight")]:
        reason = f"its weight comes under another name (tied), and cannot be quantized alone: {', '.join(left[:3])}"
        raise UnsupportedError("a module does not become what it is to", [reason])


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


def round_caches(model: nn.Module, kv: Mapping[str, Cached], asked: bool = False) -> None:
    """Give attention modules specs and scales that are no part of the checkpoint. asked: the cache's own is neither."""
    if (used := hf.attention_of(model)) not in (attention.NAME, paged.NAME):
        reason = f"the model runs on transformers' own {used} attention, where ours is not exact"
        raise UnsupportedError("keys and values cannot be rounded", [reason])
    for path, held in kv.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise SpecError(f"kv=: the model has no attention module {path}") from None
        sides = isinstance(held, Sides)  # they come before what the cache is asked to hold
        if hasattr(module, attention.KV) and not (sides and asked):
            raise UnsupportedError(f"{path}: the checkpoint says already how its keys and values are rounded")
        setattr(module, SIDES if sides else attention.KV, held)


def move_caches(model: nn.Module, device: str | torch.device) -> None:
    """What is rounded to lies on the device: nothing is copied to it in a step."""
    for module in model.modules():
        if (kv := getattr(module, attention.KV, None)) is not None:
            spec, *planes = kv
            there = ({name: plane.to(device) for name, plane in of.items()} for of in planes)
            setattr(module, attention.KV, (spec, *there))
        if hasattr(module, SIDES):
            setattr(module, SIDES, mapped(getattr(module, SIDES), lambda t: t.to(device)))
