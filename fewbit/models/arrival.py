"""Arrival: what a float weight becomes as it is read, as a value: its format, and the planes that are given.

Planes that are not given are chosen by the rule of the spec, from the weight as it arrives.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fewbit.errors import SpecError
from fewbit.quant import elements
from fewbit.quant.ggml import GGML_RULES
from fewbit.quant.qtensor import Planes, Quantized, Transform, grid, make, scale_of, store
from fewbit.quant.reference import SUMMING, encode
from fewbit.quant.spec import FLAT, Format, QuantSpec

Online = Callable[[str, nn.Module], "Arrival | None"]  # (a parameter's path, its module) -> what it becomes


@dataclass(frozen=True, slots=True)
class Arrival:
    """weight: unpacked planes of it that are given; codes too, as stored: then it is all of them, whatever it was.

    act: the static planes of its input, as stored.
    The weight is rewritten for the transforms, or with `rewrite` off came as they want it. Of a stack of experts any
    tensor may have a leading axis of experts; without one it is for all of them.
    """

    format: Format
    weight: Planes = field(default_factory=dict)
    act: Planes = field(default_factory=dict)
    transforms: tuple[Transform, ...] = ()
    rewrite: bool = True

    def __post_init__(self) -> None:
        if (kinds := tuple(t.kind for t in self.transforms)) != self.format.transforms:
            raise SpecError(f"transforms {kinds or 'none'}: the format has {self.format.transforms or 'none'}")
        if self.weight and self.format.weight.rule in GGML_RULES:
            raise SpecError(f"planes are given, and the rule {self.format.weight.rule} chooses all of them itself")
        for name, plane in self.weight.items():
            if name != "codes" and not bool(plane.float().isfinite().all()):
                raise SpecError(f"{name} of the weight must be finite")
        if (act := self.format.act) is not None:
            check_static(act, self.act)

    @property
    def anywhere(self) -> bool:
        """Whether every device makes the same of a weight: nothing is added up, in an order of the device's own."""
        turned = self.rewrite and any(t.kind in PRODUCTS for t in self.transforms)
        return self.format.weight.rule not in SUMMING and not turned

    def expert(self, e: int) -> "Arrival":
        """Of one matrix of a stack."""

        def own(tensors: Planes, dims: int) -> Planes:
            return {name: t[e] if t.dim() > dims else t for name, t in tensors.items()}

        transforms = tuple(Transform(t.kind, own(t.tensors, DIMS[t.kind])) for t in self.transforms)
        return replace(self, weight=own(self.weight, 2), act=own(self.act, 2), transforms=transforms)

    def rows(self, start: int, stop: int) -> "Arrival":
        """Of a run of rows; what lies along the inputs is of all rows."""

        def b(t: Transform) -> Transform:
            return Transform(t.kind, t.tensors | {"b": t.tensors["b"][start:stop]}) if t.kind == "low_rank" else t

        planes = {name: self._cut(name, plane, start, stop) for name, plane in self.weight.items()}
        return replace(self, weight=planes, transforms=tuple(map(b, self.transforms)))

    def _cut(self, name: str, plane: Tensor, start: int, stop: int) -> Tensor:
        rows = 1 if name == "codes" else scale_of(self.format.weight, name).block[0]
        if rows == 0:
            return plane
        if rows == FLAT or start % rows:
            raise SpecError(f"{name} of the weight is given for what does not begin at row {start}")
        return plane[start // rows : -(-stop // rows)]


def check_static(act: QuantSpec, planes: Planes) -> None:
    """Refuse planes of an input that lack what its spec does not choose at each call, or scale by nothing."""
    chains = {"scale": act.scales, "zero": act.zeros}
    static = {f"{stem}{i}": s.element for stem, chain in chains.items() for i, s in enumerate(chain) if not s.dynamic}
    if missing := sorted(static.keys() - planes.keys()):
        raise SpecError(f"static activation scales need calibration: the input's {', '.join(missing)} is not given")
    for name, plane in planes.items():
        if name not in static:
            raise SpecError(f"the input's {name} is given, and its spec chooses it at each call")
        value = elements.decode(plane, static[name])
        if not bool(value.isfinite().all()) or (name.startswith("scale") and not bool((value > 0).all())):
            raise SpecError(f"the input's {name} must be finite and above 0, found {value.flatten()[:4].tolist()}")


PRODUCTS = ("rotate", "low_rank")  # transforms that rewrite a weight by products of matrices
DIMS = {"permute": 1, "input_scale": 1, "rotate": 2, "low_rank": 2}  # axes of a transform's tensors, for one matrix


def online(tensor: Tensor, arrival: Arrival, dtype: torch.dtype | None = None) -> Quantized:
    """tensor: [N, K] float. dtype: of the model, which a weight that is rewritten is rounded to."""
    rewrite = arrival.rewrite and arrival.transforms
    w = rewritten(tensor.to(dtype or tensor.dtype), arrival.transforms) if rewrite else tensor
    spec = arrival.format.weight
    for name, plane in arrival.weight.items():
        if name == "codes":
            continue
        want = grid(w.shape, scale_of(spec, name).block)
        if tuple(plane.shape) not in (want, (1, 1)):
            raise SpecError(f"{name} of the weight is given as {list(plane.shape)}, its blocks are {list(want)}")
    given = {name: plane.to(w.device) for name, plane in arrival.weight.items()}
    if "codes" in given:
        stored = {name: plane if name == "codes" else store(plane, scale_of(spec, name).element)
                  for name, plane in given.items()}  # fmt: skip
        return Quantized(arrival.format, make(spec, w.shape, stored), arrival.act, arrival.transforms)
    return Quantized(arrival.format, encode(w, spec, given), arrival.act, arrival.transforms)


def rewritten(w: Tensor, transforms: tuple[Transform, ...]) -> Tensor:
    """The weight that, with the transforms beside it, does what w does; in the type of w."""
    for t in transforms:
        held = {name: tensor.to(w.device) for name, tensor in t.tensors.items()}
        if t.kind == "permute":
            w = w.index_select(-1, held["index"])
        elif t.kind == "input_scale":
            w = (w.float() / held["scale"].float()).to(w.dtype)
        elif t.kind == "rotate":
            turned = torch.unflatten(w.float(), -1, (-1, len(held["matrix"]))) @ held["matrix"].float()
            w = turned.flatten(-2).to(w.dtype)
        elif t.kind == "low_rank":
            w = (w.float() - held["b"].float() @ held["a"].float()).to(w.dtype)
        else:
            raise SpecError(f"transform {t.kind!r} is not known")
    return w
