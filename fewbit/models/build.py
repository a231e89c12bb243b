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
from fewbit.errors import CheckpointError, SpecError, UnsupportedError
from fewbit.kernels.select import known_or_raise
from fewbit.models import fuse as fusing
from fewbit.models import hf, twin
from fewbit.models.account import finish
from fewbit.models.fill import Filler, is_stack, prepare, settle
from fewbit.models.finding import refuse_on_errors
from fewbit.models.shard_source import sharded
from fewbit.models.shard_values import Ranks
from fewbit.models.values import Watch
from fewbit.models.verify import building, plausible, verify_source
from fewbit.modules import attention, paged
from fewbit.modules.linear import Linear, Options
from fewbit.quant.formats import FORMATS
from fewbit.quant.plan import Plan, Rule
from fewbit.quant.qtensor import Planes
from fewbit.quant.spec import Format, QuantSpec

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
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> nn.Module:
    """A folder or a .gguf file -> the model in eval mode: model(input_ids).logits, model.generate(...).

    dtype: of everything that is not quantized; None = as the config says. kernels: "auto" or a kernel's name.
    activations: "declared", "hardware" to leave them in dtype where the device lacks theirs, "fast" to round them to
    int8 besides where weights alone are quantized and that is faster, "off" to leave all.
    format: quantize every linear and expert on arrival.
    attend: config -> the attention that the architecture is built with, or an error. ranks: hold one rank's part only.
    fuse: with fused modules where the twin agrees; what became of each is model.fewbit_fused.
    tell: called with how many tensors are in their places, of how many.
    """
    if activations not in ACTIVATIONS:
        raise SpecError(f"activations={activations!r}: known are {', '.join(ACTIVATIONS)}")
    known_or_raise(kernels)
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
        round_cache(model, source, filler)
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


def round_cache(model: nn.Module, source: codecs.Source, filler: Filler) -> None:
    """Give attention modules the spec and scales of the KV cache that the checkpoint declares."""
    spec = source.plan.kv
    if spec is None or not source.kv or filler.options.activations == "off":
        return
    if (used := hf.attention_of(model)) not in (attention.NAME, paged.NAME):
        reason = f"the model runs on transformers' own {used} attention, where ours is not exact"
        raise UnsupportedError("the checkpoint declares a quantized KV cache", [reason])
    for name in source.kv:
        path = attention_path(name, filler)
        setattr(model.get_submodule(path), attention.KV, (spec, *kv_planes(source, name, spec)))


def attention_path(name: str, filler: Filler) -> str:
    """An attention module's path in the model, by way of a projection in it."""
    asked = [f"{name}.{leaf}.weight" for leaf in ("k_proj", "qkv_proj", "kv_b_proj", "o_proj")]
    places = [p for p in filler.rules.place(asked).values() if p is not None]
    if not places:
        raise CheckpointError(f"{name}: has KV scales, and no attention of the model has that name")
    return places[0].target.rsplit(".", 2)[0]


def kv_planes(source: codecs.Source, name: str, spec: QuantSpec) -> tuple[Planes, Planes]:
    """The static scales of keys and of values, as planes of the spec."""
    static = [i for i, scale in enumerate(spec.scales) if not scale.dynamic]
    if not static:
        return {}, {}
    level = static[-1]
    held = source.kv[name]
    out = []
    for of in ("k", "v"):
        tensor = held.get(of, held.get("kv"))
        if tensor is None:
            raise CheckpointError(f"{name}: no {of} scale of the KV cache; found {', '.join(held.values())}")
        scale = torch.as_tensor(source.checkpoint.read(tensor)).to(spec.scales[level].element.dtype)
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise CheckpointError(
                f"{tensor}: a KV scale must be finite and above 0, found {scale.flatten()[:4].tolist()}"
            )
        out.append({f"scale{level}": scale.reshape(1, 1) if scale.numel() == 1 else scale.reshape(-1, 1, 1)})
    return out[0], out[1]
