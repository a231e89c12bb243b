"""AutoFP8's API: a folder of float weights -> FP8 per tensor, inputs scaled at each call or from examples.

    from fewbit.compat.autofp8 import AutoFP8ForCausalLM, BaseQuantizeConfig

Static scales are a running maximum over rows, each row run through weights and inputs that are rounded already.
KV scales are those of what k_proj and v_proj put out.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from fewbit import codecs
from fewbit.codecs.fp8 import DYNAMIC_FP8
from fewbit.compat.calibrate import hold_weights, static, watching
from fewbit.compat.collect import collect
from fewbit.compat.insert import (
    CACHE,
    QuantLinear,
    as_experts,
    as_linear,
    check_attention,
    disk_modules,
    projections,
    quantizers,
    route_attention,
    weights,
)
from fewbit.compat.quantizer import Quantizer
from fewbit.errors import RequestError, UnsupportedError
from fewbit.models import hf
from fewbit.models.fill import is_stack
from fewbit.modules.attention import is_attention
from fewbit.quant.formats import TENSOR_FP8
from fewbit.workflows.export import export
from fewbit.workflows.small_files import COPIED, SMALL

UNSEEN = 16.0  # the largest magnitude of an input that no example reached
HEAD = "re:.*lm_head"
TARGETS = ("k_proj", "v_proj")


@dataclass(slots=True)
class BaseQuantizeConfig:
    """ignore_patterns: names of linears, or "re:" and an expression searched in them. Of KV targets, both or none."""

    quant_method: str = "fp8"
    activation_scheme: str = "static"
    ignore_patterns: Sequence[str] = (HEAD,)
    kv_cache_quant_targets: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.quant_method != "fp8" or self.activation_scheme not in ("static", "dynamic"):
            found = f"quant_method={self.quant_method!r}, activation_scheme={self.activation_scheme!r}"
            raise RequestError(f"{found}: want quant_method fp8 and activation_scheme static or dynamic")
        if self.kv_cache_quant_targets is None:
            return
        if set(self.kv_cache_quant_targets) != set(TARGETS) or self.activation_scheme != "static":
            told = f"{tuple(self.kv_cache_quant_targets)} with {self.activation_scheme} activations"
            raise RequestError(f"kv_cache_quant_targets = {told}: want {TARGETS}, with static ones")


class FP8DynamicLinear(QuantLinear):
    """A linear in FP8 whose input is scaled at each call."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class FP8StaticLinear(FP8DynamicLinear):
    """A linear in FP8 with an input scale of its own."""


class AutoFP8ForCausalLM:
    """A transformers model and how it is to be quantized."""

    def __init__(self, model: Any, quantize_config: BaseQuantizeConfig, source: str | Path = ""):
        self.model, self.quantize_config, self.source = model, quantize_config, Path(source)
        self.config = model.config

    @classmethod
    def from_pretrained(cls, path: str | Path, quantize_config: BaseQuantizeConfig, **options: Any) -> Self:
        """options: of transformers' from_pretrained. The dtype is the checkpoint's; a GPU is used if there is one."""
        model: Any = hf.pretrained(path, **{"dtype": "auto", **options})
        model.eval()
        placed = {"device_map", "device"} & options.keys()
        return cls(model if placed or not torch.cuda.is_available() else model.to("cuda"), quantize_config, path)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.model(*args, **options)

    def generate(self, *args: Any, **options: Any) -> Any:
        return self.model.generate(*args, **options)

    def quantize(self, examples: Any = ()) -> None:
        """examples: a tokenizer's batch, or token ids [rows, length]; none are needed for dynamic activations."""
        rows = token_rows(examples)
        if self.quantize_config.activation_scheme == "static" and not len(rows):
            raise RequestError(
                "activation_scheme static needs examples: a tokenizer's batch or token ids [rows, length]"
            )
        if any(True for _ in weights(self.model)):
            raise RequestError("the model is quantized already")
        if self.quantize_config.kv_cache_quant_targets:
            check_attention(self.model)
        insert(self.model, self.quantize_config)
        hold_weights(self.model)
        if self.quantize_config.activation_scheme == "static":
            calibrate(self.model, rows, bool(self.quantize_config.kv_cache_quant_targets))

    def save_quantized(self, save_dir: str | Path, overwrite: bool = False) -> None:
        """Print the model, and write it with its tokenizer."""
        if not any(True for _ in weights(self.model)):
            raise RequestError("the model is not quantized yet: call quantize(examples) first")
        print(self.model)
        print(f"Saving the model to {save_dir}")
        held = collect(self.model, codecs.CODECS["fp8"])
        export(self.model, save_dir, held, beside=tokenizer_files(self.source, Path(save_dir)), overwrite=overwrite)


