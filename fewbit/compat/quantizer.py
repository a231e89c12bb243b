"""Quantizer: rounds what passes through it as the reference does, and lets gradients through where nothing was clipped.

Its static scales are planes as a checkpoint stores them, so what runs here and what is written share every bit.
"""

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from fewbit.errors import SpecError
from fewbit.modules.attention_sides import Side, hadamard
from fewbit.quant import elements
from fewbit.quant.blocks import blocked, over, per_block, unblocked
from fewbit.quant.qtensor import Planes, QTensor
from fewbit.quant.reference import assign, decode, encode, fake_quant
from fewbit.quant.spec import QuantSpec, describe

Watch = Literal["", "plain", "rounded"]  # not watching; what comes in goes on as it is; or rounded as far as is known
PLANES = ("_scale0", "_scale1")
BEYOND = 1.001  # the largest value is its own limit, but for rounding


class Quantizer(nn.Module):
    """One weight, input, key or value. spec None: it only passes things on, and scales them where smoothing asks."""

    _scale0: Tensor | None
    _scale1: Tensor | None
    _pre_quant_scale: Tensor | None
    _bias_value: Tensor | None

    def __init__(self, spec: QuantSpec | None = None, *, weight: bool = False, outer: float = 0.0):
        super().__init__()
        self.spec, self.weight, self.enabled = spec, weight, spec is not None
        self.outer = outer  # what the outer scale of two brings to 1; 0 = the reach of the element and the inner scale
        self.pass_through = False
        self.affine = False  # of a cache: the mean of each channel is taken out first
        self.turned = False  # of a cache: rounded in the basis of a Hadamard matrix
        self.extremes: Tensor | None = None  # [3, G, 1, D] of an affine one: lowest, highest, sum
        self.tokens = 0  # that the sum is of
        self.chosen: QTensor | None = None  # by an algorithm that chooses codes, while the weight is what it gave
        self.watch: Watch = ""
        self.amax: Tensor | None = None  # of everything seen while watching
        self.stats: Any = None  # takes what comes in, while calibrating
        for name in (*PLANES, "_pre_quant_scale", "_bias_value"):
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
            self.look(x.detach())
            if self.watch == "rounded" and self.amax is not None:
                self.hold(self.amax)
        return x if self.watch == "plain" else _Straight.apply(x, self)  # type: ignore[no-untyped-call]

    def look(self, x: Tensor) -> None:
        """What is seen while watching. An affine one's mean, and what remains without it, are of all seen so far."""
        if self.turned:
            x = x @ hadamard(x.shape[-1], x.device, x.dtype)
        if self.affine:
            wide = x.float()
            found = torch.stack([wide.amin((0, 2)), wide.amax((0, 2)), wide.sum((0, 2))])[:, :, None]
            low, high, total = found if self.extremes is None else (
                torch.minimum(self.extremes[0], found[0]), torch.maximum(self.extremes[1], found[1]),
                self.extremes[2] + found[2],
            )  # fmt: skip
            self.extremes, self.tokens = torch.stack([low, high, total]), self.tokens + x.shape[0] * x.shape[2]
            self._bias_value = total / self.tokens
            self.amax = torch.maximum(high - self._bias_value, self._bias_value - low).amax().view(1, 1)
            return
        top = x.abs().amax().float().view(1, 1)
        self.amax = top if self.amax is None else torch.maximum(self.amax, top)

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
        if self.spec is None or self.spec.scales[-1].dynamic or by_rule(self.spec):
            return
        self.planes = (
            outer_plane(self.spec, amax, self.outer) if len(self.spec.scales) == 2 else inner_plane(self.spec, amax)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Scales follow the model to its device, and keep their type where it changes its own."""
        held = {name: getattr(self, name) for name in PLANES}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
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
        return assign(w, self.spec, held) if len(held) == len(self.spec.scales) else encode(w, self.spec, held)

    def value(self, x: Tensor) -> Tensor:
        """x rounded, no gradient."""
        assert self.spec is not None
        if self.weight:
            return decode(self.encode(x)).to(x.dtype)
        if self.affine or self.turned:
            return self._side(x)
        return fake_quant(x, self.spec, self.planes)

    def _side(self, x: Tensor) -> Tensor:
        """x: [B, G, T, D] as engines round it."""
        assert self.spec is not None
        return Side(self.spec, self.planes, self._bias_value, self.turned)(x)

    def inside(self, x: Tensor) -> Tensor | None:
        """Where static scales leave x within their range (half a step beyond it too); None: nothing is ever clipped."""
        spec, planes = self.spec, self.planes
        if spec is None or self.pass_through or not planes or self.turned:
            return None
        x = x if self._bias_value is None else x - self._bias_value
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


def by_rule(spec: QuantSpec) -> bool:
    """True where nothing but the rule of the spec chooses scales."""
    return (
        spec.rule not in ("amax", "four-over-six") or bool(spec.zeros) or not spec.scales or spec.scales[0].block[0] < 0
    )


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
