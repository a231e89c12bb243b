"""Inputs that are rounded by scales of whole rows, where each rank has a part of the row: the scale is of all parts.

Where a scale of an input spans its channels and is chosen at each call, ranks first agree on the extremes. Then they
round what they have, to codes for a kernel that takes them or, in software, for one that rounds no more. Ranks compute
what one rank would.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.errors import UnsupportedError
from fewbit.kernels.input_rounding import Rounding
from fewbit.kernels.select import select
from fewbit.modules.linear import Options
from fewbit.modules.parted import Ranks
from fewbit.quant.qtensor import Planes, Quantized, Transform
from fewbit.quant.reference import assign, choose, decode, load_plane, transformed
from fewbit.quant.spec import QuantSpec


@dataclass(frozen=True, slots=True)
class Agreed:
    """How an input is rounded before the kernel, in software."""

    spec: QuantSpec
    planes: Planes
    transforms: tuple[Transform, ...]

    def __call__(self, x: Tensor, ranks: Ranks) -> Tensor:
        x = transformed(x, self.transforms)
        if not x.numel():
            return x
        flat = x.reshape(-1, x.shape[-1]).float()
        static = {n: load_plane(p, self.spec, n, flat.shape) for n, p in self.planes.items()}
        found = choose(extremes(flat, ranks), self.spec, static)
        given = static | {name: found[name] for name in spanning(self.spec)}
        return decode(assign(flat, self.spec, choose(flat, self.spec, given))).view(x.shape).to(x.dtype)


def extremes(flat: Tensor, ranks: Ranks) -> Tensor:
    """flat: [T, K] -> [T, 2]: what all ranks' rows reach, above and below."""
    reach = ranks.largest(torch.stack([flat.amax(-1), -flat.amin(-1)], -1))
    return torch.stack([reach[:, 0], -reach[:, 1]], -1)


def spanning(spec: QuantSpec) -> list[str]:
    """Names of the planes that are chosen at each call over all channels."""
    named = [(f"scale{i}", s) for i, s in enumerate(spec.scales)] + [(f"zero{i}", s) for i, s in enumerate(spec.zeros)]
    return [name for name, scale in named if scale.dynamic and scale.block[1] == 0]


def by_kernel(parts: tuple[Quantized, ...], options: Options) -> Rounding | None:
    """How the kernel of a reader rounds its input, where one scale spans a row and it takes codes made by another."""
    only = parts[0] if len(parts) == 1 else None
    if only is None or only.format.act is None or not spanning(only.format.act) or only.transforms:
        return None
    kernel, _ = select("linear", only.format, only.weight.device, options.dtype, options.kernels)
    return None if kernel.rounds is None else kernel.rounds(only)


def taken_out(parts: tuple[Quantized, ...]) -> tuple[Agreed | None, tuple[Quantized, ...]]:
    """The rounding of a reader's input that must be agreed on, and its parts without it."""
    acts = {q.format.act for q in parts}
    if not any(act is not None and spanning(act) for act in acts):
        return None, parts
    first, *others = parts
    if len(acts) > 1 or any(q.transforms for q in others):
        raise UnsupportedError("its parts round their input in several ways: it cannot be cut by columns")
    assert first.format.act is not None
    bare = tuple(replace(q, format=replace(q.format, act=None, transforms=()), act={}, transforms=()) for q in parts)
    return Agreed(first.format.act, first.act, first.transforms), bare
