"""Linear: a weight that is a plain parameter, or Quantized parts that kernels run; several parts lie along N.

A dense Linear keeps `.weight`, so model code that reads it goes on working; a quantized one decodes it when asked.
What is bound waits as it came until `settle`, or whoever asks for `parts`, has kernels chosen: until then it can be
merged with others.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from fewbit.errors import UnsupportedError
from fewbit.kernels.capability import run_as
from fewbit.kernels.dense import dense_linear
from fewbit.kernels.registry import Kernel, Op, Unscaled
from fewbit.kernels.select import able
from fewbit.modules.parted import Parted
from fewbit.quant.qtensor import Planes, QTensor, Quantized, Transform
from fewbit.quant.reference import decode


@dataclass(frozen=True, slots=True)
class Options:
    """How quantized modules run. kernels: "auto" or a kernel's name.

    activations: "declared" rounds inputs as the format says, in software where need be; "hardware" where the device
    multiplies what comes of it, and leaves them else; "fast" is that, and rounds the inputs of weights alone to int8
    where that is faster; "off" leaves them.
    """

    kernels: str = "auto"
    activations: str = "declared"
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class Part:
    """One Quantized with the kernel that runs it. Where the kernel has taken the planes over, they are on meta here."""

    quantized: Quantized
    kernel: Kernel
    packed: Any
    device: torch.device


def part(quantized: Quantized, op: Op, options: Options) -> Part:
    """Choose a kernel and bring the planes into its layout."""
    quantized = as_run(quantized, options)
    device = quantized.weight.device
    for kernel in able(op, quantized.format, device, options.dtype, options.kernels):
        packed = kernel.prepacked(quantized, options.dtype)
        if packed is not None:
            return Part(packed.source if kernel.owns else quantized, kernel, packed, device)
    raise AssertionError("the reference leaves nothing")


def there_or_raise(parts: tuple[Part, ...], what: str) -> None:
    """Refuse what needs the canonical planes where a kernel holds them in a layout of its own."""
    names = sorted({p.kernel.name for p in parts if p.quantized.weight.device.type == "meta"})
    if names:
        reason = f"{', '.join(names)} holds it in its own layout, without a second copy"
        raise UnsupportedError(
            f"a quantized weight cannot be {what}", [reason, "kernels='reference' keeps it as stored"]
        )


def as_run(quantized: Quantized, options: Options) -> Quantized:
    """With the format that the options make of it."""
    form = run_as(quantized.format, quantized.weight.device, options.dtype, options.activations)
    return replace(quantized, format=form, act=quantized.act if form.act == quantized.format.act else {})


class Linear(nn.Module):
    """y = x W^T + bias. parted: of those of which this rank has some columns."""

    parted: Parted | None = None

    def __init__(self, in_features: int, out_features: int, weight: nn.Parameter | None, bias: nn.Parameter | None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.parts: tuple[Part, ...] = ()
        self.pending: tuple[Quantized, ...] = ()
        self.options = Options()
        self.weight = weight
        self.bias = bias

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        """The same layer, its parameters shared."""
        return cls(linear.in_features, linear.out_features, linear.weight, linear.bias)

    def bind(self, parts: tuple[Quantized, ...], options: Options) -> None:
        """Hold these along N instead of a dense weight."""
        rows = sum(q.weight.shape[-2] for q in parts)
        shapes = [list(q.weight.shape) for q in parts]
        if rows != self.out_features or any(shape[-1] != self.in_features for shape in shapes):
            raise UnsupportedError(f"a linear of [{self.out_features}, {self.in_features}] cannot hold {shapes}")
        self._parameters.pop("weight", None)
        for name in ("weight", "parts"):
            self.__dict__.pop(name, None)
        self.options, self.pending = options, parts

    def settle(self) -> tuple[Part, ...]:
        """Choose kernels for what waits, and bring it into their layouts."""
        if self.pending:
            self.parts = tuple(part(q, "linear", self.options) for q in self.pending)
            self.pending = ()
        return self.parts

    def forward(self, x: Tensor) -> Tensor:
        if self.parted is None:
            return self.own(x)
        return self.parted.ranks.reduce(self.own(self.parted.given(x)))

    def own(self, x: Tensor) -> Tensor:
        """What this rank's columns give."""
        if not self.parts:
            return dense_linear(x, self.weight, self.bias)
        if len(self.parts) == 1:
            only = self.parts[0]
            return only.kernel.run(x, only.packed, self.bias)
        y = torch.cat([p.kernel.run(x, p.packed, None) for p in self.parts], -1)
        return y if self.bias is None else y + self.bias

    def unscaled(self, x: Tensor) -> Unscaled:
        """y of `own`, and the scales of its rows and columns that are its reader's to apply."""
        only = self.parts[0] if len(self.parts) == 1 and self.bias is None else None
        x = x if self.parted is None else self.parted.given(x)
        if only is None or only.kernel.unscaled is None:
            return self.own(x), None, None
        return only.kernel.unscaled(x, only.packed)

    def __getattr__(self, name: str) -> Any:
        if name == "parts" and self.__dict__.get("pending"):
            return self.settle()
        if name == "weight" and (self.__dict__.get("pending") or self.__dict__.get("parts")):
            return decoded(self.parts).to(self.options.dtype)
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.pending:
            self.pending = tuple(on_device(q, place(q.weight.device, fn)) for q in self.pending)
        else:
            self.parts = moved(self.parts, "linear", fn, self.options)
        return self

    def extra_repr(self) -> str:
        held = self.pending or tuple(p.quantized for p in self.parts)
        kinds = ", ".join(q.weight.spec.element.name for q in held) or "dense"
        return f"{self.in_features} -> {self.out_features}, {kinds}"


def decoded(parts: tuple[Part, ...]) -> Tensor:
    """-> [..., N, K] float32; refused where a transform makes the stored weight something else than the layer's."""
    there_or_raise(parts, "read as a matrix")
    kinds = {t.kind for p in parts for t in p.quantized.transforms}
    if kinds:
        raise UnsupportedError(f"a weight with {', '.join(sorted(kinds))} beside it cannot be read as one matrix")
    return torch.cat([decode(p.quantized.weight) for p in parts], -2)


def moved(parts: tuple[Part, ...], op: Op, fn: Callable[[Tensor], Tensor], options: Options) -> tuple[Part, ...]:
    """Follow Module.to: planes change their device, never their dtype."""
    if not parts:
        return parts
    old = parts[0].device
    new = place(old, fn)
    if new == old:
        return parts
    there_or_raise(parts, f"moved to {new}")
    return tuple(part(on_device(p.quantized, new), op, options) for p in parts)


def place(old: torch.device, fn: Callable[[Tensor], Tensor]) -> torch.device:
    """Where Module.to puts what is on a device."""
    return fn(torch.empty(0, dtype=torch.uint8, device=old)).device


def on_device(q: Quantized, device: str | torch.device) -> Quantized:
    def there(planes: Planes) -> Planes:
        return {name: plane.to(device) for name, plane in planes.items()}

    weight = QTensor(q.weight.spec, q.weight.shape, there(q.weight.planes))
    return Quantized(q.format, weight, there(q.act), tuple(Transform(t.kind, there(t.tensors)) for t in q.transforms))
