"""Quantizer: rounds what passes through it as the reference does, and lets gradients through where nothing was clipped.

Its static scales are planes as a checkpoint stores them, so what runs here and what is written share every bit.
"""

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from fewbit.errors import SpecError
from fewbit.quant import elements
from fewbit.quant.blocks import blocked, over, per_block, unblocked
from fewbit.quant.qtensor import Planes, QTensor
from fewbit.quant.reference import assign, choose, decode, fake_quant
from fewbit.quant.spec import QuantSpec, describe

Watch = Literal["", "plain", "rounded"]  # not watching; what comes in goes on as it is; or rounded as far as is known
PLANES = ("_scale0", "_scale1")
BEYOND = 1.001  # the largest value is its own limit, but for rounding


class Quantizer(nn.Module):
    """One weight, input, key or value. spec None: it only passes things on, and scales them where smoothing asks."""

    _scale0: Tensor | None
    _scale1: Tensor | None
    _pre_quant_scale: Tensor | None

    def __init__(self, spec: QuantSpec | None = None, *, weight: bool = False, outer: float = 0.0):
        super().__init__()
        self.spec, self.weight, self.enabled = spec, weight, spec is not None
        self.outer = outer  # what the outer scale of two brings to 1; 0 = the reach of the element and the inner scale
        self.pass_through = False
        self.watch: Watch = ""
        self.amax: Tensor | None = None  # of everything seen while watching
        self.stats: Any = None  # takes what comes in, while calibrating
        for name in (*PLANES, "_pre_quant_scale"):
            self.register_buffer(name, None)

    def forward(self, x: Tensor) -> Tensor:
        return self.rounded(self.scaled(x))

    def scaled(self, x: Tensor) -> Tensor:
        if self.stats is not None:
            self.stats.add(x.detach())
        return x if self._pre_quant_scale is None else x * self._pre_quant_scale.to(x.dtype)

    def rounded(self, x: Tensor) -> Tensor:
        if not self.enabled or self.spec is None:
            return x
        if self.watch and x.numel():
            top = x.detach().abs().amax().float().view(1, 1)
            self.amax = top if self.amax is None else torch.maximum(self.amax, top)
            if self.watch == "rounded":
                self.hold(self.amax)
        return x if self.watch == "plain" else _Straight.apply(x, self)  # type: ignore[no-untyped-call]

    @property
    def planes(self) -> Planes:
        """Static scales, by level."""
        held = {name[1:]: getattr(self, name) for name in PLANES}
        return {name: plane for name, plane in held.items() if plane is not None}

    @planes.setter
    def planes(self, planes: Planes) -> None:
        for name in PLANES:
            setattr(self, name, planes.get(name[1:]))

    def hold(self, amax: Tensor) -> None:
        """Static scales from the largest magnitudes: of each block, or of the whole if blocks choose their own."""
        if self.spec is None or self.spec.scales[-1].dynamic or self.spec.rule == "mx-ceil":
            return
        self.planes = (
            outer_plane(self.spec, amax, self.outer) if len(self.spec.scales) == 2 else inner_plane(self.spec, amax)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Scales follow the model to its device, and keep their type where it changes its own."""
        held = {name: getattr(self, name) for name in PLANES}
        super()._apply(fn, recurse)
        for name, plane in held.items():
            if plane is not None:
                setattr(self, name, plane.to(getattr(self, name).device))
        return self

    def encode(self, w: Tensor) -> QTensor:
        """w: [..., N, K] with the codes that forward rounds it to."""
        assert self.spec is not None
        if not bool(torch.isfinite(w).all()):
            raise SpecError("cannot encode: a weight holds NaN or infinity")
        w, held = w.detach().float(), self.planes
        return assign(w, self.spec, held if len(held) == len(self.spec.scales) else choose(w, self.spec, held))

    def value(self, x: Tensor) -> Tensor:
        """x rounded, no gradient."""
        assert self.spec is not None
        if self.weight:
            return decode(self.encode(x)).to(x.dtype)
        return fake_quant(x, self.spec, self.planes)

    def inside(self, x: Tensor) -> Tensor | None:
        """Where static scales leave x within their range (half a step beyond it too); None: nothing is ever clipped."""
        spec, planes = self.spec, self.planes
        if spec is None or self.pass_through or not planes:
            return None
        inner, blocks = torch.tensor(spec.scales[0].element.max), (0, 0)
        if "scale0" in planes:
            inner, blocks = elements.decode(planes["scale0"], spec.scales[0].element).abs(), spec.scales[0].block
        outer = elements.decode(planes["scale1"], spec.scales[1].element) if "scale1" in planes else 1.0
        reach = inner * outer * (spec.element.max * BEYOND)
        if blocks == (0, 0):
            return x.abs() <= reach.to(x.device)
        return unblocked(blocked(x.abs(), blocks) <= per_block(reach), tuple(x.shape))

    def extra_repr(self) -> str:
        if not self.enabled or self.spec is None:
            return "disabled" + self._smoothed()
        scale = self.planes.get("scale1", self.planes.get("scale0"))
        top = "" if scale is None else f", scale {float(scale.float().abs().max()):.4g}"
        return f"{describe(self.spec)}{top}{self._smoothed()}"

    def _smoothed(self) -> str:
        return "" if self._pre_quant_scale is None else ", pre_quant_scale"


class _Straight(torch.autograd.Function):
    """Rounding whose gradient is that of the identity, where the range was not left."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: Quantizer) -> Tensor:
        inside = quantizer.inside(x) if ctx.needs_input_grad[0] else None
        ctx.everywhere = inside is None
        if inside is not None:
            ctx.save_for_backward(inside)
        return quantizer.value(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (grad if ctx.everywhere else grad * ctx.saved_tensors[0]), None


def inner_plane(spec: QuantSpec, amax: Tensor) -> Planes:
    """amax: [..., R, C], one per block -> the scales of a one-level spec."""
    amax = amax.float()
    scale = torch.where(amax > 0, over(amax, spec.element.max), 1.0)
    return {"scale0": elements.encode(scale, spec.scales[0].element)}


def outer_plane(spec: QuantSpec, amax: Tensor, outer: float = 0.0) -> Planes:
    """amax: of the whole tensor [..., 1, 1] -> the outer scale of a two-level spec, as the reference chooses it."""
    amax = amax.float()
    top = 256.0 if spec.rule == "four-over-six" else spec.scales[0].element.max
    return {"scale1": torch.where(amax > 0, over(amax, outer or spec.element.max * top), 1.0)}


def block_amax(w: Tensor, spec: QuantSpec) -> Tensor:
    """w: [..., N, K] -> the largest magnitude that each static scale of the spec is chosen for."""
    block = spec.scales[-1].block
    return blocked(w.detach().abs(), block).amax((-3, -1)).float()