def token_rows(examples: Any) -> Sequence[Tensor]:
    """Rows of token ids. Attention masks are not looked at: padding counts, as it does in AutoFP8."""
    ids = examples["input_ids"] if isinstance(examples, Mapping) else getattr(examples, "input_ids", examples)
    if isinstance(ids, list | tuple):
        if any(isinstance(row, str) for row in ids):
            raise RequestError("examples are texts: give what the tokenizer makes of them")
        return [torch.as_tensor(row).reshape(-1) for row in ids]
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() not in (1, 2):
        raise RequestError(f"examples: want token ids [rows, length], found {type(examples).__name__}")
    return list(ids.reshape(-1, ids.shape[-1]))


def insert(model: Any, config: BaseQuantizeConfig) -> None:
    """Every linear and expert that no pattern ignores becomes FP8."""
    act = TENSOR_FP8 if config.activation_scheme == "static" else DYNAMIC_FP8
    kind = FP8StaticLinear if config.activation_scheme == "static" else FP8DynamicLinear
    disk = disk_modules(model)
    check_patterns(config.ignore_patterns, [n for names in disk.values() for n in names])
    found = 0
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and not ignored(config, [path, *disk.get(f"{path}.weight", [])]):
            held = [as_linear(module, kind)]
        elif is_stack(module) and not ignored(
            config, [path, *(n for p in projections(module) for n in disk[f"{path}.{p}"])]
        ):
            held = list(as_experts(module).quantizers.values())
        else:
            continue
        found += 1
        for pair in held:
            pair.weight_quantizer, pair.input_quantizer = Quantizer(TENSOR_FP8, weight=True), Quantizer(act)
    if not found:
        raise RequestError(f"ignore_patterns = {list(config.ignore_patterns)}: nothing is left to quantize")


def check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if pattern != HEAD and not any(matches(pattern, name) for name in names):
            raise RequestError(f"ignore_patterns: {pattern!r} matches no module; there are {', '.join(names[:3])} ...")


def matches(pattern: str, name: str) -> bool:
    return re.search(pattern[3:], name) is not None if pattern.startswith("re:") else pattern == name


def ignored(config: BaseQuantizeConfig, names: Sequence[str]) -> bool:
    """names: the path in the model, then those on disk."""
    own, *others = (any(matches(p, name) for p in config.ignore_patterns) for name in names)
    if any(others) and not all(others) and not own:
        raise UnsupportedError(f"ignore_patterns ignore a part of {names[0]}, which is one parameter here")
    return own or (bool(others) and all(others))


def calibrate(model: Any, rows: Sequence[Tensor], cache: bool) -> None:
    """Input scales, and those of keys and values, from one row after another."""
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(watching(model, "rounded"))
        tops = stack.enter_context(outputs(model)) if cache else {}
        for row in rows:
            model(row.reshape(1, -1).to(device))
    for q in quantizers(model).values():
        if static(q):
            q.hold(torch.full((1, 1), UNSEEN, device=device) if q.amax is None else q.amax)
            q.amax = None
    for attention, pair in tops.items():
        for leaf, target in zip(CACHE, TARGETS, strict=True):
            quantizer = Quantizer(TENSOR_FP8)
            quantizer.hold(pair[target])
            setattr(model.get_submodule(attention), leaf, quantizer)
    if cache:
        route_attention(model)


@contextmanager
def outputs(model: nn.Module) -> Iterator[dict[str, dict[str, Tensor]]]:
    """-> attention path -> k_proj, v_proj -> the largest magnitude that it has put out so far."""
    tops: dict[str, dict[str, Tensor]] = {}
    hooks = []
    for path, module in model.named_modules():
        if is_attention(module):
            if not all(hasattr(module, target) for target in TARGETS):
                raise UnsupportedError(f"{path} has no k_proj and v_proj", ["their outputs give the KV scales"])
            tops[path] = {}
            hooks += [getattr(module, t).register_forward_hook(_noting(tops[path], t)) for t in TARGETS]
    try:
        yield tops
    finally:
        for hook in hooks:
            hook.remove()


def _noting(held: dict[str, Tensor], target: str) -> Any:
    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        top = out.detach().abs().amax().float().view(1, 1)
        held[target] = torch.maximum(held.get(target, top), top)

    return hook


def tokenizer_files(source: Path, out: Path) -> dict[str, bytes]:
    """The source folder's tokenizer, but for files that are in the way of nothing and exist already."""
    if not source.is_dir():
        return {}
    names = (p for p in sorted(source.iterdir()) if p.is_file() and p.suffix in SMALL and p.name.startswith(COPIED))
    return {
        p.name: p.read_bytes() for p in names if not p.name.startswith("generation") and not (out / p.name).exists()
    }
