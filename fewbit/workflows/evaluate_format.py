"""Rounded: a checkpoint whose linears and experts are quantized as they are read, as `load(format=)` does it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fewbit.codecs.source import Source
from fewbit.errors import UnsupportedError
from fewbit.models import hf
from fewbit.models.build import online, resolve_dtype
from fewbit.models.fill import is_stack, owner, prepare
from fewbit.models.verify import model_config
from fewbit.quant.plan import Plan
from fewbit.quant.qtensor import Quantized
from fewbit.quant.reference import encode
from fewbit.quant.spec import Format


@dataclass(slots=True)
class Rounding:
    """One module that is dense on disk, and what it becomes."""

    tensor: str
    shape: tuple[int, ...]
    format: Format
    transposed: bool


@dataclass(slots=True)
class Rounded:
    """A Source with some dense tensors turned into modules."""

    source: Source
    made: dict[str, Rounding]
    modules: Mapping[str, Any] = field(init=False)
    dense: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        taken = {each.tensor for each in self.made.values()}
        self.modules = {**self.source.modules, **self.made}
        self.dense = {name: info for name, info in self.source.dense.items() if name not in taken}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read(self, name: str) -> Quantized | Tensor:
        if name not in self.made:
            return self.source.read(name)
        each = self.made[name]
        tensor = self.source.read(each.tensor)
        return Quantized(each.format, encode(tensor.mT if each.transposed else tensor, each.format.weight))


def rounded(source: Source, format: str | Format | Plan) -> Rounded:
    """What a format, or a plan on paths in the model, makes of a float checkpoint."""
    if source.modules:
        raise UnsupportedError(
            f"{source.path}: already quantized ({source.dialect}); format={format!r} needs float weights"
        )
    config = model_config(source)
    model = hf.build(config, resolve_dtype(None, config))
    prepare(model)
    chosen, made = online(model, format), {}
    for name, place in hf.placements(model, source.dense).items():
        if place is None:
            continue
        module, _ = owner(model, place.target)
        found = chosen(place.target, module)
        if found is None or len(source.dense[name].shape) < 2:
            continue
        if place.group is not None or place.swap:
            raise UnsupportedError(f"{name}: format={format!r}: this tensor is rearranged as it is read")
        shape = tuple(source.dense[name].shape)
        transposed = is_stack(module) and place.expert is None and module.is_transposed
        key = name if len(shape) > 2 else name.removesuffix(".weight")
        turned = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
        made[key] = Rounding(name, turned, found.format, transposed)
    return Rounded(source, made)
